"""Check prompts, and set the boundary between prompt and response.

The formats are TRL's: `prompt`; `prompt`, `chosen`, `rejected`; `prompt`, `completion`. Each is text or messages.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from trl import is_conversational

from rlhf_recipes.data.messages import Text
from rlhf_recipes.data.rendering import prompt_ids
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
    kinds = {column: "text" if isinstance(first[column], str) else "messages" for column in columns}
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"{column!r} is {kind}" for column, kind in kinds.items())
        raise ValueError(
            f"`{name}` mixes formats: {listed}. Convert all to one; if the messages of `chosen` and `rejected` hold "
            "the prompt too, drop the column `prompt`."
        )
    if isinstance(dataset, Dataset):
        for row, values in enumerate(rows_of(dataset, columns)):
            for column, text in zip(columns, values, strict=True):
                if _is_empty(text):
                    raise ValueError(f"`{name}` has an empty {column!r} in row {row}. Remove that row.")


def _is_empty(text: Any) -> bool:
    if isinstance(text, list):
        return not text or not (text[-1].get("content") or text[-1].get("tool_calls"))
    return not isinstance(text, str) or not text.strip()


def add_separator(dataset: MaybeDataset, separator: str) -> MaybeDataset:
    """End every plain-text prompt with `separator`. Chat prompts have a template and do not change.

    Raises:
        ValueError: If the prompt of a transcript ends inside the answer, which the separator would cut.
    """
    if dataset is None or separator == "" or is_conversational({"prompt": next(iter(dataset))["prompt"]}):
        return dataset

    def end_prompt(example: dict[str, Any], row: int) -> dict[str, Any]:
        prompt = example["prompt"]
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
    dataset: AnyDataset, tokenizer: PreTrainedTokenizerBase, config: Any, max_new_tokens: int
) -> None:
    """Check that every prompt leaves room for a completion in the model's context.

    Args:
        dataset: Plain or chat prompts. A stream is not checked.
        tokenizer: Tokenizer of the policy.
        config: Configuration of the model. Without a limit on positions, every prompt fits.
        max_new_tokens: Tokens per completion.

    Raises:
        ValueError: If the longest prompt and a completion do not fit.
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is None or not isinstance(dataset, Dataset):
        return
    longest, row = max((prompt_length(prompt, tokenizer), row) for row, prompt in enumerate(dataset["prompt"]))
    if longest + max_new_tokens > limit:
        raise ValueError(
            f"The prompt in row {row} has {longest} tokens; with `max_completion_length` ({max_new_tokens}) it "
            f"exceeds the model's {limit} positions. Shorten or drop long prompts, or lower `max_completion_length`."
        )


def prompt_length(prompt: Text, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of tokens that the policy reads for a prompt."""
    return len(prompt_ids(tokenizer, [prompt])[0])


def first_prompts(dataset: AnyDataset, tokenizer: PreTrainedTokenizerBase, count: int = 3) -> list[list[int]]:
    """Return the token ids of the first prompts of a dataset, as the policy reads them."""
    return prompt_ids(tokenizer, [row["prompt"] for row in itertools.islice(dataset, count)])
