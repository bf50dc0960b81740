"""The hint at what a misspelt name probably means. Imports only the standard library: the command line uses it."""

import difflib
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "", *, folder: str = "") -> str:
    """Return the end of a message: the nearest known name, or another remedy.

    Args:
        name: Name that is unknown.
        known: Names to choose from.
        otherwise: Remedy where none of them is near.
        folder: Directory of the names, for the message.
    """
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean `{os.path.join(folder, near[0])}`?" if near else otherwise and f" {otherwise}"


def directory_meant(path: str) -> str:
    """Return a hint at the directory whose name is nearest to one that does not exist; "" if none is near."""
    folder, name = os.path.split(path.rstrip("/"))
    there: list[str] = []
    with suppress(OSError):  # nowhere, or not to be read
        there = [entry.name for entry in Path(folder or ".").iterdir() if entry.is_dir()]
    return did_you_mean(name, there, folder=folder)
