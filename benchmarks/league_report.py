"""The table and the picture of the league."""

import json
import os
import platform
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

from rlhf_recipes.algorithm.best_of_n import best_of_n_kl_bound
from rlhf_recipes.evaluation.statistics import mean_gain

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

Results = dict[str, dict[int, dict[str, Any]]]  # by method and seed
RIVAL = "rloo"


def gold_at(result: dict[str, Any], budget: float) -> float:
    """Return the gold score that a run has when its KL is `budget` nats for the last time.

    The path is linear in the square root of the KL between the points where it was measured, and starts at the SFT
    policy. A run that ends below the budget counts with its end.
    """
    points = [(0.0, result["sft"]["gold"]), *((max(x["kl"], 0.0), x["gold"]) for x in result["path"])]
    if points[-1][0] <= budget:
        return float(points[-1][1])
    segments = list(zip(points, points[1:], strict=False))
    (kl, gold), (next_kl, next_gold) = next(pair for pair in reversed(segments) if pair[0][0] <= budget < pair[1][0])
    share = (budget**0.5 - kl**0.5) / (next_kl**0.5 - kl**0.5)
    return float(gold + share * (next_gold - gold))


def figures(result: dict[str, Any], budgets: tuple[float, ...]) -> dict[str, float]:
    """Return the figures of one run by name."""
    end = result["path"][-1]
    at = {f"gold@{budget:g}": gold_at(result, budget) for budget in budgets}
    names = ("gold", "kl", "proxy", "win_rate", "length")
    return {name: end[name] for name in names} | at | {"cpu_seconds": result["cpu_seconds"]}


def best_policies(base: dict[str, Any]) -> list[tuple[float, float]]:
    """Return KL and gold score of the policies that have the most reward for their KL, for several prices of a nat.

    With r the score that is trained on, such a policy is proportional to pi_SFT(y) exp(r(y) / price). The SFT policy's
    answers, weighted by the softmax of r / price for each prompt, are a sample of it. Of N answers to a prompt about
    N / exp(KL) count, and with few of them the estimate is too low. See `known_part`.
    """
    proxy, gold = (np.asarray(base[name], dtype=float) for name in ("proxy", "gold"))
    points = []
    for price in proxy.std(axis=1).mean() * np.geomspace(8, 0.25, 21):
        odds = np.exp((proxy - proxy.max(axis=1, keepdims=True)) / price)
        weights = odds / odds.sum(axis=1, keepdims=True)
        kl = np.sum(weights * np.log(np.maximum(weights * proxy.shape[1], 1e-300)), axis=1)
        points.append((float(kl.mean()), float(np.sum(weights * gold, axis=1).mean())))
    return points


def known_part(points: list[list[float]], answers: int) -> list[list[float]]:
    """Return the points of a curve of `best_policies` that at least eight of the answers to a prompt decide."""
    return [point for point in points if answers / np.exp(point[0]) >= 8]


