"""Describe the figures of the report for plotly.js: one trace per run or group, in colours that the page chooses.

A colour is a variable of the style sheet of the page, like `var(--group2)`. The page puts in the value of its scheme.
"""

import math
from collections.abc import Iterable
from functools import partial
from html import escape
from textwrap import shorten
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from rlhf_recipes.comparison.curves import seed_band, smooth
from rlhf_recipes.comparison.frontier import Frontier
from rlhf_recipes.comparison.groups import Group, all_count_samples, curve_over, run_path
from rlhf_recipes.comparison.head_to_head import WinMatrix
from rlhf_recipes.comparison.plots import PANELS
from rlhf_recipes.comparison.runs import TrackedRun
from rlhf_recipes.comparison.verdict import Verdict

COMPARED_PANELS = PANELS | {"entropy": "entropy (nats per token)"}
STEPS = "optimiser step"
KL_TITLE = "KL to reference (nats per completion)"
# The style sheet has five colours that people with common colour blindnesses can distinguish, after the palette of
# Okabe and Ito. More groups differ in dashes and markers.
NUM_COLOURS = 5
DASHES = ("solid", "dash", "dashdot", "dot")
MARKERS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross")
# A screen shows no more points of a curve, and a page with fewer is smaller.
MAX_POINTS = 250

Trace = dict[str, Any]
Points = TypeVar("Points", pd.Series, pd.DataFrame)


def colour(number: int) -> str:
    """Return the colour of a group by its number."""
    return f"var(--group{number % NUM_COLOURS})"


def dash(number: int) -> str:
    """Return the dashes of a group by its number."""
    return DASHES[number // NUM_COLOURS % len(DASHES)]


def marker(number: int) -> str:
    """Return the marker of a group by its number."""
    return MARKERS[number % len(MARKERS)]


def compared_figures(groups: list[Group], verdict: Verdict) -> list[dict[str, Any]]:
    """Return the figures that have data: the frontier, the held-out win rates, and the curves over training.

    Returns:
        For each figure its `title`, a `text` that says what it shows, and plotly's `data` and `layout`.
    """
    samples = all_count_samples([run for group in groups for run in group.runs])
    x_title = "completions sampled" if samples else STEPS
    figures = [_frontier(groups, verdict), _win_rates(groups, verdict.matrix)]
    figures += [_curves(groups, metric, title, x_title) for metric, title in COMPARED_PANELS.items()]
    return [figure for figure in figures if figure["data"]]


def _figure(title: str, text: str, data: Iterable[Trace], x_title: str, y_title: str) -> dict[str, Any]:
    axes = {"xaxis": {"title": {"text": x_title}}, "yaxis": {"title": {"text": y_title}}}
    return {"title": title, "text": text, "data": list(data), "layout": axes}


def _trace(number: int, x: Any, y: Any, **own: Any) -> Trace:
    """Return a trace of a group, in its colour, dashes and marker."""
    return {
        "type": "scatter",
        "mode": "lines",
        "x": _numbers(x),
        "y": _numbers(y),
        "line": {"color": colour(number), "dash": dash(number), "width": 1.5},
        "marker": {"color": colour(number), "symbol": marker(number), "size": 9},
        **own,
    }


def _numbers(values: Any) -> list[float | None]:
    """Return five digits of each number, and None for one that is not finite."""
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in np.asarray(values, dtype=float)]


def _thin(points: Points) -> Points:
    """Return at most `MAX_POINTS` rows, evenly chosen, with the first and the last."""
    return points.iloc[np.unique(np.linspace(0, len(points) - 1, min(len(points), MAX_POINTS)).round().astype(int))]


def _about(number: int, name: str, label: str, *figures: str) -> dict[str, Any]:
    """Return the group of a trace, for the legend of the page, and the text at the pointer.

    The text is plotly's own small markup, and names come from users, so they are escaped.
    """
    return {
        "name": name,
        "meta": {"group": number, "name": escape(name), "label": escape(shorten(label, 70))},
        "hovertemplate": "<br>".join(["<b>%{meta.name}</b> %{meta.label}", *figures]) + "<extra></extra>",
    }


def _frontier(groups: list[Group], verdict: Verdict) -> dict[str, Any]:
    """Return each run as a path from its start to its marked end, over the frontier as a broad line."""
    traces, ends = _envelope(verdict.frontier), []
    for number, group in enumerate(groups):
        for run in group.runs:
            path = run_path(run)
            if len(path):
                traces += _path(number, group.run_name(run), run, path)
                ends.append(f"{group.run_name(run)} ends at {path['kl'].iloc[-1]:.2f}, {path['score'].iloc[-1]:.2f}")
    text = f"Score over KL, a path per run (KL, score): {'; '.join(ends)}."
    return _figure("Score of the training against KL", text, traces if ends else [], KL_TITLE, "score (raw)")


def _envelope(frontier: Frontier | None) -> list[Trace]:
    if frontier is None:
        return []
    line = {"color": "var(--grid)", "width": 9, "shape": "hv"}
    about = _about(-1, "frontier", "highest mean score of a group", "within KL %{x:.2f}: %{y:.2f}")
    return [_trace(0, frontier.kl, frontier.scores, line=line, opacity=0.6, **about)]


