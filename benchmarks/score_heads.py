"""Measure what several score heads of a reward model know about its errors, and what they cost.

    python benchmarks/score_heads.py --bases runs/over_optimization/over_optimization/bases --seeds 0 1 2

The bases are those of `benchmarks/over_optimization.py`. Two ways to let heads differ: each learns from half of the
pairs, or all learn from all pairs and differ only by their start. Both are compared on the held-out pairs: accuracy of
their mean, and whether the mean is more often wrong where the heads disagree. The cost is the CPU time of a scoring
pass with five heads, divided by that with one, in turns. Prints two tables.
"""

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from instruction_base import RECIPES
from trl import ScriptArguments

from rlhf_recipes import RewardModelConfig, RewardModelTrainer
from rlhf_recipes.console import quiet_start
from rlhf_recipes.data.loading import load_split
from rlhf_recipes.rewards.scorer import RewardModelScorer

OWN = ("model_name_or_path", "dataset_name", "overwrite")  # options of the recipe, not of the trainer


def train_heads(base: Path, folder: Path, heads: int, *, all_pairs: bool = False, seed: int = 42) -> None:
    """Train a reward model with the options of the quickstart, and write it with its card.

    Args:
        base: Folder of an SFT policy and preferences.
        folder: Folder of the reward model.
        heads: Number of its heads.
        all_pairs: Whether each head learns from all pairs, and not from half of them.
        seed: Seed.
    """
    options = yaml.safe_load((RECIPES / "configs/quickstart/reward_modeling.yaml").read_text(encoding="utf-8"))
    options = {name: value for name, value in options.items() if name not in OWN}
    options |= {"output_dir": str(folder), "score_heads": heads, "seed": seed, "report_to": "none"}
    data = ScriptArguments(dataset_name=str(base / "preferences"))
    splits = {f"{name}_dataset": load_split(data, split) for name, split in (("train", "train"), ("eval", "test"))}
    trainer = RewardModelTrainer(str(base / "sft"), args=RewardModelConfig(**options), **splits)
    if all_pairs and heads > 1:
        trainer.data_collator = trainer.data_collator.collator  # deals no pairs
    trainer.train()
    trainer.save_model()
    trainer.evaluate()
    trainer.save_card()


def held_out_pairs(scorer: RewardModelScorer, base: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Return the tokens of the chosen and of the rejected answers of the held-out pairs."""
    rows = [json.loads(line) for line in (base / "preferences/test.jsonl").read_text(encoding="utf-8").splitlines()]
    prompts = [f"{row['prompt']}{scorer.card.response_separator}" for row in rows]
    chosen, rejected = ([row[name] for row in rows] for name in ("chosen", "rejected"))
    ended = [True] * len(rows)
    return scorer.token_ids(prompts, chosen, ended), scorer.token_ids(prompts, rejected, ended)


def margins(scorer: RewardModelScorer, base: Path) -> np.ndarray:
    """Return the margin of each held-out pair by each head, `(N, K)`."""
    chosen, rejected = map(scorer.head_scores, held_out_pairs(scorer, base))
    return (chosen - rejected).double().numpy()


def figures(found: np.ndarray) -> dict[str, float]:
    """Return accuracy, disagreement, and how both the deviation of a pair and its mean margin point at errors.

    An area of .5 is chance: the probability that a wrong pair has the larger deviation, or the smaller margin, than a
    right one. The doubt of a pair is its deviation divided by the size of its mean margin.
    """
    mean, deviation = found.mean(axis=1), found.std(axis=1, ddof=1)
    wrong = mean <= 0
    return {
        "accuracy": float(1 - wrong.mean()),
        "disagreement / |margin|": float(deviation.mean() / np.abs(mean).mean()),
        "AUC of disagreement": area(deviation, wrong),
        "AUC of small margin": area(-np.abs(mean), wrong),
        "AUC of disagreement / margin": area(deviation / np.maximum(np.abs(mean), 1e-9), wrong),
        "accuracy, unanimous": float((mean > 0)[alike(found)].mean()),
        "accuracy, divided": float((mean > 0)[~alike(found)].mean()) if (~alike(found)).any() else float("nan"),
        "unanimous": float(alike(found).mean()),
    }


def alike(found: np.ndarray) -> np.ndarray:
    """Return which pairs all heads rank alike."""
    return np.abs(np.sign(found).sum(axis=1)) == found.shape[1]


def area(doubt: np.ndarray, wrong: np.ndarray) -> float:
    """Return the probability that a wrong pair has more doubt than a right one; half for a tie."""
    differences = doubt[wrong][:, None] - doubt[~wrong][None, :]
    return float((differences > 0).mean() + (differences == 0).mean() / 2)


def cost(one: RewardModelScorer, several: RewardModelScorer, base: Path, rounds: int = 15) -> list[float]:
    """Return the CPU time of a scoring pass with several heads, divided by that with one, for each round."""
    token_ids, _ = held_out_pairs(one, base)
    ratios = []
    for number in range(rounds + 1):
        order = [one, several] if number % 2 else [several, one]
        spent = {}
        for scorer in order:
            start = time.process_time()
            scorer.score_token_ids(token_ids)
            spent[id(scorer)] = time.process_time() - start
        ratios.append(spent[id(several)] / spent[id(one)])
    return ratios[1:]  # the first round warms up


def table(rows: list[dict[str, Any]]) -> str:
    """Return rows as a table."""
    lines = [f"| {' | '.join(rows[0])} |", "|" + "---|" * len(rows[0])]
    texts = ([f"{x:.3f}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows)
    return "\n".join([*lines, *(f"| {' | '.join(each)} |" for each in texts)])


def main() -> None:
    """Train what is missing, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", type=Path, required=True, help="folder with `seed-0`, `seed-1`, ..")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--heads", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, ratios = [], []
    for seed, all_pairs in itertools.product(args.seeds, (False, True)):
        base = args.bases / f"seed-{seed}"
        folder = base / ("score_heads_all_pairs" if all_pairs else "score_heads")
        if not folder.exists():
            train_heads(base, folder, args.heads, all_pairs=all_pairs, seed=seed)
        scorer = RewardModelScorer.from_pretrained(str(folder))
        scorer.batch_size = 64
        rows.append({"seed": seed, "pairs": "all" if all_pairs else "half", **figures(margins(scorer, base))})
        if not all_pairs:
            one = RewardModelScorer.from_pretrained(str(base / "reward_modeling"))
            one.batch_size = 64
            ratios += cost(one, scorer, base)
    print(table(rows))
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    print(f"\nCPU time of {args.heads} heads / one head: median {middle:.3f}, quartiles {low:.3f} and {high:.3f}")


if __name__ == "__main__":
    quiet_start()
    main()
