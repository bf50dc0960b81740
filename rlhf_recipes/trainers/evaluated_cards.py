"""Write the result of an evaluation beside a reward model: into a file of its own and into its model card.

`reward_model_card.json` stays as it is, because older versions refuse a card with a field that they do not know.
"""

import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard

from rlhf_recipes.durability.notes import read_note, write_whole
from rlhf_recipes.durability.origin import public_text
from rlhf_recipes.evaluation.evaluated_models import Evaluation
from rlhf_recipes.trainers.model_card import CARD_NAME, Figure, hub_name

EVALUATIONS_FILE = "reward_model_evaluations.json"
# Figures in a card, with their titles.
SHOWN = {
    "accuracy": "accuracy",
    "pair_accuracy": "accuracy over pairs",
    "calibration_error": "calibration error",
    "length_correlation": "correlation of score and length in characters",
    "reward_bench": "RewardBench",
    "reward_bench_2": "RewardBench 2",
}
logger = logging.getLogger(__name__)


def note_evaluation(evaluation: Evaluation, dataset: str, split: str) -> None:
    """Write the result beside each reward model that is a directory here.

    A later evaluation on the same split replaces it. A file or a model card that cannot be read stays as it is. A kill
    leaves the old file or the new one.

    Args:
        evaluation: What was measured.
        dataset: Name or directory of the preferences.
        split: Its split.
    """
    for model in evaluation.models.values():
        directory = Path(model.path)
        if not directory.is_dir():  # a name on the Hub, a model in MLflow, or a served one
            continue
        try:
            _into_file(directory / EVALUATIONS_FILE, f"{public_text(dataset)}:{split}", model.metrics)
            if (directory / CARD_NAME).is_file():
                _into_card(directory / CARD_NAME, dataset, split, model.metrics)
        except (OSError, ValueError, yaml.YAMLError) as error:
            logger.warning(f"The result is not written beside {model.path}: {error}")


def _into_file(path: Path, name: str, metrics: Mapping[str, float]) -> None:
    known = read_note(path) if path.is_file() else {}
    if known is None:
        raise ValueError(f"{path.name} holds no JSON object, or cannot be read. Correct or remove it.")
    finite = {figure: value for figure, value in metrics.items() if math.isfinite(value)}
    write_whole(path, json.dumps(known | {name: finite}, indent=2) + "\n")


def figures_shown(metrics: Mapping[str, float]) -> list[Figure]:
    """Return the figures of an evaluation that a card shows."""
    found = []
    for name, title in SHOWN.items():
        if math.isfinite(metrics.get(name, math.nan)):
            low, high = (metrics.get(f"{name}_{end}", math.nan) for end in ("low", "high"))
            found.append(Figure(name, title, metrics[name], (low, high) if math.isfinite(low) else None))
    return found


def _into_card(path: Path, dataset: str, split: str, metrics: Mapping[str, float]) -> None:
    card, figures = ModelCard.load(path), figures_shown(metrics)
    name = f"{public_text(dataset)}, split {split}"
    heading, rows = f"## Evaluation on {name}", [f"| {f.title} | {f.text} | {f.interval} |" for f in figures]
    table = "\n".join(["| figure | value | 95 % interval |", "|---|---|---|", *rows])
    text = f"{heading}\n\nOn {metrics['rows']:,.0f} rows.\n\n{table}\n"
    own = re.compile(rf"^{re.escape(heading)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    before = own.sub("", card.text).rstrip("\n")
    card.text = f"{before}\n\n{text}"
    others = [result for result in card.data.eval_results or [] if result.dataset_name != name]
    card.data.eval_results = [
        *others,
        *(
            EvalResult(
                task_type="text-classification",
                dataset_type=hub_name(dataset) or "local",
                dataset_name=name,
                dataset_split=split,
                metric_type=figure.name,
                metric_name=figure.title,
                metric_value=round(figure.value, 6),
            )
            for figure in figures
        ),
    ]
    card.data.model_name = card.data.model_name or path.resolve().parent.name
    write_whole(path, str(card))
