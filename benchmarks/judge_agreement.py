"""Measure how good a judge is, on pairs whose better answer people have chosen.

    python benchmarks/judge_agreement.py --judge judge.yaml --dataset_name DIRECTORY --split eval --pairs 200

Prints the share of pairs on which the judge agrees with itself in both orders, on which it agrees with people (a tie
counts half, with a 95 % bootstrap interval over pairs), and the figures of `docs/judges.md`. Each pair has its answers
in a random order. The answers of the judge are kept in `--output_dir`, so a second run asks nothing.
"""

import argparse
import json

import numpy as np
from trl import ScriptArguments

from rlhf_recipes.console import quiet_start
from rlhf_recipes.data.loading import load_split
from rlhf_recipes.evaluation.statistics import preference_rate
from rlhf_recipes.rewards.language_model_judge import load_judge


def main(judge_file: str, dataset_name: str, split: str, pairs: int, output_dir: str, seed: int) -> dict[str, float]:
    """Return the figures of a judge."""
    rows = load_split(ScriptArguments(dataset_name=dataset_name), split)
    rows = rows.shuffle(seed=seed).select(range(min(pairs, len(rows))))
    chosen_first = np.random.default_rng(seed).random(len(rows)) < 0.5
    sides = [("chosen", "rejected") if first else ("rejected", "chosen") for first in chosen_first]
    judge = load_judge(judge_file, output_dir)
    first, second = ([row[side[place]] for row, side in zip(rows, sides, strict=True)] for place in (0, 1))
    results = np.array(judge.compare(rows["prompt"], first, second))
    for_chosen = np.where(chosen_first, results, 1 - results)
    figures = judge.figures(judge.take_counts())
    agreement = preference_rate(for_chosen, seed=seed)
    figures |= {name.replace("win_rate", "agrees_with_people"): value for name, value in agreement.items()}
    figures["without_a_result"] = float(np.isnan(results).mean())
    figures["decided"] = float(np.isin(results, (0.0, 1.0)).mean())
    decided = for_chosen[np.isin(results, (0.0, 1.0))]
    figures["agrees_where_decided"] = float(decided.mean()) if decided.size else float("nan")
    return figures


if __name__ == "__main__":
    quiet_start()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--judge", required=True, help="YAML file of the judge")
    parser.add_argument("--dataset_name", required=True, help="directory or Hub name with prompt, chosen, rejected")
    parser.add_argument("--split", default="test")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--output_dir", default="runs/judge_agreement", help="directory for the judge's answers")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    measured = main(given.judge, given.dataset_name, given.split, given.pairs, given.output_dir, given.seed)
    print(json.dumps({name: round(value, 3) for name, value in measured.items()}, indent=2))
