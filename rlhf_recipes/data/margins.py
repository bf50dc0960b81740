"""Columns of numbers that a loss reads."""

from typing import Any

import numpy as np
from datasets import Dataset

from rlhf_recipes.data.prompts import MaybeDataset, column_names

NUMBERS = ("margin", "ref_chosen_logps", "ref_rejected_logps")
LARGEST = float(np.finfo(np.float32).max)  # a loss converts them to float32


def check_margins(dataset: MaybeDataset, name: str) -> MaybeDataset:
    """Check that the columns which a loss reads as numbers hold a finite number in every row.

    Args:
        dataset: Dataset of the user. `None` is accepted.
        name: Name of the argument, for the message.

    Returns:
        The same dataset. Of a stream the first row is checked, and the others when they are read.

    Raises:
        ValueError: If a value is missing, infinite, not a number or a boolean. The message names column and row.
    """
    if isinstance(dataset, Dataset):
        for column in set(NUMBERS) & set(dataset.column_names):
            for row, value in enumerate(dataset.with_format(None)[column]):
                _check_number(value, column, row, name)
    elif dataset is not None and set(NUMBERS) & set(column_names(dataset)):
        _check_row(next(iter(dataset)), 0, name)
        return dataset.map(_check_row, with_indices=True, fn_kwargs={"name": name})
    return dataset


def _check_row(example: dict[str, Any], row: int, name: str) -> dict[str, Any]:
    for column in set(NUMBERS) & example.keys():
        _check_number(example[column], column, row, name)
    return example


def _check_number(value: Any, column: str, row: int, name: str) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and -LARGEST <= value <= LARGEST:
        return
    found = "no value" if value is None else repr(value)
    raise ValueError(
        f"`{name}` has {found} as {column!r} in row {row}, where the loss needs a finite number."
        f" Write a number, or drop the row or the column {column!r}."
    )
