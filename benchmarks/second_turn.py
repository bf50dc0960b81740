"""Turn the loop a second time: does a reward model learn more from answers of the policy that it has trained?

    python benchmarks/second_turn.py --directory runs/second-turn
    python benchmarks/second_turn.py --seeds 0 1 --arms policy-pairs sft-pairs

World of the quickstart. Each seed has its own SFT policy, preferences and reward model, as in `benchmarks/league.py`.
Turn 1 is PPO as the quickstart has it, for the 60 steps of the league. The other runs differ in one thing:

- `policy-pairs`: the policy of turn 1 answers the training prompts, the gold score labels the pairs with the noise of
  turn 1's pairs, and a new reward model learns from old and new pairs. PPO starts again from the SFT policy.
- `sft-pairs`: the same with as many new pairs of the SFT policy. This is the gain of more data alone.
- `going-on`: PPO with the reward model of `policy-pairs` starts from the policy of turn 1, which is its reference too.
- `policy-pairs-only`: the reward model learns from the new pairs of the policy alone.
- `twice-as-long`: turn 1 for twice the steps.

A run whose `result.json` exists is not repeated. Writes `second_turn.json` and `second_turn.md`.
"""

import argparse
import json
import multiprocessing
import os
import runpy
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import Dataset, concatenate_datasets
from instruction_base import RECIPES
from league import Cell, Judge, build_base, run_cell
from league_methods import METHODS, WORLDS, Method
from league_report import gold_at
from paired_differences import INTERVALS, as_cell, paired_difference

from rlhf_recipes.console import quiet_start
from rlhf_recipes.data.prompts import add_separator
from rlhf_recipes.evaluation.policies import eos_token_ids, sample_answers
from rlhf_recipes.models.loading import load_policy, load_tokenizer
from rlhf_recipes.quickstart.build import sample_preferences
from rlhf_recipes.quickstart.worlds import WORLDS as BUILT
from rlhf_recipes.rewards.scorer import RewardModelScorer

TURN_1, NEW_PAIRS = "turn-1", 1_600
WORLD = replace(
    WORLDS["quickstart"], name="second-turn", samples=(1, 8), options={"check_numerics": False, "tracking": False}
)
STEPS = WORLD.steps


@dataclass(frozen=True)
class Arm:
    """A second run.

    Args:
        answers: Policy whose new pairs the reward model learns from; "" for turn 1's reward model.
        keeps_old: Whether the reward model learns from the old pairs too.
        goes_on: Whether the run starts from the policy of turn 1.
        steps: Optimiser steps.
    """

    answers: str = ""
    keeps_old: bool = True
    goes_on: bool = False
    steps: int = STEPS


ARMS = {
    TURN_1: Arm(),
    "policy-pairs": Arm("policy"),
    "sft-pairs": Arm("sft"),
    "twice-as-long": Arm(steps=2 * STEPS),
    "going-on": Arm("policy", goes_on=True),
    "policy-pairs-only": Arm("policy", keeps_old=False),
}


def cell_of(name: str, seed: int, root: Path) -> Cell:
    """Return the run of an arm as a cell of the league, which can be sent to another process."""
    arm, first = ARMS[name], root / WORLD.name / f"{TURN_1}-0" / f"seed-{seed}"
    options: dict[str, Any] = {"run_name": f"{name}-{seed}"}
    if arm.answers:
        options |= {"reward_model_path": str(reward_model_of(arm, seed, root))}
        options |= {"critic_dataset_name": str(pairs_of(arm, seed, root))}
    if arm.goes_on:
        options["model_name_or_path"] = str(first / "run" / f"checkpoint-{STEPS}")
    if arm.steps > STEPS:
        # A resumed run saves as often as the run of its checkpoint, and the checkpoints of turn 1 are measured too.
        options |= {"resume_from_checkpoint": True, "save_total_limit": 8}
    method: Method = replace(METHODS["ppo"], name=name, settings=[options])
    return Cell(replace(WORLD, steps=arm.steps), method, 0, seed, root)


def pairs_of(arm: Arm, seed: int, root: Path) -> Path:
    """Return the folder of the pairs that an arm's reward model learns from."""
    kept = "old-and-" if arm.keeps_old else ""
    return root / WORLD.name / "pairs" / f"{kept}{arm.answers}" / f"seed-{seed}"


def reward_model_of(arm: Arm, seed: int, root: Path) -> Path:
    """Return the folder of an arm's reward model."""
    base = cell_of(TURN_1, seed, root).base
    return pairs_of(arm, seed, root).parent / f"reward-model-{seed}" if arm.answers else base / "reward_modeling"


