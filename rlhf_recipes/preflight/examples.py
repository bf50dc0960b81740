"""Show two rows as the model reads them: every special token, and a mark where the text that is trained begins."""

from typing import Any

from datasets import Dataset

from rlhf_recipes.data.rendering import prompt_ids
from rlhf_recipes.options.baselines import samples_rollouts
from rlhf_recipes.rewards.scorer import shared_length

COUNT = 2
BOUNDARY = "‖"
WIDTH = 160  # characters of one example


def example_lines(trainer: Any) -> dict[str, str]:
    """Return examples of the training data by their titles.

    A `‖` stands between the tokens that are given and those that are trained or scored. A rollout ends with it,
    because the policy writes the answer.
    """
    dataset, tokenizer = trainer.train_dataset, trainer.processing_class
    if not isinstance(dataset, Dataset) or hasattr(tokenizer, "tokenizer"):  # a stream, or a processor of images
        return {}
    lines = {}
    for number, row in enumerate(dataset.select(range(min(COUNT, len(dataset))))):
        parts = [_shown(tokenizer.decode(ids, clean_up_tokenization_spaces=False)) for ids in _parts(trainer, row)]
        room = WIDTH - sum(map(len, parts))  # a short part leaves its room to a long one
        widths = [max(WIDTH // len(parts), room + len(part)) for part in parts]
        lines[f"example {number}"] = BOUNDARY.join(map(_shortened, parts, widths))
    return lines


def _parts(trainer: Any, row: dict[str, Any]) -> list[list[int]]:
    """Return the tokens of a row, cut where a text that is trained or scored begins or ends."""
    tokenizer = trainer.processing_class
    if samples_rollouts(trainer.args):
        return [prompt_ids(tokenizer, [row["prompt"]], **trainer.template_options)[0], []]
    if "labels" in row:
        trained = [label != -100 for label in row["labels"]]
        cuts = [i for i in range(1, len(trained)) if trained[i] != trained[i - 1]]
        bounds = zip([0, *cuts], [*cuts, len(trained)], strict=True)
        return [row["input_ids"][start:end] for start, end in bounds]
    if "prompt_ids" in row:  # DPO's are beside their answers
        return [row["prompt_ids"], row["chosen_ids"]]
    ids = row["chosen_ids"]
    if "prompt" not in row:
        return [ids]
    prompt = prompt_ids(tokenizer, [row["prompt"]])[0]
    length = shared_length(prompt, ids)
    return [ids[:length], ids[length:]]


def _shown(text: str) -> str:
    return text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")


def _shortened(text: str, width: int) -> str:
    half = max(width // 2, 8)
    return text if len(text) <= 2 * half else f"{text[:half]} … {text[-half:]}"
