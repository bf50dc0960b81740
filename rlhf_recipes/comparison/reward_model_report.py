"""Write what was measured of reward models as a page: Markdown, the same as HTML, and plots.

The HTML needs no network: it holds the plots, and no script.
"""

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
from markdown_it import MarkdownIt
from markupsafe import Markup

from rlhf_recipes.comparison.reward_model_plots import plot_best_of, plot_calibration, plot_categories
from rlhf_recipes.evaluation.evaluated_models import ITSELF, Evaluation
from rlhf_recipes.evaluation.figures import rounded
from rlhf_recipes.evaluation.verdicts import Judgement

ENDS = ("", "_low", "_high")
MISSING = "–"
# Names of the figures over all rows, by title. A figure that no model has is left out.
FIGURES = {
    "accuracy": "accuracy",
    "accuracy over pairs": "pair_accuracy",
    "calibration error": "calibration_error",
    "correlation of score and length": "length_correlation",
    "accuracy where the chosen answer is longer": "accuracy_chosen_longer",
    "accuracy where it is shorter": "accuracy_chosen_shorter",
    "RewardBench": "reward_bench",
    "RewardBench 2": "reward_bench_2",
    "rows": "rows",
    "rows without a score": "unscored",
}
HEADS = {
    "standard deviation of a score over the heads": "heads/disagreement",
    "the same of a difference in score": "heads/margin_disagreement",
    "share of pairs that all heads rank alike": "heads/unanimous",
    "accuracy on these pairs": "heads/accuracy_unanimous",
    "accuracy on the others": "heads/accuracy_divided",
}
SECTION, CATEGORY = "section/", "category/"


@dataclass(frozen=True)
class Section:
    """Hold a part of the page.

    Args:
        title: Heading.
        text: Sentences.
        header: Titles of the columns; empty without a table.
        rows: Cells of the table.
        images: Files of plots beside the page.
    """

    title: str
    text: str = ""
    header: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    images: list[Path] = field(default_factory=list)


