"""Check the token ids of rows against the vocabulary and the positions of a model."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rlhf_recipes.data.rendering import prompt_ids

TOKENS = ("input_ids", "prompt_ids", "completion_ids", "chosen_ids", "rejected_ids")  # TRL's columns
BATCH = 1_000  # prompts per call of the tokenizer


def check_ids(lists: pa.ListArray, first_row: int, vocab_size: int | None, tokenizer: Any, name: str) -> None:
    """Check that every token has a row in the embedding of the model.

    Args:
        lists: Token ids of some rows.
        first_row: Number of the first of these rows.
        vocab_size: Rows of the embedding; `None` if the configuration does not say.
        tokenizer: Tokenizer of the rows.
        name: Name of the dataset, for the message.

    Raises:
        ValueError: If a token has none. The message names the token and the row.
    """
    largest = pc.max(lists.flatten()).as_py()
    if vocab_size is None or largest is None or largest < vocab_size:
        return
    outside = pc.greater_equal(lists.flatten(), vocab_size)
    at = pc.index(outside, True).as_py()
    token, row = lists.flatten()[at].as_py(), first_row + pc.list_parent_indices(lists)[at].as_py()
    word = tokenizer.convert_ids_to_tokens(token)
    raise ValueError(
        f"`{name}` has the token {word!r} (id {token}) in row {row}, but the model's vocabulary has"
        f" {vocab_size} tokens. Use the model's own tokenizer, or give the model the new tokens before "
        "training: `model.resize_token_embeddings(len(tokenizer))`, and save both to one directory."
    )


def batches_of_prompt_ids(prompts: Any, tokenizer: PreTrainedTokenizerBase) -> Iterator[pa.ListArray]:
    """Yield the token ids that the policy reads for prompts, in batches."""
    for start in range(0, len(prompts), BATCH):
        yield pa.array(prompt_ids(tokenizer, list(prompts[start : start + BATCH])), type=pa.list_(pa.int64()))


def check_rows(prepared: Dataset, tokenizer: Any, vocab_size: int | None, positions: int | None, name: str) -> None:
    """Check that the model has every token and every position of tokenised rows.

    Args:
        prepared: Rows that TRL has tokenised.
        tokenizer: Tokenizer of the rows.
        vocab_size: Rows of the embedding; `None` if the configuration does not say.
        positions: Length limit of the model; `None` if it has none.
        name: Name of the dataset, for the message.

    Raises:
        ValueError: If a row has a token or a position that the model does not have.
    """
    first_row = 0
    columns = [column for column in TOKENS if column in prepared.column_names]
    for batch in prepared.select_columns(columns).with_format("arrow").iter(batch_size=BATCH):
        lists = {column: batch[column].combine_chunks() for column in batch.column_names}
        for ids in lists.values():
            check_ids(ids, first_row, vocab_size, tokenizer, name)
        if positions is not None:
            _check_length(lists, first_row, positions, name)
        first_row += len(batch)


def _check_length(lists: dict[str, Any], first_row: int, positions: int, name: str) -> None:
    lengths = {column: pc.list_value_length(ids) for column, ids in lists.items()}
    prompts = lengths.pop("prompt_ids", 0)  # DPO's are beside their answers
    for answers in lengths.values():
        total = pc.add(prompts, answers)
        if (longest := pc.max(total).as_py()) > positions:
            row = first_row + pc.index(total, longest).as_py()
            raise ValueError(
                f"`{name}` has {longest} tokens in row {row}, and the model has {positions} positions. Set "
                f"`max_length` to {positions} or less, or shorten the row."
            )
