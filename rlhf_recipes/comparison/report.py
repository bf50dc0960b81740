"""Write the comparison as one HTML page that needs no network, and its figures as PNG.

The page is `templates/report.html.jinja`, which escapes every text. This module formats numbers and computes none.
"""

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup, escape
from matplotlib.axes import Axes

from rlhf_recipes.comparison.curves import seed_band, smooth
from rlhf_recipes.comparison.head_to_head import Answer, WinMatrix, shared_answers, win_matrices
from rlhf_recipes.comparison.plots import (
    COLOURS,
    COMPARED_PANELS,
    GRID,
    INK,
    LINES,
    Band,
    RunPath,
    draw_bands,
    draw_frontier,
    inline_svg,
    save_png,
)
from rlhf_recipes.comparison.ranking import (
    Group,
    Verdict,
    all_count_samples,
    curve_over,
    held_out_winner,
    run_alarms,
    run_path,
)
from rlhf_recipes.comparison.runs import TrackedRun
from rlhf_recipes.data.messages import as_text

MISSING = "–"


def write_report(
    experiment: str,
    groups: list[Group],
    differing: dict[str, list[str]],
    verdict: Verdict,
    output_dir: Path,
    num_shown: int,
) -> Path:
    """Write `report.html`, and `frontier.png` and `curves.png` if the runs have curves.

    Args:
        experiment: Name of the experiment.
        groups: Groups that `group_runs` returned.
        differing: Options that differ, with one value per group.
        verdict: Verdict that `rank_groups` returned.
        output_dir: Directory of the report.
        num_shown: Number of prompts whose completions are shown.

    Returns:
        Path of the page.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    named = {group.run_name(run): run for group in groups for run in group.runs}
    evaluations = {name: run.evaluation for name, run in named.items() if run.evaluation and run.evaluation.rows}
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rlhf_recipes.comparison"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = _code
    page = environment.get_template("report.html.jinja").render(
        experiment=experiment,
        groups=[_group_entry(number, group) for number, group in enumerate(groups)],
        num_runs=len(named),
        differing=differing,
        verdict=verdict,
        held_out=held_out_winner(groups),
        alarms={name: alarms for name, run in named.items() if (alarms := run_alarms(run))},
        figures=_figures(groups, verdict, output_dir),
        runs=[_run_row(name, run) for name, run in named.items()],
        matrices=[_matrix_entry(matrix) for matrix in win_matrices(evaluations)],
        prompts=[
            (as_text(prompt).strip(), [_answer_entry(answer) for answer in answers])
            for prompt, answers in shared_answers(evaluations, num_shown)
        ],
        number=_number,
    )
    path = output_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _number(value: float | None, digits: int = 2) -> str:
    """Return a number as text, and a dash if it is unknown or not finite."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:z.{digits}f}"


def _costs(run: TrackedRun) -> list[str]:
    """Return wall time, tokens per second and peak memory, each if it is known."""
    runtime, tokens = run.metrics.get("train_runtime"), run.metrics.get("num_tokens")
    time = [] if run.hours is None else [f"{run.hours:.1f} h" if run.hours >= 1 else f"{60 * run.hours:.0f} min"]
    speed = [f"{tokens / runtime:,.0f} tokens/s"] if tokens and runtime else []
    names = {device: "machine" if device == "system" else device.replace("_", " ") for device in run.peak_memory}
    return [*time, *speed, *(f"{names[device]} {peak:.1f} GB" for device, peak in run.peak_memory.items())]


