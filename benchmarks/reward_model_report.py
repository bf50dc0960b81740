"""The table and the calibration plot of the comparison of reward models."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from paired_differences import INTERVALS, as_cell, paired_difference
from scipy.optimize import minimize_scalar

from rlhf_recipes.evaluation.statistics import preference_metrics

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

Results = dict[str, dict[int, dict[str, Any]]]  # by method and seed
COLUMNS = ("accuracy", "length_correlation", "calibration_error", "calibration_slope", "best_gold", "best_words")
BINS = np.linspace(0.5, 1, 6)


def figures(result: dict[str, Any]) -> dict[str, float]:
    """Return the figures of a run."""
    pairs = (result[name] for name in ("chosen", "rejected", "chosen_lengths", "rejected_lengths"))
    both = result | preference_metrics(*pairs)
    both["calibration_slope"] = calibration_slope(np.subtract(result["chosen"], result["rejected"]))
    return {name: both[name] for name in COLUMNS if name in both}


def calibration_slope(gaps: np.ndarray) -> float:
    """Return the factor of the score gaps that predicts the labels best: 1 is calibrated, less is too sure."""
    return float(minimize_scalar(lambda slope: np.logaddexp(0, -slope * gaps).sum(), bracket=(0, 1)).x)


def write_report(folder: Path, world: str, results: Results, stock: str) -> None:
    """Write the table, with paired differences from stock TRL over the seeds that both have, and the plot."""
    rows = {name: {seed: figures(run) for seed, run in runs.items()} for name, runs in results.items()}
    columns = [name for name in COLUMNS if all(name in row for runs in rows.values() for row in runs.values())]
    lines = [f"| method | seeds | {' | '.join(columns)} |", "|---|---|" + "---|" * len(columns)]
    for method, runs in rows.items():
        cells = [f"{np.mean([row[name] for row in runs.values()]):.3f}" for name in columns]
        lines.append(f"| {method} | {len(runs)} | {' | '.join(cells)} |")
    lines += ["", f"Differences from {stock}, {INTERVALS}:", ""]
    lines += [f"| method | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for method, runs in rows.items():
        if method != stock:
            cells = [difference(runs, rows[stock], name) for name in columns]
            lines.append(f"| {method} | {' | '.join(cells)} |")
    text = "\n".join([*lines, ""])
    (folder / f"{world}.md").write_text(text, encoding="utf-8")
    print(text)
    draw(folder / f"{world}.png", results)


def difference(ours: dict[int, dict[str, float]], theirs: dict[int, dict[str, float]], name: str) -> str:
    """Return the mean paired difference of a figure, with its interval."""
    seeds = sorted(ours.keys() & theirs.keys())
    return as_cell(paired_difference(*([runs[seed][name] for seed in seeds] for runs in (ours, theirs))))


def draw(file: Path, results: Results) -> None:
    """Draw how often a pair is ranked right against what its gap of scores claims, all seeds in one."""
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    axes.plot([0.5, 1], [0.5, 1], color="gray", linestyle="--", label="calibrated")
    for method, runs in results.items():
        gaps = np.concatenate([np.subtract(run["chosen"], run["rejected"]) for run in runs.values()])
        claimed = 1 / (1 + np.exp(-np.abs(gaps)))
        place = np.clip(np.digitize(claimed, BINS) - 1, 0, len(BINS) - 2)
        filled = [index for index in range(len(BINS) - 1) if (place == index).sum() >= 20]
        points = [(claimed[place == index].mean(), (gaps[place == index] > 0).mean()) for index in filled]
        axes.plot(*zip(*points, strict=True), marker="o", label=method)
    axes.set(xlabel="probability that the score gap claims", ylabel="share of pairs in the labelled order")
    figure.legend(loc="outside right upper")
    figure.savefig(file, dpi=90)
    plt.close(figure)