def write_pairs(arm: Arm, seed: int, root: Path) -> None:
    """Let a policy answer the training prompts twice, and write the labelled pairs beside the old ones."""
    first, folder = cell_of(TURN_1, seed, root), pairs_of(arm, seed, root)
    path = {"sft": first.base / "sft", "policy": first.folder / "run" / f"checkpoint-{STEPS}"}[arm.answers]
    tokenizer = load_tokenizer(str(first.base / "sft"), padding_side="left")
    asked = Dataset.from_json(str(first.base / "prompts" / "train.jsonl"))["prompt"]
    asked = [asked[number % len(asked)] for number in range(NEW_PAIRS)]
    given = [*add_separator(Dataset.from_dict({"prompt": asked}), WORLD.separator)["prompt"]] * 2
    torch.manual_seed(100 + seed)  # with the seed of turn 1, the SFT policy would write the old pairs again
    length = WORLD.max_completion_length
    _, texts, _ = sample_answers(
        load_policy(str(path)).eval(), tokenizer, given, max_completion_length=length, batch_size=128
    )
    noise = BUILT["quickstart"].label_noise
    pairs = sample_preferences(asked, texts[:NEW_PAIRS], texts[NEW_PAIRS:], WORLD.gold, noise, seed=100 + seed)
    if arm.keeps_old:
        old = Dataset.from_json(str(first.base / "preferences" / "train.jsonl"))
        pairs = concatenate_datasets([old, pairs])
    folder.mkdir(parents=True)
    shutil.copy(first.base / "preferences" / "test.jsonl", folder)
    pairs.to_json(str(folder / "train.jsonl"))


def train_reward_model(arm: Arm, seed: int, root: Path) -> None:
    """Train the reward model of an arm from the SFT weights, as the quickstart does."""
    target, scratch = reward_model_of(arm, seed, root), pairs_of(arm, seed, root).parent / f"training-{seed}"
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.rmtree(pairs_of(arm, seed, root), ignore_errors=True)
    write_pairs(arm, seed, root)
    options = yaml.safe_load((RECIPES / "configs" / "quickstart" / "reward_modeling.yaml").read_text(encoding="utf-8"))
    options |= {"model_name_or_path": str(cell_of(TURN_1, seed, root).base / "sft"), "seed": seed, "tracking": False}
    options |= {"dataset_name": str(pairs_of(arm, seed, root)), "output_dir": str(scratch)}
    config = target.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(options), encoding="utf-8")
    sys.argv = ["reward_modeling.py", "--config", str(config)]
    runpy.run_path(str(RECIPES / "reward_modeling.py"), run_name="__main__")
    scratch.rename(target)


def make_reward_model(name: str, seed: int, root: Path) -> None:
    """Train the reward model of an arm, if it has one that is not there; its output goes into a file."""
    arm, target = ARMS[name], reward_model_of(ARMS[name], seed, root)
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".log").open("w", encoding="utf-8") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        torch.set_num_threads(1)
        quiet_start()
        train_reward_model(arm, seed, root)


