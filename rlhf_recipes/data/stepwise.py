"""Read rows with a label for each step: TRL's former format `prompt`, `completions`, `labels`."""

import logging
from collections.abc import Sequence
from numbers import Real
from typing import Any

from datasets import Dataset

from rlhf_recipes.data.prompts import AnyDataset, column_names, rows_of
from rlhf_recipes.data.rows import readable_rows
from rlhf_recipes.data.steps import StepRule

COLUMNS = ("prompt", "completions", "labels")
logger = logging.getLogger(__name__)


def readable_steps(dataset: Any, name: str, rule: StepRule) -> Any:
    """Return a dataset with readable prompts, and check the steps of every row and their labels.

    Of a stream only the first row is checked here, and the others when they are tokenised.

    Args:
        dataset: Dataset of the user. `None` is accepted.
        name: Name of the argument, for the message.
        rule: Where a step ends.

    Raises:
        ValueError: If a column is missing, or a row has no steps, an empty one, or other labels than one per step.
    """
    if dataset is None or (not isinstance(dataset, dict) and "input_ids" in column_names(dataset)):
        return dataset
    dataset = readable_rows(dataset, ("prompt",), name)
    missing = [column for column in COLUMNS if column not in column_names(dataset)]
    if missing:
        raise ValueError(
            f"`{name}` has no column {', '.join(map(repr, missing))}. A row needs 'prompt' (text or messages), "
            "'completions' (a list of steps) and 'labels' (one per step: true or false, or a number from 0 to 1)."
        )
    unlike = []
    for row, (steps, labels) in enumerate(rows_of(dataset, COLUMNS[1:])):
        check_steps(steps, labels, row, name)
        if not rule.splits(list(steps)):
            unlike.append(row)
    _say_unlike(dataset, unlike, name, rule)
    return dataset


def check_steps(steps: Any, labels: Any, row: int, name: str) -> None:
    """Check the steps of a row and their labels.

    Raises:
        ValueError: If there are none, one is empty, or there is not one label in [0, 1] for each.
    """
    where = f"in row {row} of `{name}`"
    if not isinstance(steps, Sequence) or isinstance(steps, str) or not steps:
        raise ValueError(f"'completions' {where} must be a list of at least one step, got {steps!r}.")
    for number, step in enumerate(steps):
        if not isinstance(step, str) or not step.strip():
            raise ValueError(f"Step {number} {where} is {step!r}. Write a text, or drop the step and its label.")
    if not isinstance(labels, Sequence) or len(labels) != len(steps):
        count = len(labels) if isinstance(labels, Sequence) else 0
        raise ValueError(f"There are {len(steps)} steps and {count} labels {where}. Write one label per step.")
    for number, label in enumerate(labels):
        if not (isinstance(label, Real) and 0 <= float(label) <= 1):
            raise ValueError(
                f"The label of step {number} {where} is {label!r}. Write true or false, or the probability that the "
                "step is right, from 0 to 1."
            )


def _say_unlike(dataset: AnyDataset, rows: list[int], name: str, rule: StepRule) -> None:
    if not rows:
        return
    count = f"{len(rows):,} of {len(dataset):,} rows" if isinstance(dataset, Dataset) else "rows"
    logger.warning(
        f"`{name}`: the steps of {count}, for example row {rows[0]}, would be others if their text were split by "
        f"`step_separator` {rule.separator!r} and `step_boundary: {rule.boundary}`. PPO splits answers in this way. "
        "Choose values that fit the data."
    )