def _path(number: int, name: str, run: TrackedRun, path: pd.DataFrame) -> list[Trace]:
    about = partial(_about, number, name, f"{run.name}{' (failed)' if run.failed else ''}")
    figures = ("KL %{x:.2f} nats", "score %{y:.2f}")
    shown, end = _thin(path), path.iloc[-1:]
    line = {"color": colour(number), "dash": "dot" if run.failed else dash(number), "width": 1.2}
    mark = {"color": colour(number), "symbol": "x" if run.failed else marker(number), "size": 10}
    steps = [int(step) for step in shown.index]
    traces = [
        _trace(
            number, shown["kl"], shown["score"], line=line, customdata=steps, **about(*figures, "step %{customdata}")
        ),
        _trace(number, end["kl"], end["score"], mode="markers", marker=mark, **about(*figures, "end")),
    ]
    evaluation = run.evaluation.metrics if run.evaluation else {}
    if "policy/kl" in evaluation and "reward_model/policy" in evaluation:
        star = {"color": colour(number), "symbol": "star-open", "size": 10}
        point = ([evaluation["policy/kl"]], [evaluation["reward_model/policy"]])
        traces.append(_trace(number, *point, mode="markers", marker=star, **about(*figures, "held-out prompts")))
    return traces


def _win_rates(groups: list[Group], matrix: WinMatrix | None) -> dict[str, Any]:
    """Return the held-out win rate of each group over its baseline, with its interval, over the KL of its policies."""
    traces, told = [], []
    for number, group in enumerate(groups):
        share = matrix.over_baseline(group.name) if matrix and group.name in matrix.names else None
        kl = [run.evaluation.metrics.get("policy/kl", math.nan) for run in group.counted if run.evaluation]
        if share is None or not np.isfinite(kl).any():
            continue
        over = "seeds and prompts" if share.sources else "prompts only"
        figures = ("KL %{x:.2f} nats", f"win rate {share.share:.2f}", f"[{share.low:.2f}, {share.high:.2f}], {over}")
        bars = {"array": [share.high - share.share], "arrayminus": [share.share - share.low], "symmetric": False}
        bars |= {"color": colour(number), "thickness": 1.5}
        about = _about(number, group.name, group.label, *figures)
        traces.append(_trace(number, [np.nanmean(kl)], [share.share], mode="markers", error_y=bars, **about))
        told.append(f"{group.name} {share.share:.2f} at a KL of {np.nanmean(kl):.2f}")
    judge = matrix.judge if matrix else ""
    text = f"Win rate over the baseline by {judge}, a point per group: {'; '.join(told)}."
    figure = _figure(f"Win rate by {judge} against KL", text, traces, KL_TITLE, "win rate over the baseline")
    half = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 0.5, "y1": 0.5}
    figure["layout"] |= {"shapes": [{**half, "line": {"color": "var(--quiet)", "dash": "dot", "width": 1}}]}
    figure["layout"]["yaxis"]["range"] = [-0.02, 1.02]
    return figure


def _curves(groups: list[Group], metric: str, title: str, x_title: str) -> dict[str, Any]:
    """Return a metric over the training: every run as a thin line, and the mean of each group with its band on top."""
    traces = []
    for number, group in enumerate(groups):
        curves = [smooth(curve_over(run, metric, samples=x_title != STEPS)) for run in group.runs]
        alone = len(group.runs) == 1
        ended = [curve for curve, run in zip(curves, group.runs, strict=True) if not run.failed and not alone]
        for run, curve in zip(group.runs, curves, strict=True):
            if len(curve):
                about = _about(number, group.run_name(run), run.name, f"{x_title} %{{x:,.0f}}", "%{y:.4g}")
                line = {"color": colour(number), "dash": "dot" if run.failed else dash(number)}
                shown = _thin(curve)
                traces.append(_trace(number, shown.index, shown, line=line | {"width": 2 if alone else 0.8}, **about))
        traces += _band(number, group, _thin(seed_band(ended)), x_title)
    return _figure(title, f"{title} over {x_title}, one band per group.", traces, x_title, "")


def _band(number: int, group: Group, band: pd.DataFrame, x_title: str) -> list[Trace]:
    """Return the area from the lowest to the highest run, and the mean."""
    if band.empty:
        return []
    about = _about(number, group.name, group.label, f"{x_title} %{{x:,.0f}}", "mean %{y:.4g}")
    around = [*band.index, *band.index[::-1]], [*band["low"], *band["high"][::-1]]
    area = {"fill": "toself", "fillcolor": colour(number), "opacity": 0.18, "hoverinfo": "skip", "line": {"width": 0}}
    mean = {"color": colour(number), "dash": dash(number), "width": 2.4}
    return [
        _trace(number, *around, name=group.name, meta={"group": number}, **area),
        _trace(number, band.index, band["mean"], line=mean, **about),
    ]