def write_report(folder: Path, world: Any, results: Results, bases: list[Any], settings: dict[str, Any]) -> None:
    """Write `league.json`, `league.md` and `league.png`.

    Args:
        folder: Folder that gets them.
        world: World.
        results: Results by method and seed.
        bases: What the SFT policy's answers score, for each seed.
        settings: Chosen setting by method.
    """
    rows = {
        method: {seed: figures(result, world.budgets) for seed, result in by_seed.items()}
        for method, by_seed in results.items()
        if by_seed
    }
    best_of = {int(n): float(np.mean([base["best_of"][n] for base in bases])) for n in bases[0]["best_of"]}
    curve = np.mean([best_policies(base) for base in bases], axis=0).tolist()
    best = [[0.0, best_of[1]], *known_part(curve, answers=len(bases[0]["proxy"][0]))]
    content = {"settings": settings, "rows": rows, "best_of": best_of, "best_policies": best}
    (folder / "league.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    at = {budget: float(np.interp(budget, *zip(*best, strict=True), right=np.nan)) for budget in world.budgets}
    text = table(rows, world.budgets, best_of, at, settings)
    (folder / "league.md").write_text(text, encoding="utf-8")
    print(text)
    draw(folder / "league.png", results, best_of, best)


def table(
    rows: Any,
    budgets: tuple[float, ...],
    best_of: dict[int, float],
    best: dict[float, float],
    settings: dict[str, Any],
) -> str:
    """Return the table, with paired differences from the rival."""
    columns = [f"gold@{budget:g}" for budget in budgets]
    head = ["method", "n", "held-out gold ± sd", "KL", "win rate", *columns, "reward model", "length", "CPU s"]
    compared = ["gold", *columns, "proxy"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for method, by_seed in rows.items():
        mean = {name: float(np.mean([row[name] for row in by_seed.values()])) for name in next(iter(by_seed.values()))}
        spread = float(np.std([row["gold"] for row in by_seed.values()], ddof=min(1, len(by_seed) - 1)))
        cells = [method, str(len(by_seed)), f"{mean['gold']:.2f} ± {spread:.2f}", f"{mean['kl']:.2f}"]
        cells += [f"{mean['win_rate']:.2f}", *(f"{mean[name]:.2f}" for name in columns)]
        cells += [f"{mean['proxy']:.2f}", f"{mean['length']:.0f}", f"{mean['cpu_seconds']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"Paired differences from {RIVAL} over seeds, with 95 % bootstrap intervals:", ""]
    lines += [f"| method | {' | '.join(compared)} |", "|---" + "|---" * len(compared) + "|"]
    for method, by_seed in rows.items():
        if method == RIVAL or RIVAL not in rows:
            continue
        cells = []
        for name in compared:
            seeds = sorted(by_seed.keys() & rows[RIVAL].keys())
            gain = mean_gain(*([rows[each][seed][name] for seed in seeds] for each in (method, RIVAL)))
            cells.append(f"{gain['gain']:+.2f} [{gain['gain_low']:+.2f}, {gain['gain_high']:+.2f}]")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    curve = ", ".join(f"{gold:.2f} @ {best_of_n_kl_bound(n):.2f}" for n, gold in best_of.items())
    lines += ["", f"Best of {', '.join(map(str, best_of))}: gold @ bound of the KL: {curve}.", ""]
    curve = ", ".join("not known" if np.isnan(gold) else f"{gold:.2f} @ {kl:g}" for kl, gold in best.items())
    lines += [f"Policy with the most reward for its KL, estimated: gold @ KL: {curve}.", ""]
    lines += [
        f"{method}: {', '.join(f'{k} {v}' for k, v in setting.items())}." for method, setting in settings.items()
    ]
    machine = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}, {date.today()}"
    return "\n".join([*lines, "", machine, ""])


def draw(file: Path, results: Results, best_of: dict[int, float], best: list[list[float]]) -> None:
    """Draw gold against KL: each run thin, the mean of a method's runs thick, best of n, and the best policies."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for number, (method, by_seed) in enumerate(results.items()):
        paths = [[(0.0, run["sft"]["gold"]), *((p["kl"], p["gold"]) for p in run["path"])] for run in by_seed.values()]
        kl, gold = np.moveaxis(np.array(paths), 2, 0)  # (seeds, evaluations) each
        kl = np.sqrt(np.maximum(kl, 0))
        axes.plot(kl.T, gold.T, linewidth=0.6, alpha=0.35, color=f"C{number}")
        axes.plot(kl.mean(axis=0), gold.mean(axis=0), marker="o", linewidth=2, color=f"C{number}", label=method)
    line = [np.sqrt(best_of_n_kl_bound(n)) for n in best_of]
    axes.plot(line, list(best_of.values()), color="black", linestyle="--", label="best of n (bound of the KL)")
    axes.plot(*(np.sqrt([kl for kl, _ in best]), [gold for _, gold in best]), color="gray", label="most reward per KL")
    axes.set(xlabel="square root of the KL to the SFT policy (nats)", ylabel="gold score on held-out prompts")
    axes.legend(loc="lower right")
    figure.savefig(file, dpi=90)
