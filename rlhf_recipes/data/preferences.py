"""Read preferences: of each row a prompt, answers that people chose, and answers that they rejected.

Pairs have TRL's columns `prompt`, `chosen` and `rejected`, or whole chats in the last two. RewardBench adds the column
`subset`. In RewardBench 2, `chosen` and `rejected` are lists of answers.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from datasets import Dataset
from trl import extract_prompt, is_conversational

from rlhf_recipes.data.messages import Text, answer_to, as_text
from rlhf_recipes.data.prompts import add_separator, column_names
from rlhf_recipes.data.rows import mend_transcripts, readable_rows

CATEGORIES = "subset"  # the column with the category in RewardBench and RewardBench 2


def readable_preferences(dataset: Any, name: str) -> Any:
    """Return preferences as text or plain messages, with the boundary of a transcript where the answer begins.

    Raises:
        ValueError: If a row cannot be read (`readable_rows`), or if plain text has no column `prompt`.
    """
    if dataset is None or (not isinstance(dataset, dict) and "chosen_ids" in column_names(dataset)):
        return dataset
    has_prompt = not isinstance(dataset, dict) and "prompt" in column_names(dataset)
    columns = ("prompt", "chosen", "rejected") if has_prompt else ("chosen", "rejected")
    dataset = readable_rows(dataset, columns, name)
    if not has_prompt and not is_conversational(next(iter(dataset))):
        raise ValueError(
            f"`{name}` is plain text without a column 'prompt', so nothing tells where the response begins. Split "
            "dialogues of the form 'Human: .. Assistant: ..' by `dataset.map(split_transcript)` "
            "(`rlhf_recipes.data.transcripts`), and write other prompts into a column 'prompt'."
        )
    return mend_transcripts(dataset)


@dataclass(frozen=True)
class PreferenceSet:
    """Hold R rows to rank.

    Args:
        prompts: Dataset with the column `prompt`, text or messages.
        chosen: Answers of each row that should get the higher scores, at least one.
        rejected: Other answers of each row, at least one.
        categories: Category of each row; `None` if there are none.
        ids: Column `id`; `None` if there is none.
    """

    prompts: Dataset
    chosen: list[list[Text]]
    rejected: list[list[Text]]
    categories: list[str] | None = None
    ids: list[str] | None = None

    @property
    def answers(self) -> list[list[Text]]:
        """Return the answers of each row: first the chosen ones, then the others."""
        return [[*good, *bad] for good, bad in zip(self.chosen, self.rejected, strict=True)]

    @cached_property
    def lengths(self) -> list[list[int]]:
        """Return the number of characters of each answer, in the order of `answers`."""
        return [[len(as_text(answer)) for answer in row] for row in self.answers]

    @property
    def is_pairs(self) -> bool:
        """Return whether every row is one pair."""
        return all(len(row) == 2 for row in self.answers)


def preference_set(rows: Dataset, category_column: str | None = None, name: str = "dataset_name") -> PreferenceSet:
    """Read pairs, whole chats with two ends, or rows of RewardBench 2.

    Args:
        rows: Dataset of the user.
        category_column: Column with the category of each row. Default: `subset`, if there is one.
        name: Option that names the dataset, for messages.

    Raises:
        ValueError: If a column is missing, a row cannot be read (`readable_rows`), or a category is empty.
    """
    categories = _categories(rows, category_column, name)
    ids = [str(value) for value in rows["id"]] if "id" in rows.column_names else None
    first: dict[str, Any] = next(iter(rows), {})
    if any(_is_list_of_texts(first.get(column)) for column in ("chosen", "rejected")):
        for column in ("prompt", "chosen", "rejected"):
            require_column(rows, column, name)
        prompts = readable_rows(rows.select_columns(["prompt"]), ("prompt",), name)
        chosen, rejected = (_lists(rows, prompts, column, name) for column in ("chosen", "rejected"))
    else:
        pairs = _with_prompts(readable_preferences(rows, name), name)
        prompts = pairs.select_columns(["prompt"])
        chosen, rejected = ([[answer] for answer in pairs[column]] for column in ("chosen", "rejected"))
    return PreferenceSet(prompts, chosen, rejected, categories, ids)


def _categories(rows: Dataset, column: str | None, name: str) -> list[str] | None:
    if column is None and CATEGORIES not in rows.column_names:
        return None
    if column is not None:
        require_column(rows, column, name, " with categories (`category_column`)")
    values = rows[column or CATEGORIES]
    for row, value in enumerate(values):
        if value is None or not str(value).strip():
            raise ValueError(
                f"`{name}` has no category in row {row} (column {column or CATEGORIES!r}). Write one, or remove it."
            )
    return [str(value).strip() for value in values]


def require_column(rows: Dataset, column: str, name: str, meaning: str = "") -> None:
    """Refuse a dataset that lacks a column.

    Args:
        rows: Dataset of the user.
        column: Name of the column.
        name: Option that names the dataset.
        meaning: What the column holds, for the message.

    Raises:
        ValueError: If it is missing.
    """
    if column not in rows.column_names:
        raise ValueError(
            f"`{name}` has no column {column!r}{meaning}; it has {', '.join(map(repr, rows.column_names))}. Rename or "
            "add a column."
        )


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], str)


def _lists(rows: Dataset, prompts: Dataset, column: str, name: str) -> list[list[Text]]:
    lists = []
    for row, (prompt, value) in enumerate(zip(prompts["prompt"], rows[column], strict=True)):
        texts = [value] if isinstance(value, str) else value
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(
                f"`{name}` has no list of texts as {column!r} in row {row}. Write at least one text, and no empty one."
            )
        lists.append([answer_to(prompt, text) for text in texts])
    return lists


def _with_prompts(pairs: Any, name: str) -> Dataset:
    """Return pairs of whole chats with the messages that both share as their prompt."""
    if "prompt" in pairs.column_names:
        return pairs
    columns = ("prompt", "chosen", "rejected")
    return readable_rows(pairs.map(extract_prompt).select_columns(list(columns)), columns, name)


def in_form_of(
    prompts: Dataset, answers: list[list[Text]], separator: str, *, conversational: bool
) -> tuple[Dataset, list[list[Text]]]:
    """Return prompts and answers as a reward model reads them.

    Text becomes a chat of two messages for a model that reads chats, as in RewardBench. Prompts of other text get the
    separator. Chats stay.

    Args:
        prompts: Dataset with the column `prompt`.
        answers: Answers to each prompt.
        separator: Separator between prompt and answer of plain text.
        conversational: Whether the reward model reads chats.
    """
    if is_conversational(next(iter(prompts))):
        return prompts, answers
    if not conversational:
        return add_separator(prompts, separator), answers
    chats = Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in prompts["prompt"]]})
    rows = zip(chats["prompt"], answers, strict=True)
    return chats, [[answer_to(prompt, str(text)) for text in texts] for prompt, texts in rows]
