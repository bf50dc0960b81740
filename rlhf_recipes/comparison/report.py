"""Write the comparison as one HTML page that needs no network.

The page is `templates/report.html.jinja`, which escapes every text. Only two scripts may run:
plotly.js, and `templates/report.js`. This module formats numbers and computes none.
"""

import base64
import hashlib
import math
import re
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from rlhf_recipes.comparison import figures
from rlhf_recipes.comparison.curves import smooth
from rlhf_recipes.comparison.frontier import Row
from rlhf_recipes.comparison.groups import Group, final_kl, run_alarms, run_path
from rlhf_recipes.comparison.head_to_head import Answer, Share, WinMatrix, shared_answers
from rlhf_recipes.comparison.runs import Evaluation, TrackedRun
from rlhf_recipes.comparison.verdict import Verdict
from rlhf_recipes.data.messages import as_text
from rlhf_recipes.evaluation.statistics import CrossedMean

MISSING = "–"
SCRIPT = Path(__file__).parent / "templates" / "report.js"
# How the page draws the dashes and the markers of plotly.js in its legend.
SVG_DASHES = {"solid": "none", "dash": "7 3", "dashdot": "7 3 2 3", "dot": "2 3"}
SVG_MARKERS = {
    "circle": "M12 5a5 5 0 1 0 10 0a5 5 0 1 0-10 0",
    "square": "M12.5.5h9v9h-9z",
    "triangle-up": "M17 0l5.5 9.5h-11z",
    "diamond": "M17-1l6 6-6 6-6-6z",
    "triangle-down": "M17 10l5.5-9.5h-11z",
    "cross": "M15.2 0h3.6v3.2H22v3.6h-3.2V10h-3.6V6.8H12V3.2h3.2z",
}


def write_report(
    experiment: str,
    groups: list[Group],
    differing: dict[str, list[str]],
    verdict: Verdict,
    output_dir: Path,
    num_shown: int,
) -> Path:
    """Write `report.html`.

    Args:
        experiment: Name of the experiment.
        groups: Groups that `group_runs` returned.
        differing: Options that differ, with one value per group.
        verdict: Verdict that `decide` returned.
        output_dir: Directory of the report.
        num_shown: Number of prompts whose completions are shown.

    Returns:
        Path of the page.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
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
        groups=[_group_entry(number, group, verdict) for number, group in enumerate(groups)],
        num_runs=sum(len(group.runs) for group in groups),
        differing=differing,
        verdict=verdict,
        rows=[_frontier_row(row, verdict) for row in verdict.frontier.rows] if verdict.frontier else [],
        alarms=_alarms(groups),
        figures=figures.compared_figures(groups, verdict),
        scripts=_scripts(),
        matrices=[_matrix_entry(matrix) for matrix in verdict.matrices],
        prompts=_prompts(groups, num_shown),
    )
    path = output_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _scripts() -> list[tuple[Markup, str]]:
    """Return the scripts, each with the hash by which the page allows it. Nothing else may run."""
    texts = [get_plotlyjs(), SCRIPT.read_text(encoding="utf-8")]
    return [(Markup(text), base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()) for text in texts]


def _alarms(groups: list[Group]) -> dict[str, list[str]]:
    """Return the names of the runs that raise each alarm."""
    names: dict[str, list[str]] = {}
    for group in groups:
        for run in group.runs:
            for sentence in run_alarms(run):
                names.setdefault(sentence, []).append(group.run_name(run))
    return names


def _prompts(groups: list[Group], num_shown: int) -> list[dict[str, Any]]:
    """Return some prompts, with the answers of the baselines and of one run per group, and those of the other runs."""
    first: set[str] = set()
    evaluations: dict[str, Evaluation] = {}
    for group in groups:
        named = {group.run_name(run): run.evaluation for run in group.runs if run.evaluation and run.evaluation.rows}
        first |= {*list(named)[:1]}
        evaluations |= named
    others = {*evaluations} - first
    return [
        {
            "prompt": as_text(prompt).strip(),
            "shown": [_answer_entry(answer) for answer in answers if answer.name not in others],
            "folded": [_answer_entry(answer) for answer in answers if answer.name in others],
        }
        for prompt, answers in shared_answers(evaluations, num_shown)
    ]


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


def _group_entry(number: int, group: Group, verdict: Verdict) -> dict[str, Any]:
    frontier, matrix = verdict.frontier, verdict.matrix
    leads = (
        [f"{_number(max(start, 0.0))} to {_number(end)}" for start, end in frontier.leads.get(group.name, [])]
        if frontier
        else []
    )
    return {
        "name": group.name,
        "label": group.label,
        "colour": figures.colour(number),
        "dashes": SVG_DASHES[figures.dash(number)],
        "marker": SVG_MARKERS[figures.marker(number)],
        "score": _interval(frontier.best.get(group.name)) if frontier else MISSING,
        "kl": _number(final_kl(group)),
        "leads": leads,
        "win_rate": _share(matrix.over_baseline(group.name) if matrix and group.name in matrix.names else None),
        "failed": sum(run.failed for run in group.runs),
        "runs": [_run_row(group.run_name(run), run) for run in group.runs],
    }


def _interval(mean: CrossedMean | None) -> str:
    """Return a mean with its interval, or alone without one."""
    if mean is None or math.isnan(mean.low):
        return _number(None if mean is None else mean.mean)
    return f"{_number(mean.mean)} [{_number(mean.low)}, {_number(mean.high)}]"


def _share(share: Share | None) -> str:
    if share is None:
        return MISSING
    return f"{_number(share.share)} [{_number(share.low)}, {_number(share.high)}]{'' if share.sources else ' *'}"


def _frontier_row(row: Row, verdict: Verdict) -> dict[str, Any]:
    matrix = verdict.matrix
    names = [group.name for group in row.leaders]
    rates = [_share(matrix.over_baseline(name) if matrix and name in matrix.names else None) for name in names]
    return {
        "kl": _number(row.kl),
        "leaders": ", ".join(names),
        "score": _interval(row.score),
        "close": ", ".join(group.name for group in row.close) or "none",
        "win_rates": rates,
    }


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
    rows = [[None if cell is None else _cell(cell) for cell in row] for row in matrix.cells]
    return {
        "judge": matrix.judge,
        "names": matrix.names,
        "rows": list(zip(matrix.names, rows, strict=True)),
        "num_prompts": matrix.num_prompts,
    }


def _cell(share: Share) -> dict[str, Any]:
    return {
        "share": _number(share.share),
        "interval": f"[{_number(share.low)}, {_number(share.high)}]{'' if share.sources else ' *'}",
        "wins": share.share >= 0.5,
        "strength": round(abs(share.share - 0.5) * 140),  # percent of the full shade
        "certain": share.separates,
    }


def _answer_entry(answer: Answer) -> dict[str, Any]:
    scores = [f"{judge} {_number(score)}" for judge, score in answer.scores.items()]
    return {"name": answer.name, "text": answer.text, "scores": scores}
