"""Show how the true score falls while PPO follows a reward model too far, and what helps against it.

    python benchmarks/over_optimization.py --directory runs/over_optimization
    python benchmarks/over_optimization.py --directory runs/over_optimization --variants single pessimistic --seeds 0 1

The world is that of the quickstart, with a low price of KL. Each seed has its own SFT policy, preferences, reward
model with one head and reward model with five heads. A variant is PPO on one of them with one rule. After each sixth
of a run, the policy is measured on held-out prompts: gold score, score of its own reward model, KL to the SFT policy.

A run whose `result.json` exists is not repeated. Writes `over_optimization.json`, `.md` and `.png`.
"""

import argparse
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from league import Cell, Judge, build_base, run_cells
from league_methods import WORLDS, Method
from over_optimization_report import write_report
from score_heads import train_heads

from rlhf_recipes.algorithm.heads import combine_heads
from rlhf_recipes.console import quiet_start
from rlhf_recipes.evaluation.reference_answers import add_reference_answers
from rlhf_recipes.models.loading import load_policy, load_tokenizer
from rlhf_recipes.rewards.scorer import RewardModelScorer

HEADS = 5
POINTS = 6  # of a run, equally far apart
WORLD = replace(WORLDS["quickstart"], name="over_optimization", steps=90)
EVERY = WORLD.steps // POINTS
PRICE = {"kl_coef": 0.01, "save_steps": EVERY, "save_total_limit": POINTS}


@dataclass(frozen=True)
class Variant(Method):
    """PPO on one of the reward models of a base."""

    reward_model: str = "reward_modeling"
    data: str = ""  # folder in the base

    def paths(self, base: Path) -> dict[str, Path]:
        """Return the options that name the data and the reward model of a base."""
        return super().paths(base / self.data) | {"reward_model_path": base / self.reward_model}


def variant(name: str, reward_model: str = "reward_modeling", data: str = "", **options: Any) -> Variant:
    """Return a variant with options of PPO."""
    settings = [PRICE | options]
    return Variant(name, "ppo", "ppo.yaml", settings, reads_preferences=True, reward_model=reward_model, data=data)


# The reward of `par` has a deviation of about 0.2 at the start, so the same price of a nat is a fifth.
# A small coefficient of `soft_min` is near the minimum of the heads.
VARIANTS = {
    each.name: each
    for each in (
        variant("single"),
        variant("mean", "score_heads"),
        variant("pessimistic", "score_heads", reward_heads="pessimistic", reward_heads_coef=1.0),
        variant("soft_min", "score_heads", reward_heads="soft_min", reward_heads_coef=0.1),
        variant("par", data="references", reward_shaping="par", reward_norm=False, kl_coef=PRICE["kl_coef"] / 5),
    )
}


def build(cell: Cell) -> None:
    """Build what a run needs beside the base of its seed: a reward model with several heads, or reference answers."""
    given = cell.method.paths(cell.base)
    if not given["dataset_name"].exists():
        add_references(cell.base)
    if not given["reward_model_path"].exists():
        train_heads(cell.base, given["reward_model_path"], HEADS, seed=cell.seed)


def add_references(base: Path) -> None:
    """Write prompts and preferences with answers of the SFT policy to each prompt."""
    scratch, known = base / "building-references", {}
    tokenizer = load_tokenizer(str(base / "sft"), padding_side="left")
    sft = load_policy(str(base / "sft"), dtype=WORLD.dtype)
    options = {"max_completion_length": WORLD.max_completion_length, "temperature": WORLD.temperature}
    for split in ("train", "test"):
        prompts = Dataset.from_json(str(base / "prompts" / f"{split}.jsonl"))
        prompts = add_reference_answers(prompts, sft, tokenizer, response_separator=WORLD.separator, **options)
        known |= dict(zip(prompts["prompt"], prompts["reference_answers"], strict=True))
        pairs = Dataset.from_json(str(base / "preferences" / f"{split}.jsonl"))
        pairs = pairs.add_column("reference_answers", [known[prompt] for prompt in pairs["prompt"]])
        for name, dataset in (("prompts", prompts), ("preferences", pairs)):
            (scratch / name).mkdir(parents=True, exist_ok=True)
            dataset.to_json(scratch / name / f"{split}.jsonl")
    scratch.rename(base / "references")


def own_judge(cell: Cell) -> Judge:
    """Return the judge of the league with the reward model and the rule of a run."""
    judge, path = Judge(cell.world, cell.base), cell.method.paths(cell.base)["reward_model_path"]
    scorer = RewardModelScorer.from_pretrained(str(path), dtype=cell.world.dtype)
    scorer.batch_size, scorer.policy_eos_token_ids = 64, judge.reward_model.policy_eos_token_ids
    rule = {"rule": cell.options.get("reward_heads", "mean"), "coef": cell.options.get("reward_heads_coef", 1.0)}
    scorer.combine = partial(combine_heads, **rule)
    judge.reward_model = scorer
    return judge


def measure(cell: Cell) -> dict[str, Any]:
    """Measure the policy at each sixth of the run. Its own score is in deviations of the SFT policy's."""
    judge = own_judge(cell)
    _, _, start = judge.sample(judge.sft, max(cell.world.samples), seed=0)
    mean, deviation, path = start["proxy"].mean(), start["proxy"].std(), []
    for step in range(EVERY, cell.world.steps + 1, EVERY):
        policy = load_policy(str(cell.folder / "run" / f"checkpoint-{step}"), dtype=cell.world.dtype).eval()
        figures = judge.measure(policy, cell.world.samples[step == cell.world.steps], start["gold"])
        path.append({"step": step, **figures, "proxy": float((figures["proxy"] - mean) / deviation)})
    return {"sft": {"gold": float(start["gold"].mean()), "proxy": 0.0}, "path": path}


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("runs", "over_optimization"))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    args = parser.parse_args()
    root = args.directory.resolve()
    (root / WORLD.name / "bases").mkdir(parents=True, exist_ok=True)
    cells = [Cell(WORLD, VARIANTS[name], 0, seed, root) for seed in args.seeds for name in args.variants]
    for cell in cells:
        build_base(cell, None, None)
    run_cells(cells, jobs=1, build=build, measure=measure)
    found: dict[str, dict[int, Any]] = {name: {} for name in args.variants}
    for cell in cells:
        if (result := cell.result()) is not None:
            found[cell.method.name][cell.seed] = result
    write_report(root, {name: results for name, results in found.items() if results})


if __name__ == "__main__":
    quiet_start()
    main()
