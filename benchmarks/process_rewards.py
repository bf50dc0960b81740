"""Train process reward models in the report world, where every sentence can be judged, and measure them.

    python benchmarks/process_rewards.py --data data/report_steps
    python benchmarks/process_rewards.py --data data/report_steps --sft runs/report/sft --seeds 0 1 2

The first command writes labelled reports: `train.jsonl` and `test.jsonl` with `prompt`, `completions` and `labels`. A
sentence is right if it is a fact in its place or a right count, given the sentences before it. The prompts of the test
are not those of the training. The second command also trains a model with each seed from the SFT policy, by the
recipe, and writes their figures into `results.json` beside the models.
"""

import argparse
import json
import random
import runpy
from pathlib import Path
from typing import Any

from rlhf_recipes.command.stages import STAGES
from rlhf_recipes.console import quiet_start
from rlhf_recipes.quickstart.report_world import REPORT_WORLD
from rlhf_recipes.quickstart.world import split_sentences

ROOT = Path(__file__).resolve().parents[1]
STAGE = STAGES["process-reward-modeling"]
HELD_OUT = 5  # every fifth prompt is one of the test
RIGHT = ("fact", "count")
SHOWN = ("accuracy", "accuracy_low", "accuracy_high", "right_steps", "auc", "first_error_f1", "calibration_error")


def step_kinds(prompt: str, sentences: list[str]) -> list[str]:
    """Return the kind of each sentence where it stands: what it adds to the assessment of the report."""
    assessed = [REPORT_WORLD.assess(prompt, " ".join(sentences[:count])) for count in range(len(sentences) + 1)]
    pairs = zip(assessed, assessed[1:], strict=False)
    return [next(kind for kind in after if kind != "whole" and after[kind] > before[kind]) for before, after in pairs]


def labelled_report(prompt: str, rng: random.Random) -> dict[str, Any]:
    """Return a demonstration of mixed quality with a label for each sentence."""
    sentences = split_sentences(REPORT_WORLD.sample_response(prompt, rng))
    return {
        "prompt": prompt,
        "completions": sentences,
        "labels": [kind in RIGHT for kind in step_kinds(prompt, sentences)],
    }


def write_data(directory: Path, count: int, seed: int) -> None:
    """Write `count` labelled reports for training, and a quarter as many for the test."""
    rng, prompts = random.Random(seed), list(REPORT_WORLD.plans)
    splits = {
        "test": (prompts[::HELD_OUT], count // 4),
        "train": ([prompt for place, prompt in enumerate(prompts) if place % HELD_OUT], count),
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, (asked, rows) in splits.items():
        lines = [json.dumps(labelled_report(rng.choice(asked), rng)) + "\n" for _ in range(rows)]
        (directory / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def train(sft: Path, data: Path, output_dir: Path, seed: int) -> dict[str, float]:
    """Train a model by the recipe, and return its figures."""
    from rlhf_recipes.options.parser import RecipeParser  # TRL takes seconds

    recipe = runpy.run_path(str(ROOT / "recipes" / f"{STAGE.script}.py"))
    config = ROOT / "recipes" / "configs" / "report" / f"{STAGE.script}.yaml"
    given = {"model_name_or_path": sft, "dataset_name": data, "output_dir": output_dir, "seed": seed}
    options = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    parsed = RecipeParser(STAGE.options()).parse_args_and_config(
        ["--config", str(config), *options, "--tracking", "false"]
    )
    metrics: dict[str, float] = recipe["main"](*parsed)
    return {name: metrics[f"eval_{name}"] for name in SHOWN}


def judged_right(model: Path, data: Path) -> dict[str, float]:
    """Return by the kind of a sentence the share of held-out sentences that a model judges right."""
    import torch

    from rlhf_recipes.rewards.process import ProcessRewardModelScorer

    scorer = ProcessRewardModelScorer.from_pretrained(str(model))
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    prompts, steps = [row["prompt"] + "\n" for row in rows], [row["completions"] for row in rows]
    kinds = [kind for row in rows for kind in step_kinds(row["prompt"], row["completions"])]
    found: dict[str, list[bool]] = {}
    for kind, odds in zip(kinds, torch.cat(scorer.log_odds(prompts, steps)).tolist(), strict=True):
        found.setdefault(kind, []).append(odds > 0)
    return {kind: sum(judged) / len(judged) for kind, judged in sorted(found.items())}


def main() -> None:
    """Write the data, and train if there is an SFT policy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory of the labelled reports")
    parser.add_argument("--count", type=int, default=1500, help="reports for training")
    parser.add_argument("--sft", type=Path, help="SFT policy to start from")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of the data and of the training")
    parser.add_argument("--directory", type=Path, default=Path("runs/process_rewards"), help="place of the models")
    options = parser.parse_args()
    if options.sft is None:
        write_data(options.data, options.count, options.seeds[0])
        return
    quiet_start()
    results: dict[int, Any] = {}
    for seed in options.seeds:
        data = options.data / f"seed-{seed}"
        write_data(data, options.count, seed)
        model = options.directory / f"seed-{seed}"
        results[seed] = {**train(options.sft, data, model, seed), "judged_right": judged_right(model, data)}
        (options.directory / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