def run_arm(name: str, seed: int, root: Path) -> str:
    """Train and measure one run, and what its reward model knows."""
    cell = cell_of(name, seed, root)
    first = cell_of(TURN_1, seed, root).folder / "run"
    if ARMS[name].steps > STEPS and not (cell.folder / "run").exists():
        for step in (STEPS // 2, STEPS):
            shutil.copytree(first / f"checkpoint-{step}", cell.folder / "run" / f"checkpoint-{step}")
    return run_cell(cell, keeps_run=name == TURN_1)


def accuracies(name: str, seed: int, root: Path, count: int = 4) -> str:
    """Measure how often a reward model ranks two answers to a held-out prompt as the gold score does.

    Answers with the same gold score do not count.
    """
    first = cell_of(TURN_1, seed, root)
    file = reward_model_of(ARMS[name], seed, root).parent / f"accuracy-{name}-{seed}.json"
    if file.exists():
        return ""
    torch.set_num_threads(1)
    judge = Judge(first.world, first.base)
    scorer = RewardModelScorer.from_pretrained(str(reward_model_of(ARMS[name], seed, root)))
    scorer.policy_eos_token_ids = eos_token_ids(judge.sft, judge.tokenizer)
    judge.reward_model, scorer.batch_size = scorer, 64
    policy = load_policy(str(first.folder / "run" / f"checkpoint-{STEPS}")).eval()
    found = {}
    for of, model in (("sft", judge.sft), ("policy", policy)):
        _, _, figures = judge.sample(model, count, seed=2)
        gaps = [(x[:, :, None] - x[:, None, :])[figures_differ(figures["gold"])] for x in judged(figures)]
        found[of] = float(np.mean(np.sign(gaps[0]) == np.sign(gaps[1])))
    file.write_text(json.dumps(found) + "\n", encoding="utf-8")
    return f"{name} {seed}: ranks {found['sft']:.3f} of SFT's pairs, {found['policy']:.3f} of turn 1's"


def judged(figures: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the gold scores and those of the reward model, `(prompts, count)` each."""
    return figures["gold"], figures["proxy"]


def figures_differ(gold: np.ndarray) -> np.ndarray:
    """Return which pairs of answers to a prompt differ in their gold score, `(prompts, count, count)`."""
    return gold[:, :, None] != gold[:, None, :]


def report(names: list[str], seeds: list[int], root: Path) -> None:
    """Write the figures of all runs that have ended, and their differences from turn 1 and from `sft-pairs`."""
    rows: dict[str, dict[int, dict[str, float]]] = {}
    for name in names:
        found = {seed: result for seed in seeds if (result := cell_of(name, seed, root).result()) is not None}
        rows[name] = {seed: row_of(name, seed, result, root) for seed, result in found.items()}
    columns = ["gold", "kl", "win_rate", *(f"gold@{kl:g}" for kl in WORLD.budgets), "proxy", "length", "sft", "policy"]
    lines = ["| run | n | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for name, by_seed in rows.items():
        means = [f"{np.mean([row.get(c, np.nan) for row in by_seed.values()]):.3f}" for c in columns if by_seed]
        lines.append(f"| {name} | {len(by_seed)} | {' | '.join(means)} |")
    for other in (TURN_1, "sft-pairs", "twice-as-long"):
        lines += ["", f"Differences from {other}, {INTERVALS}:", ""]
        lines += ["| run | n | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
        for name in (name for name in names if name != other):
            seeds_of = sorted(rows[name].keys() & rows.get(other, {}).keys())
            if seeds_of:
                cells = [difference([(rows[name][s], rows[other][s]) for s in seeds_of], c) for c in columns]
                lines.append(f"| {name} | {len(seeds_of)} | {' | '.join(cells)} |")
    (root / WORLD.name / "second_turn.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (root / WORLD.name / "second_turn.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
    print("\n".join(lines))


def row_of(name: str, seed: int, result: dict[str, Any], root: Path) -> dict[str, float]:
    """Return the figures of one run. A run that goes on has the path of turn 1 before its own."""
    first = cell_of(TURN_1, seed, root).result()
    before = first["path"] if ARMS[name].goes_on and first else []
    path = {"sft": result["sft"], "path": [*before, *result["path"]]}
    file = reward_model_of(ARMS[name], seed, root).parent / f"accuracy-{name}-{seed}.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    at = {f"gold@{kl:g}": gold_at(path, kl) for kl in WORLD.budgets}
    return {**known, **at, **{key: result["path"][-1][key] for key in ("gold", "kl", "win_rate", "proxy", "length")}}


def difference(pairs: list[tuple[dict[str, float], dict[str, float]]], column: str) -> str:
    """Return a mean paired difference with its interval; "" where a figure is missing."""
    if any(column not in row for pair in pairs for row in pair):
        return ""
    return as_cell(paired_difference(*([row[column] for row in side] for side in zip(*pairs, strict=True))))


def in_child(function: Any, *arguments: Any) -> Any:
    """Run a function in a forked process, so that nothing of a recipe stays in this one."""
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        return pool.apply(function, arguments)


def main() -> None:
    """Run what has no result yet, one run at a time, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="runs; turn 1 is always one")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--directory", type=Path, default=Path("runs", "second-turn"))
    args = parser.parse_args()
    root, names = args.directory.resolve(), list(dict.fromkeys([TURN_1, *args.arms]))
    (root / WORLD.name / "bases").mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for name in names:
            cell = cell_of(name, seed, root)
            build_base(cell, None, None)
            if cell.result() is None:
                in_child(make_reward_model, name, seed, root)
                print(in_child(run_arm, name, seed, root), flush=True)
            print(in_child(accuracies, name, seed, root), flush=True)
    report(names, args.seeds, root)


if __name__ == "__main__":
    quiet_start()
    main()
