"""Checks of the types and ranges of options: a text in place of a number would fail much later, or never."""

import math
import types
from collections.abc import Callable
from enum import Enum
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def check_choice(config: Any, name: str, allowed: tuple[str, ...], reason: str = "") -> None:
    """Refuse a value that is not allowed, and name its option."""
    value = getattr(config, name)
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {value!r}.{reason}")


def check_range(config: Any, name: str, holds: Callable[[Any], bool], claim: str) -> None:
    """Refuse a value that does not meet a condition, and name its option; `None` passes."""
    value = getattr(config, name)
    if value is not None and not holds(value):
        raise ValueError(f"`{name}` must {claim}, got {value}.")


ALSO_BOOLEAN = {"resume_from_checkpoint"}  # transformers declares it as a text
KINDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    type(None): "nothing",
}


def check_types(config: Any) -> None:
    """Check the types of a dataclass's options: numbers, texts, choices, booleans; other types pass.

    Raises:
        ValueError: If a value has another type, or is not a number (NaN).
    """
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name, None)
        allowed = _alternatives(hint) | ({bool} if name in ALSO_BOOLEAN else set())
        choices = [kind for kind in allowed if isinstance(kind, type) and issubclass(kind, Enum)]
        names = [choice.value for kind in choices for choice in kind]
        if not allowed - set(choices) <= KINDS.keys():
            continue
        if names and value not in names:
            raise ValueError(f"`{name}` must be one of {', '.join(map(str, names))}, got {value!r}.")
        if not names and not any(_is(value, kind) for kind in allowed):
            wanted = " or ".join(KINDS[kind] for kind in KINDS if kind in allowed)
            raise ValueError(f"`{name}` must be {wanted}, got {value!r}.")


def _alternatives(hint: Any) -> set[Any]:
    if get_origin(hint) in (Union, types.UnionType):
        return {kind for part in get_args(hint) for kind in _alternatives(part)}
    return {type(value) for value in get_args(hint)} if get_origin(hint) is Literal else {hint}


def _is(value: Any, kind: Any) -> bool:
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is float:
        return isinstance(value, Real) and not math.isnan(value)
    return isinstance(value, Integral if kind is int else kind)
