"""A mistake on the command line, and what was probably meant."""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """A mistake that the command reports in one line."""


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """Return the end of a message: the nearest known name, or another remedy."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean `{near[0]}`?" if near else otherwise and f" {otherwise}"