def write_reward_model_report(
    evaluation: Evaluation, dataset: str, verdict: list[Judgement], output_dir: Path
) -> list[Path]:
    """Write `report.md`, `report.html` and the plots. Return their paths.

    Args:
        evaluation: What was measured.
        dataset: Name of the preferences.
        verdict: Judgements of the stage.
        output_dir: Directory of the page.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    sections = [
        _all_models(evaluation, output_dir),
        *_differences(evaluation),
        *_categories(evaluation, output_dir),
        *_best_of(evaluation, output_dir),
        *_heads(evaluation),
    ]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rlhf_recipes.comparison"),
        autoescape=jinja2.select_autoescape(["html.jinja"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["plain"] = plain
    facts = {"models": {name: model.path for name, model in evaluation.models.items()}, "dataset": dataset}
    text = environment.get_template("reward_models.md.jinja").render(facts, verdict=verdict, sections=sections)
    images = [image for section in sections for image in section.images]
    body = MarkdownIt("js-default").render(text)  # shows HTML in names as text
    for image in images:
        data = base64.b64encode(image.read_bytes()).decode()
        body = body.replace(f'src="{image.name}"', f'src="data:image/png;base64,{data}"')
    page = environment.get_template("reward_models.html.jinja").render(
        title=f"Reward models on {dataset}", body=Markup(body)
    )
    files = output_dir / "report.md", output_dir / "report.html"
    files[0].write_text(text, encoding="utf-8")
    files[1].write_text(page, encoding="utf-8")
    return [*files, *images]


def plain(text: str) -> str:
    """Return text on one line in which Markdown sees no marks."""
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>|#&" else letter for letter in " ".join(text.split()))


def with_interval(metrics: Mapping[str, float], name: str) -> str:
    """Return a figure with its interval if it has one, and a dash if it is not there."""
    value, low, high = (metrics.get(f"{name}{end}", math.nan) for end in ENDS)
    if math.isnan(value):
        return MISSING
    shown = f"{value:,.0f}" if name.rpartition("/")[2] in ("rows", "unscored") else rounded(value)
    return shown if math.isnan(low) else f"{shown} ({rounded(low)} to {rounded(high)})"


def summary_of(evaluation: Evaluation) -> dict[str, list[str]]:
    """Return the figures over all rows by their title, a text for each model."""
    metrics = [model.metrics for model in evaluation.models.values()]
    shown = {title: name for title, name in FIGURES.items() if any(name in found for found in metrics)}
    return {title: [with_interval(found, name) for found in metrics] for title, name in shown.items()}


def _all_models(evaluation: Evaluation, output_dir: Path) -> Section:
    rows = [[title, *cells] for title, cells in summary_of(evaluation).items()]
    has_pairs = any(model.ranking.bins for model in evaluation.models.values())
    return Section(
        "All rows",
        "With 95 % intervals. Length is counted in characters.",
        ["figure", *evaluation.models],
        rows,
        [plot_calibration(evaluation, output_dir / "calibration.png")] if has_pairs else [],
    )


def _differences(evaluation: Evaluation) -> list[Section]:
    if not evaluation.comparisons:
        return []
    named = evaluation.comparisons[0].metrics
    chosen = [name for name in named if name.startswith("best_of_") and f"{name}_low" in named]
    rows = [
        [
            f"{each.first} over {each.second}",
            with_interval(each.metrics, "accuracy"),
            each.better or "not decided",
            *(with_interval(each.metrics, name) for name in chosen),
        ]
        for each in evaluation.comparisons
    ]
    text = (
        "Differences on the same rows and prompts, with paired 95 % bootstrap intervals. A model ranks better if the "
        "interval of the accuracy excludes 0."
    )
    header = ["pair", "accuracy", "ranks better", *(_title_of(name) for name in chosen)]
    return [Section("Which one is better?", text, header, rows)]


def _title_of(best_of: str) -> str:
    n, _, judge = best_of.removeprefix("best_of_").partition("/")
    return f"best of {n} by {judge}"


def _categories(evaluation: Evaluation, output_dir: Path) -> list[Section]:
    metrics = {name: model.metrics for name, model in evaluation.models.items()}
    first = next(iter(evaluation.models.values()))
    categories = list(first.ranking.by_category)
    if not categories:
        return []
    header = ["category", "rows", *metrics]
    rows = [
        [
            category,
            with_interval(first.metrics, f"{CATEGORY}{category}/rows"),
            *(with_interval(found, f"{CATEGORY}{category}/accuracy") for found in metrics.values()),
        ]
        for category in categories
    ]
    sections = [name for name in first.metrics if name.startswith(SECTION)]
    rows += [
        [f"section {name.removeprefix(SECTION)}", "", *(with_interval(found, name) for found in metrics.values())]
        for name in sections
    ]
    image = plot_categories(evaluation, output_dir / "categories.png")
    return [Section("By category", "Accuracy, with 95 % intervals.", header, rows, [image])]


def _heads(evaluation: Evaluation) -> list[Section]:
    metrics = {name: model.metrics for name, model in evaluation.models.items()}
    shown = {title: name for title, name in HEADS.items() if any(name in found for found in metrics.values())}
    if not shown:
        return []
    rows = [[title, *(with_interval(found, name) for found in metrics.values())] for title, name in shown.items()]
    text = "Only models with several score heads. Where heads disagree, the model should be wrong more often."
    return [Section("Agreement between heads", text, ["figure", *metrics], rows)]


def _best_of(evaluation: Evaluation, output_dir: Path) -> list[Section]:
    found = []
    for number, (judge, own) in enumerate(evaluation.best.items()):
        metrics = {name: model.curves[judge].metrics for name, model in evaluation.models.items()}
        metrics[f"{judge} itself"] = own.metrics
        rows = [
            [str(n), *(with_interval(curve, f"best_of_{n}/{judge}") for curve in metrics.values())] for n in own.values
        ]
        prompts = len(next(iter(own.values.values())))
        text = (
            f"Mean score by {plain(judge)} of the best of n answers that each model chooses, over {prompts:,} "
            f"prompts, with 95 % bootstrap intervals over prompts. The last column ({ITSELF} in the results) is "
            "what the judge itself would choose: no model can be above it."
        )
        image = plot_best_of(evaluation, judge, output_dir / f"best_of_n_{number + 1}.png")
        found.append(Section(f"Best of n, by {judge}", text, ["n", *metrics], rows, [image]))
    return found
