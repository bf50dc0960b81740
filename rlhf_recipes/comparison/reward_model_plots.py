"""Draw the plots of an evaluation of reward models."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot as plt

from rlhf_recipes.evaluation.evaluated_models import Evaluation

matplotlib.use("Agg")
# After the palette of Okabe and Ito, which people with common colour blindnesses can distinguish.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P")
DPI = 110


def _style(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "markersize": 5}


def _saved(figure: Any, output: Path) -> Path:
    figure.savefig(output, dpi=DPI)
    plt.close(figure)
    return output


def plot_calibration(evaluation: Evaluation, output: Path) -> Path:
    """Draw the share of pairs that are ranked right over the predicted probability, and below it how many pairs."""
    figure, (top, below) = plt.subplots(
        2, 1, figsize=(6, 5.6), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    top.plot([0.5, 1], [0.5, 1], color="0.6", linestyle=":", linewidth=1.2, label="right probabilities")
    width = 0.05 / (len(evaluation.models) + 1)
    for number, (name, model) in enumerate(evaluation.models.items()):
        bins = model.ranking.bins
        x, y = [b.confidence for b in bins], [b.accuracy for b in bins]
        ends = [[b.accuracy - b.low for b in bins], [b.high - b.accuracy for b in bins]]
        top.errorbar(x, y, yerr=ends, linewidth=1.5, elinewidth=1, capsize=2, label=name, **_style(number))
        edges = [0.5 + 0.05 * int(min((b.confidence - 0.5) * 20, 9)) for b in bins]
        places = [edge + width * (number + 1) for edge in edges]
        below.bar(places, [b.pairs for b in bins], width=width, color=_style(number)["color"])
    top.set_ylabel("share of pairs ranked right")
    top.set_ylim(-0.02, 1.02)
    top.legend(frameon=False, fontsize=9, loc="lower right")
    below.set_ylabel("pairs")
    below.set_xlabel("predicted probability, sigmoid of the difference in score")
    for axis in (top, below):
        axis.grid(alpha=0.3)
    return _saved(figure, output)


def plot_categories(evaluation: Evaluation, output: Path) -> Path:
    """Draw the accuracy of each reward model in each category, with its interval."""
    first = next(iter(evaluation.models.values()))
    categories, count = list(first.ranking.by_category), len(evaluation.models)
    figure, axis = plt.subplots(figsize=(6.5, 1.4 + len(categories) * (0.2 + 0.16 * count)), layout="constrained")
    for number, (name, model) in enumerate(evaluation.models.items()):
        places = [row + (number - (count - 1) / 2) * 0.8 / (count + 1) for row in range(len(categories))]
        points = [
            [model.metrics.get(f"category/{category}/accuracy{end}", float("nan")) for end in ("", "_low", "_high")]
            for category in categories
        ]
        ends = [[mean - low for mean, low, _ in points], [high - mean for mean, _, high in points]]
        axis.errorbar(
            [mean for mean, _, _ in points],
            places,
            xerr=ends,
            linestyle="none",
            capsize=2,
            label=name,
            **_style(number),
        )
    axis.set_yticks(range(len(categories)), categories)
    axis.invert_yaxis()
    axis.set_xlabel("accuracy, with its 95 % interval")
    axis.set_xlim(-0.02, 1.03)
    axis.grid(alpha=0.3, axis="x")
    figure.legend(frameon=False, fontsize=9, loc="outside upper center", ncols=2)
    return _saved(figure, output)


def plot_best_of(evaluation: Evaluation, judge: str, output: Path) -> Path:
    """Draw the judged score of the best of n answers over n, for each reward model and for the judge's own choice."""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    curves = {name: model.curves[judge] for name, model in evaluation.models.items()}
    for number, (name, curve) in enumerate(curves.items()):
        sizes = list(curve.values)
        points = [[curve.metrics[f"best_of_{n}/{judge}{end}"] for end in ("", "_low", "_high")] for n in sizes]
        axis.plot(sizes, [mean for mean, _, _ in points], linewidth=1.5, label=name, **_style(number))
        lows, highs = [low for _, low, _ in points], [high for _, _, high in points]
        axis.fill_between(sizes, lows, highs, color=_style(number)["color"], alpha=0.15, linewidth=0)
    own = evaluation.best[judge]
    sizes = list(own.values)
    best = [own.metrics[f"best_of_{n}/{judge}"] for n in sizes]
    axis.plot(sizes, best, color="0.5", linestyle="--", linewidth=1.2, label=f"chosen by {judge} itself")
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [str(n) for n in sizes])
    axis.set_xlabel("n answers to choose from")
    axis.set_ylabel(f"mean score by {judge}")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=9)
    return _saved(figure, output)
