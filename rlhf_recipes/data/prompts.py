"""Check prompts, and set the boundary between prompt and response.

The formats are TRL's: `prompt`; `prompt`, `chosen`, `rejected`; `prompt`, `completion`. Each is text or messages.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from trl import is_conversational

from rlhf_recipes.data.forms import check_forms, form_of
from rlhf_recipes.data.rendering import prompt_ids
from rlhf_recipes.data.tokens import batches_of_prompt_ids, check_ids
from rlhf_recipes.data.transcripts import begun_answer

AnyDataset: TypeAlias = Dataset | IterableDataset
MaybeDataset = TypeVar("MaybeDataset", Dataset, IterableDataset, None)


def column_names(dataset: AnyDataset) -> list[str]:
    """Return the names of the columns. A stream may not declare them, so its first row is read."""
    return list(dataset.column_names or next(iter(dataset), {}))


def rows_of(dataset: AnyDataset, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """Return the values of columns row by row, read in batches. Of a stream, return the first row only."""
    if not isinstance(dataset, Dataset):
        first = next(iter(dataset))
        yield tuple(first[column] for column in columns)
        return
    for batch in dataset.select_columns(list(columns)).iter(batch_size=1_000):
        yield from zip(*(batch[column] for column in columns), strict=True)


def check_columns(dataset: AnyDataset | None, columns: tuple[str, ...], name: str) -> None:
    """Check that a dataset has rows, and text in the columns that a trainer needs.

    Args:
        dataset: Dataset of the user. `None` is accepted.
        columns: Names of the required columns.
        name: Name of the argument, for the message.

    Raises:
        ValueError: If it is empty, lacks a column, mixes text and messages, or has an empty prompt or completion.
    """
    if dataset is None:
        return
    if isinstance(dataset, dict):
        raise ValueError(f"`{name}` is a dictionary of {', '.join(map(repr, dataset))}: pass one of them.")
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"`{name}` is empty.")
    missing = [column for column in columns if column not in first]
    if missing:
        raise ValueError(
            f"`{name}` has no column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, first))}. Rename "
            "or convert the columns (`dataset.rename_column`)."
        )
    kinds = {column: form_of(first[column]) for column in columns}
    if set(kinds.values()) == {"text", "messages"}:
        listed = ", ".join(f"{column!r} is {kind}" for column, kind in kinds.items())
        raise ValueError(
            f"`{name}` mixes formats: {listed}. Convert all to one; if the messages of `chosen` and `rejected` hold "
            "the prompt too, drop the column `prompt`."
        )
    for column in columns:
        check_forms((value for (value,) in rows_of(dataset, (column,))), column, name)


def add_separator(dataset: MaybeDataset, separator: str) -> MaybeDataset:
    """End every plain-text prompt with `separator`. Chat prompts have a template and do not change.

    Raises:
        ValueError: If the prompt of a transcript ends inside the answer, which the separator would cut.
    """
    if dataset is None or separator == "" or is_conversational({"prompt": next(iter(dataset))["prompt"]}):
        return dataset

    def end_prompt(example: dict[str, Any], row: int) -> dict[str, Any]:
        prompt = example["prompt"]
        check_forms([prompt], "prompt", "train_dataset", row)  # of a stream, only the first row was checked before
        if prompt.endswith(separator):
            return {"prompt": prompt}
        if begun := begun_answer(prompt):
            raise ValueError(
                f"The prompt in row {row} ends inside the assistant's answer ({begun[-40:]!r}), where "
                "`response_separator` would cut it. Split whole dialogues by `dataset.map(split_transcript)` "
                "(`rlhf_recipes.data.transcripts`), or set `response_separator: ''`."
            )
        return {"prompt": prompt + separator}

    return dataset.map(end_prompt, with_indices=True)


def check_prompts_fit(
    dataset: AnyDataset | None, tokenizer: PreTrainedTokenizerBase, config: Any, max_new_tokens: int, name: str
) -> float:
    """Check that the model knows every token of the prompts, and that each prompt leaves room for a completion.

    Args:
        dataset: Plain or chat prompts. `None` and a stream are not checked.
        tokenizer: Tokenizer of the policy.
        config: Configuration of the model. Without a limit on positions, every prompt fits.
        max_new_tokens: Tokens per completion.
        name: Name of the argument, for the message.

    Returns:
        Number of tokens that the longest prompt and its completion can have; infinite if it is not known.

    Raises:
        ValueError: If a prompt and a completion do not fit, or a token is not in the vocabulary.
    """
    if not isinstance(dataset, Dataset):
        return math.inf
    own = config.get_text_config()
    limit, vocab_size = getattr(own, "max_position_embeddings", None), getattr(own, "vocab_size", None)
    lengths: list[int] = []
    for ids in batches_of_prompt_ids(dataset["prompt"], tokenizer):
        check_ids(ids, len(lengths), vocab_size, tokenizer, name)
        lengths += ids.value_lengths().to_pylist()
    too_long = [row for row, length in enumerate(lengths) if limit is not None and length + max_new_tokens > limit]
    if too_long:
        row = max(too_long, key=lengths.__getitem__)
        count = f" {len(too_long):,} of {len(lengths):,} prompts do." if len(too_long) > 1 else ""
        raise ValueError(
            f"The prompt in row {row} of `{name}` has {lengths[row]} tokens; with `max_completion_length` "
            f"({max_new_tokens}) it exceeds the model's {limit} positions.{count} Shorten or drop long prompts, or "
            "lower `max_completion_length`."
        )
    return max(lengths) + max_new_tokens


def first_prompts(dataset: AnyDataset, tokenizer: PreTrainedTokenizerBase, count: int = 3) -> list[list[int]]:
    """Return the token ids of the first prompts of a dataset, as the policy reads them."""
    return prompt_ids(tokenizer, [row["prompt"] for row in itertools.islice(dataset, count)])
