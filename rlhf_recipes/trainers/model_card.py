"""The model card of a trained model: its README.md, whose head the Hub reads.

Each line is a fact that the run knows. A fact that it does not know is left out.
"""

import functools
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load
from jinja2 import StrictUndefined, Template

from rlhf_recipes.durability.origin import Origin, public_text
from rlhf_recipes.evaluation.figures import rounded, title

TEMPLATE = Path(__file__).with_name("templates") / "model_card.md.jinja"
CARD_NAME = "README.md"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
LOADERS = {
    "text-generation": "AutoModelForCausalLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
}
# Figures of an evaluation that a card shows after the win rates of judges.
SHOWN = (
    *("objective/kl", "completions/mean_length", "accuracy", "auc", "first_error_f1"),
    *("calibration_error", "length_correlation"),
    *("mean_token_accuracy", "loss"),
)


@dataclass(frozen=True)
class Figure:
    """A result in a card.

    Args:
        name: Name in the log.
        title: Its meaning.
        value: Value.
        bounds: Ends of its 95 % interval, if it has one.
    """

    name: str
    title: str
    value: float
    bounds: tuple[float, float] | None = None

    @property
    def text(self) -> str:
        """Return the value with three digits."""
        return rounded(self.value)

    @property
    def interval(self) -> str:
        """Return the interval; an empty text without one."""
        return "" if self.bounds is None else f"{rounded(self.bounds[0])} to {rounded(self.bounds[1])}"


@dataclass(frozen=True)
class Description:
    """What a trainer tells about its model.

    Args:
        name: Name of the model.
        place: Where a user loads it from: a name on the Hub, or a directory.
        method: How it was trained.
        base: Name or path of the model that training started from.
        dataset: Name of the data, if it has one.
        is_policy: Whether it writes text. A reward model scores it.
        judges_steps: Whether it scores the steps of a text.
        is_adapter: Whether it is an adapter on the base.
        facts: Texts by title.
        tags: Tags for the Hub.
        alarms: Warnings about the course of the run.
    """

    name: str
    place: str
    method: str
    base: str
    dataset: str | None
    is_policy: bool
    is_adapter: bool
    facts: Mapping[str, str]
    judges_steps: bool = False
    tags: Iterable[str] = ()
    alarms: Iterable[str] = field(default_factory=tuple)


def model_card(described: Description, evaluation: Mapping[str, float], origin: Origin) -> ModelCard:
    """Return the card of a model.

    Args:
        described: The model.
        evaluation: Entry of the log with its evaluation; empty without one.
        origin: Origin of the run.
    """
    kind = "language model" if described.is_policy else "reward model"
    figures = figures_of(evaluation)
    configuration = yaml.safe_dump(origin.configuration, sort_keys=False, allow_unicode=True).strip()
    text = _template().render(
        card_data=_card_data(described, figures).to_yaml(),
        name=described.name,
        summary=f"A {kind}, made from `{public_text(described.base)}` by {described.method} with `rlhf_recipes`.",
        facts={title: _cell(text) for title, text in described.facts.items()},
        figures=figures,
        evaluated=f"On {_prompts(evaluation)}, after step {evaluation.get('step', 0):.0f}.",
        alarms=[public_text(alarm) for alarm in described.alarms],
        loader=LOADERS[_task(described)],
        place=described.place,
        command=origin.command,
        configuration=configuration if origin.configuration else "",
        commit=origin.commit,
        packages=", ".join(f"{package} {version}" for package, version in origin.packages.items()),
    )
    return ModelCard(text)


def _task(described: Description) -> str:
    """Return the task of a model, by its name on the Hub."""
    kind = "token-classification" if described.judges_steps else "text-classification"
    return "text-generation" if described.is_policy else kind


@functools.cache
def _template() -> Template:
    return Template(TEMPLATE.read_text(encoding="utf-8"), undefined=StrictUndefined, keep_trailing_newline=True)


def _card_data(described: Description, figures: list[Figure]) -> ModelCardData:
    dataset = hub_name(described.dataset)
    results = [
        EvalResult(
            task_type=_task(described),
            dataset_type=dataset or "local",
            dataset_name=public_text(described.dataset or "data of the run"),
            metric_type=figure.name.removeprefix("eval_"),
            metric_name=figure.title,
            metric_value=round(figure.value, 6),
        )
        for figure in figures
    ]
    return ModelCardData(
        model_name=described.name,
        base_model=hub_name(described.base),
        datasets=dataset,
        library_name="peft" if described.is_adapter else "transformers",
        pipeline_tag=_task(described),
        tags=sorted({"generated_from_trainer", *described.tags}),
        eval_results=results or None,
    )


def figures_of(evaluation: Mapping[str, float]) -> list[Figure]:
    """Return the figures of an evaluation that a card shows: first the win rates, then those of `SHOWN`."""
    titles = {
        name: f"win rate over the policy before training, by {_judge(name)}"
        for name in evaluation
        if name.endswith("/win_rate")
    }
    # The loss of a policy that is judged says nothing about it.
    titles |= {f"eval_{name}": title(name) for name in SHOWN if name != "loss" or not titles}
    found = []
    for name, label in titles.items():
        if math.isfinite(evaluation.get(name, math.nan)):
            low, high = (evaluation.get(f"{name}_{end}") for end in ("low", "high"))
            bounds = (low, high) if low is not None and high is not None else None
            found.append(Figure(name, label, evaluation[name], bounds))
    return found


def _prompts(evaluation: Mapping[str, float]) -> str:
    count = evaluation.get("eval_prompts")
    return "the evaluation data" if count is None else f"{count:,.0f} held-out prompts"


def _judge(name: str) -> str:
    judge = name.removeprefix("eval_").removesuffix("/win_rate")
    return "the trained score" if judge == "score" else f"the judge `{judge}`"


def hub_name(name: str | None) -> str | None:
    """Return a name on the Hub: this one, or the base in the card of a local model; `None` if there is none."""
    if name is None:
        return None
    if os.path.isdir(name):
        named = _base_in_card(Path(name, CARD_NAME))
        name = named if isinstance(named, str) and not os.path.exists(named) else ""
    return name if _HUB_NAME.fullmatch(name) and not name.startswith(".") and not os.path.exists(name) else None


def _base_in_card(card: Path) -> Any:
    """Return the base that the head of a card names; `None` without one. Anyone may have written the card."""
    try:
        head = metadata_load(card) if card.is_file() else None
    except (OSError, ValueError, yaml.YAMLError):  # it must not stop the checkpoint that is being written
        head = None
    return (head or {}).get("base_model")


def _cell(text: str) -> str:
    return " ".join(public_text(text).split()).replace("|", r"\|")
