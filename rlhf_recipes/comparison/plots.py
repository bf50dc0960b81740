"""Draw plots of one training run, and of several runs in comparison."""

import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

matplotlib.use("Agg")
PANELS = {
    "objective/scores": "score (raw)",
    "objective/kl": "KL to reference (nats per completion)",
    "completions/mean_length": "length (tokens)",
    "val/explained_variance": "explained variance of the critic",
}
COMPARED_PANELS = PANELS | {"entropy": "entropy (nats per token)"}
# Five colours that people with common colour blindnesses can distinguish, after the palette of Okabe and Ito. A page
# may replace them, the ink and the grid. More groups differ in line style and marker.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b5508c", "#8a6d00")
INK, GRID = "#1b1b1f", "#b9b9c0"
LINES: tuple[Any, ...] = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P")
STYLE: dict[Any, Any] = {
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "font.size": 9,
    "grid.alpha": 0.5,
    "grid.color": GRID,
    "svg.fonttype": "none",
    "svg.hashsalt": "rlhf_recipes",
    "text.color": INK,
    "text.parse_math": False,  # a dollar in an option is a dollar
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclass(frozen=True)
class RunPath:
    """A run in the plane of KL and score. `group` selects the colour; `held_out` is the point of its evaluation."""

    name: str
    group: int
    path: pd.DataFrame
    held_out: tuple[float, float] | None = None
    failed: bool = False


@dataclass(frozen=True)
class Band:
    """A metric of one group over samples: the smoothed curves, which of them failed, and the band of the others."""

    name: str
    group: int
    curves: list[pd.Series]
    failed: list[bool]
    band: pd.DataFrame


def plot_training(state_file: str | Path, output: str | Path) -> Path:
    """Draw score, KL, length and explained variance over optimiser steps, and evaluations during training as points.

    Args:
        state_file: `trainer_state.json` of a PPO run.
        output: Path of the PNG.

    Returns:
        `output`.
    """
    history = json.loads(Path(state_file).read_text(encoding="utf-8"))["log_history"]
    figure, axes = plt.subplots(2, 2, figsize=(9, 5.5), sharex=True, layout="constrained")
    for axis, (metric, label) in zip(axes.flat, PANELS.items(), strict=True):
        for name, style in ((metric, {}), (f"eval_{metric}", {"marker": "o", "linestyle": ":", "label": "held out"})):
            points = [(entry["step"], entry[name]) for entry in history if name in entry]
            axis.plot(*zip(*points, strict=True) if points else ([], []), linewidth=1.5, **style)
        axis.set_title(label, fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("optimiser step")
    if any("eval_loss" in entry for entry in history):
        axes[0, 0].legend(frameon=False, fontsize=9)
    figure.savefig(output, dpi=110)
    plt.close(figure)
    return Path(output)


def draw_frontier(axis: Axes, paths: list[RunPath], common_kl: float | None) -> None:
    """Draw each run as a path from its start to its labelled end, and its held-out point as a hollow star."""
    ends = []
    for run in paths:
        colour, marker = COLOURS[run.group % len(COLOURS)], MARKERS[run.group % len(MARKERS)]
        kl, score = run.path["kl"].to_numpy(), run.path["score"].to_numpy()
        axis.plot(
            kl, score, color=colour, linestyle=_line(run.group), linewidth=1.4, alpha=0.45 if run.failed else 0.9
        )
        axis.plot(kl[-1:], score[-1:], "x" if run.failed else marker, color=colour, markersize=7)
        ends.append((float(kl[-1]), float(score[-1]), run.name, colour))
        if run.held_out is not None:
            axis.plot(*run.held_out, "*", color=colour, markersize=12, markerfacecolor="none")
    if common_kl is not None:
        axis.axvline(common_kl, color=INK, linewidth=0.8, linestyle=(0, (2, 3)))
    axis.set_xlabel("KL to reference (nats per completion)")
    axis.set_ylabel("score (raw)")
    _label_ends(axis, ends)


def _line(group: int) -> Any:
    return LINES[(group // len(COLOURS)) % len(LINES)]


def _label_ends(axis: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Write the names to the right of the axis in the order of the scores, so that no name hides another."""
    low, high = axis.get_ylim()
    ends = sorted(ends, key=lambda end: end[1])
    wanted = np.array([(score - low) / (high - low) for _, score, *_ in ends])
    gap = min(0.06, 1.0 / max(len(ends), 1))
    places = _spread(wanted, gap)
    for (kl, score, name, colour), place in zip(ends, places, strict=True):
        axis.annotate(
            name,
            xy=(kl, score),
            xytext=(1.03, place),
            textcoords="axes fraction",
            verticalalignment="center",
            color=colour,
            fontweight="bold",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.6},
        )


def _spread(wanted: np.ndarray, gap: float) -> np.ndarray:
    """Return ascending places at least `gap` apart and at most 1, close to the wanted ones."""
    steps = np.arange(len(wanted)) * gap
    return np.minimum(np.maximum.accumulate(wanted - steps) + steps, 1.0 - steps[::-1])


def draw_bands(axis: Axes, bands: list[Band], title: str, x_label: str) -> None:
    """Draw every seed as a thin line, and the mean of each group with its band on top."""
    for group in bands:
        colour, line = COLOURS[group.group % len(COLOURS)], _line(group.group)
        for curve, failed in zip(group.curves, group.failed, strict=True):
            axis.plot(
                curve.index,
                curve,
                color=colour,
                linewidth=1.1 if failed else 0.8,
                alpha=0.8,
                linestyle=":" if failed else line,
            )
            if failed:
                axis.plot(curve.index[-1:], curve[-1:], "x", color=colour, markersize=6)
        band = group.band
        axis.fill_between(band.index, band["low"], band["high"], color=colour, alpha=0.18, linewidth=0)
        axis.plot(band.index, band["mean"], color=colour, linestyle=line, linewidth=1.8, label=group.name)
    axis.set_title(title)
    axis.set_xlabel(x_label)
    axis.margins(x=0.01)


def save_png(draw: list[Callable[[Axes], Any]], legend: list[str], output: Path) -> Path:
    """Draw panels side by side, at most three in a row, with one legend, on a white background.

    Args:
        draw: One function per panel.
        legend: One text per group, in the order of the colours.
        output: Path of the PNG.
    """
    columns = min(len(draw), 3)
    rows = -(-len(draw) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.5 + 4.0 * columns, 0.8 + 3.2 * rows), layout="constrained")
        for number, panel in enumerate(draw):
            panel(figure.add_subplot(rows, columns, number + 1))
        handles = [
            Line2D([], [], color=COLOURS[n % len(COLOURS)], linestyle=_line(n), label=text)
            for n, text in enumerate(legend)
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(legend), 3), frameon=False)
        figure.savefig(output, dpi=120)
    return output


def inline_svg(draw: Callable[[Axes], Any], name: str, size: tuple[float, float]) -> str:
    """Return one panel as an SVG element with a transparent background, for a page.

    Args:
        draw: Function that draws the panel.
        name: Prefix of the ids inside. It must differ between the figures of a page.
        size: Width and height, inches.
    """
    with matplotlib.rc_context(STYLE), io.StringIO() as file:
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_visible(False)
        axis = figure.add_subplot()
        axis.patch.set_visible(False)
        draw(axis)
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        svg = file.getvalue()
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    return svg[svg.index("<svg") :]
