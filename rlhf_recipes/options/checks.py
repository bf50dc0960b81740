"""Checks of the types of options: a text in place of a number would fail much later, or never."""

import json
import math
import os
import types
from collections.abc import Mapping
from enum import Enum
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from rlhf_recipes.options.ranges import check_values

ALSO = {  # types that transformers and TRL take beside those that they declare
    bool: {"resume_from_checkpoint"},
    str: {"lora_target_modules", "loss_type"},  # PEFT knows names for sets of modules; TRL makes a list of one loss
    type(None): {"debug"},
}
REASONS = {"value_head_activation": " ReLU units die, and a dead head cannot follow."}
FILES = {"deepspeed", "fsdp_config", "accelerator_config"}  # mappings that may also be in a file
KINDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    type(None): "nothing",
}


def check_options(config: Any) -> None:
    """Check the types and ranges of a dataclass's options.

    Raises:
        ValueError: If a value has another type or is out of its range. The message names the option.
    """
    check_new(type(config), vars(config))


def check_new(kind: type, options: Mapping[str, Any]) -> None:
    """Check options as a user wrote them, before their dataclass is constructed.

    Args:
        kind: Dataclass of the options.
        options: Options by name; those of other dataclasses are ignored.

    Raises:
        ValueError: See `check_options`.
    """
    hints = {name: hint for name, hint in get_type_hints(kind).items() if name in options}
    for name, hint in hints.items():
        _check_type(name, options[name], hint)
    check_values(kind, {name: options[name] for name in hints})


def _check_type(name: str, value: Any, hint: Any) -> None:
    allowed = _alternatives(hint) | {kind for kind, names in ALSO.items() if name in names}
    if any(dict in (kind, get_origin(kind)) for kind in allowed):
        _check_mapping(name, value)
    elif any(get_origin(kind) in (list, tuple) for kind in allowed):
        _check_list(name, value, allowed)
    else:
        _check_plain(name, value, allowed)


def _check_mapping(name: str, value: Any) -> None:
    if isinstance(value, str) and name in FILES and not value.startswith("{"):
        if not os.path.isfile(value):  # `Path` has an error for a name that is too long
            raise ValueError(f"`{name}` is {value!r}, which is no file. Name a JSON file, or write a mapping.")
        _check_json(name, value)
        return
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        parsed = value
    if parsed is not None and isinstance(parsed, bool | int | float | str | list):
        raise ValueError(f"`{name}` must be a mapping, got {value!r}: write `{name}: {{key: value}}`.")


def _check_json(name: str, file: str) -> None:
    try:
        with open(file, encoding="utf-8") as opened:
            json.load(opened)
    except ValueError as error:
        raise ValueError(f"`{name}` is {file!r}, which is no JSON file: {error}.") from error


def _check_list(name: str, value: Any, allowed: set[Any]) -> None:
    if any(_is(value, kind) for kind in allowed & KINDS.keys()):
        return
    if not isinstance(value, list | tuple):
        raise ValueError(f"`{name}` must be a list, got {value!r}: write `{name}: [{value}]`.")
    (hint,) = (kind for kind in allowed if get_origin(kind) in (list, tuple))
    entries = get_args(hint)
    if get_origin(hint) is tuple and len(value) != len(entries):
        raise ValueError(f"`{name}` must be a list of {len(entries)}, got {value!r}.")
    for entry in value if set(entries) <= KINDS.keys() else []:
        if not any(_is(entry, kind) for kind in entries):
            raise ValueError(f"`{name}` must be a list, and each entry {KINDS[entries[0]]}, got {entry!r}.")


def _check_plain(name: str, value: Any, allowed: set[Any]) -> None:
    choices = {kind: _choices(kind) for kind in allowed}
    names = [choice for found in choices.values() for choice in found]
    if not {kind for kind, found in choices.items() if not found} <= KINDS.keys():
        return
    if names and value not in names and not (value is None and type(None) in allowed):
        reason = REASONS.get(name, "")
        raise ValueError(f"`{name}` must be one of {', '.join(map(str, names))}, got {value!r}.{reason}")
    if not names and not any(_is(value, kind) for kind in allowed):
        wanted = " or ".join(KINDS[kind] for kind in KINDS if kind in allowed)
        raise ValueError(f"`{name}` must be {wanted}, got {value!r}.")


def _choices(kind: Any) -> list[Any]:
    if isinstance(kind, type) and issubclass(kind, Enum):
        return [choice.value for choice in kind]
    return [value for value in get_args(kind) if isinstance(value, str)] if get_origin(kind) is Literal else []


def _alternatives(hint: Any) -> set[Any]:
    if get_origin(hint) in (Union, types.UnionType):
        return {kind for part in get_args(hint) for kind in _alternatives(part)}
    return {hint}


def _is(value: Any, kind: Any) -> bool:
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is float:
        return isinstance(value, Real) and not math.isnan(value)
    return isinstance(value, Integral if kind is int else kind)
