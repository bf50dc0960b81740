"""The table and the picture of the benchmark on over-optimisation."""

import json
import os
import platform
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from league_report import gold_at
from paired_differences import INTERVALS, as_cell, paired_difference

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

Results = dict[str, dict[int, dict[str, Any]]]  # by variant and seed
RIVAL = "single"
BUDGETS = (2.0, 4.0)  # nats
COMPARED = ("gold, best", "KL at the best", *(f"gold@{budget:g}" for budget in BUDGETS), "gold, end", "KL, end")


def path_of(result: dict[str, Any]) -> list[dict[str, float]]:
    """Return the points of a run, with the SFT policy at its start."""
    return [{"kl": 0.0, **result["sft"]}, *result["path"]]


def figures(result: dict[str, Any]) -> dict[str, float]:
    """Return the figures of one run by name. The best point is that with the highest gold score."""
    path = path_of(result)
    best, end = max(path, key=lambda point: point["gold"]), path[-1]
    return {
        "gold, best": best["gold"],
        "KL at the best": best["kl"],
        **{f"gold@{budget:g}": gold_at(result, budget) for budget in BUDGETS},
        "gold, end": end["gold"],
        "KL, end": end["kl"],
        "own score, end": end["proxy"],
    }


def write_report(folder: Path, results: Results) -> None:
    """Write `over_optimization.json`, `.md` and `.png`."""
    rows = {name: {seed: figures(each) for seed, each in by_seed.items()} for name, by_seed in results.items()}
    (folder / "over_optimization.json").write_text(json.dumps({"rows": rows, "runs": results}, indent=1) + "\n")
    text = table(rows)
    (folder / "over_optimization.md").write_text(text, encoding="utf-8")
    print(text)
    draw(folder / "over_optimization.png", results)


def table(rows: dict[str, dict[int, dict[str, float]]]) -> str:
    """Return the means, and the paired differences from the single head with their intervals over seeds."""
    names = list(next(iter(next(iter(rows.values())).values())))
    lines = [f"| variant | n | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
    for variant, by_seed in rows.items():
        means = (float(np.mean([row[name] for row in by_seed.values()])) for name in names)
        lines.append(f"| {variant} | {len(by_seed)} | {' | '.join(f'{x:.2f}' for x in means)} |")
    compared = [name for name in rows if name != RIVAL and len(rows[name].keys() & rows.get(RIVAL, {}).keys()) > 1]
    lines += ["", f"Paired differences from `{RIVAL}` of variants with several seeds, {INTERVALS}:", ""]
    lines.append(f"| variant | {' | '.join(COMPARED)} |")
    lines.append("|---" * (1 + len(COMPARED)) + "|")
    for variant in compared:
        seeds = sorted(rows[variant].keys() & rows[RIVAL].keys())
        pairs = ([[rows[each][seed][name] for seed in seeds] for each in (variant, RIVAL)] for name in COMPARED)
        lines.append(f"| {variant} | {' | '.join(as_cell(paired_difference(*pair), 2) for pair in pairs)} |")
    machine = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}, {date.today()}"
    return "\n".join([*lines, "", machine, ""])


def draw(file: Path, results: Results) -> None:
    """Draw gold and own score against KL: each run thin, the mean of a variant's runs thick."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for number, (variant, by_seed) in enumerate(results.items()):
        paths = [path_of(result) for result in by_seed.values()]
        kl = np.sqrt(np.maximum([[point["kl"] for point in path] for path in paths], 0))
        for place, name in zip(axes, ("gold", "proxy"), strict=True):
            values = np.array([[point[name] for point in path] for path in paths])
            place.plot(kl.T, values.T, linewidth=0.6, alpha=0.35, color=f"C{number}")
            means = (kl.mean(axis=0), values.mean(axis=0))
            place.plot(*means, marker="o", linewidth=2, color=f"C{number}", label=variant)
    axes[0].set(ylabel="gold score on held-out prompts")
    axes[1].set(ylabel="its own reward model's score (SFT deviations)")
    for place in axes:
        place.set(xlabel="square root of the KL to the SFT policy (nats)")
    axes[0].legend(loc="best")
    figure.savefig(file, dpi=90)