def _code(text: str) -> Markup:
    """Return an escaped text. The parts between backticks become code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _group_entry(number: int, group: Group) -> dict[str, Any]:
    seeds = ", ".join(f"{group.run_name(run)}: seed {run.seed or 'unknown'}" for run in group.runs)
    dashes = ("none", "7 3", "7 3 2 3", "2 3")[(number // len(COLOURS)) % len(LINES)]
    return {
        "name": group.name,
        "label": group.label,
        "seeds": seeds,
        "colour": number % len(COLOURS),
        "dashes": dashes,
    }


def _figures(groups: list[Group], verdict: Verdict, output_dir: Path) -> dict[str, Any]:
    """Return the figures as SVG with their alternative texts, and write the PNGs."""
    legend = [shorten(f"{group.name}: {group.label}", 60) for group in groups]
    paths = [
        RunPath(group.run_name(run), number, path, _held_out_point(run), run.failed)
        for number, group in enumerate(groups)
        for run in group.runs
        if len(path := run_path(run))
    ]
    frontier = None
    if paths:
        draw = partial(draw_frontier, paths=paths, common_kl=verdict.common_kl)
        save_png([draw], legend, output_dir / "frontier.png")
        ends = "; ".join(
            f"{p.name} ends at {p.path['kl'].iloc[-1]:.2f}, {p.path['score'].iloc[-1]:.2f}" for p in paths
        )
        frontier = (_svg(draw, "frontier", (4.8, 3.8)), f"Score over KL, a path per run (KL, score): {ends}.")
    samples = all_count_samples([run for group in groups for run in group.runs])
    x_label = "completions sampled" if samples else "optimiser step"
    panels: dict[str, Callable[[Axes], Any]] = {}
    for metric, title in COMPARED_PANELS.items():
        bands = [_band(number, group, metric, samples) for number, group in enumerate(groups)]
        if any(len(curve) for band in bands for curve in band.curves):
            panels[title] = partial(draw_bands, bands=bands, title=title, x_label=x_label)
    if panels:
        save_png(list(panels.values()), legend, output_dir / "curves.png")
    curves = [
        (_svg(draw, f"curve{number}", (4.3, 3.0)), f"{title} over {x_label}, one band per group.")
        for number, (title, draw) in enumerate(panels.items())
    ]
    return {"frontier": frontier, "curves": curves, "x_label": x_label}


def _svg(draw: Callable[[Axes], Any], name: str, size: tuple[float, float]) -> Markup:
    """Return a figure whose colours are the page's, so that it follows a dark scheme."""
    svg = inline_svg(draw, name, size).replace(INK, "currentColor").replace(GRID, "var(--grid)")
    for number, colour in enumerate(COLOURS):
        svg = svg.replace(colour, f"var(--group{number})")
    return Markup(svg)


def _held_out_point(run: TrackedRun) -> tuple[float, float] | None:
    metrics = run.evaluation.metrics if run.evaluation else {}
    known = "policy/kl" in metrics and "reward_model/policy" in metrics
    return (metrics["policy/kl"], metrics["reward_model/policy"]) if known else None


def _band(number: int, group: Group, metric: str, samples: bool) -> Band:
    curves = [smooth(curve_over(run, metric, samples=samples)) for run in group.runs]
    ended = [curve for curve, run in zip(curves, group.runs, strict=True) if not run.failed]
    return Band(group.name, number, curves, [run.failed for run in group.runs], seed_band(ended))


def _run_row(name: str, run: TrackedRun) -> dict[str, Any]:
    path = run_path(run)
    score, kl = (path[column] if len(path) else pd.Series([math.nan]) for column in ("score", "kl"))
    length = smooth(run.curves.get("completions/mean_length", pd.Series(dtype=float)))
    evaluation = run.evaluation.metrics if run.evaluation else {}
    return {
        "name": name,
        "title": run.name,
        "run_id": run.run_id,
        "link": run.link,
        "status": run.status.lower(),
        "failed": run.failed,
        "seed": run.seed or MISSING,
        "score": f"{_number(score.iloc[0])} → {_number(score.iloc[-1])}" if len(path) else MISSING,
        "kl": _number(kl.iloc[-1]),
        "length": _number(length.iloc[-1] if len(length) else None, 1),
        "win_rates": [
            f"{metric.removesuffix('/win_rate')} {_number(rate)} "
            f"[{_number(evaluation.get(f'{metric}_low'))}, {_number(evaluation.get(f'{metric}_high'))}]"
            for metric, rate in sorted(evaluation.items())
            if metric.endswith("/win_rate")
        ],
        "lineage": [f"{role}: {title}" for role, title in run.lineage.items()],
        "commit": run.commit[:10] or MISSING,
        "costs": _costs(run),
    }


def _matrix_entry(matrix: WinMatrix) -> dict[str, Any]:
    """Return a matrix whose cells hold their text, and their distance from 0.5 for the shading."""
    rows = [[None if cell is None else _cell(*cell) for cell in row] for row in matrix.cells]
    return {
        "judge": matrix.judge,
        "names": matrix.names,
        "rows": list(zip(matrix.names, rows, strict=True)),
        "num_prompts": matrix.num_prompts,
    }


def _cell(share: float, low: float, high: float) -> dict[str, Any]:
    return {
        "share": _number(share),
        "interval": f"[{_number(low)}, {_number(high)}]",
        "wins": share >= 0.5,
        "strength": round(abs(share - 0.5) * 140),  # percent of the full shade
        "certain": not low <= 0.5 <= high,
    }


def _answer_entry(answer: Answer) -> dict[str, Any]:
    scores = [f"{judge} {_number(score)}" for judge, score in answer.scores.items()]
    return {"name": answer.name, "text": answer.text, "scores": scores}
