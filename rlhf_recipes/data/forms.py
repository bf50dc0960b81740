"""The forms that a prompt or an answer may have: text, or a list of messages."""

from collections.abc import Iterable
from typing import Any

ADVICE = 'Use text, or a list of messages such as `[{"role": "assistant", "content": ".."}]`.'


def form_of(value: Any) -> str:
    """Return the form of a prompt or an answer: `text`, `messages`, or the name of another form."""
    if isinstance(value, str):
        return "text"
    if isinstance(value, dict):
        return f"a dictionary with the keys {', '.join(map(repr, value))}"
    if isinstance(value, int | float):
        return f"a number ({type(value).__name__})"
    if not isinstance(value, list):
        return f"a value of the type {type(value).__name__}"
    strange = next((m for m in value if not isinstance(m, dict) or not {"role", "from"} & m.keys()), None)
    return "messages" if strange is None else f"a list of {_described(strange)}"


def _described(message: Any) -> str:
    if isinstance(message, dict):
        return f"dictionaries with the keys {', '.join(map(repr, message))} instead of 'role' and 'content'"
    return f"the type {type(message).__name__}"


def check_forms(values: Iterable[Any], column: str, name: str, first_row: int = 0) -> None:
    """Check that every value of a column is text, or that every value is a list of messages, and none is empty.

    Args:
        values: Values of the column.
        column: Name of the column, for the message.
        name: Name of the dataset, for the message.
        first_row: Number of the first value.

    Raises:
        ValueError: If a value is empty, or has another form than those before it. The message names its row.
    """
    first = None
    for row, value in enumerate(values, start=first_row):
        if _is_empty(value):
            raise ValueError(f"`{name}` has an empty {column!r} in row {row}. Remove that row.")
        form = form_of(value)
        if form not in ("text", "messages"):
            raise ValueError(f"`{name}` has {form} as {column!r} in row {row}. {ADVICE}")
        first = first or form
        if form != first:
            raise ValueError(
                f"`{name}` has {form} as {column!r} in row {row}, and {first} before. Convert all to one."
            )


def _is_empty(value: Any) -> bool:
    if isinstance(value, list) and value and isinstance(value[-1], dict) and {"role", "from"} & value[-1].keys():
        return not any(value[-1].get(key) for key in ("content", "value", "tool_calls"))
    return value is None or value == [] or (isinstance(value, str) and not value.strip())
