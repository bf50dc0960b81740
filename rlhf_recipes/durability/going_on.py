"""The command that goes on with a run, as its user would type it."""

import os
import shlex
import sys
from collections.abc import Sequence

import psutil

from rlhf_recipes.options.commands import COMMAND
from rlhf_recipes.options.secrets import redact


def remedy(option: str = "", value: str = "") -> str:
    """Return the end of a message: the command that goes on, or nothing where another process tells it.

    Call it before a signal comes: Ctrl-C also ends the launcher of accelerate, whose command is looked for.

    Args:
        option: Option that the command needs for it. It replaces the same option of the first command.
        value: Value of the option.
    """
    command = command_line()
    if option and command:
        command = [*_without(command, option), option, value]
    return f" To go on: {redact(shlex.join(command))}" if command else ""


def command_line() -> list[str]:
    """Return the command of the user: `rlhf`, a launcher, or Python. It is empty if another process tells it."""
    known = os.environ.get(COMMAND)
    if known is not None:
        return shlex.split(known)
    parent = _launcher()
    return sys.orig_argv if parent is None else parent


def _launcher() -> list[str] | None:
    """Return the command of the process that started this one, if that names the same script."""
    try:
        command = psutil.Process().parent().cmdline()  # type: ignore[union-attr]
    except (psutil.Error, AttributeError):  # no parent, or one of another user
        return None
    if sys.argv[0] not in command:
        return None
    # The system shows a script of the environment as `/bin/python /bin/accelerate launch ..`.
    is_script = len(command) > 1 and os.path.basename(command[0]).startswith("python") and os.path.isabs(command[1])
    return [os.path.basename(command[1]), *command[2:]] if is_script else command


def _without(command: Sequence[str], option: str) -> list[str]:
    """Return a command without an option and its value."""
    kept = [part for part in command if not part.startswith(f"{option}=")]
    if option in kept:
        place = kept.index(option)
        del kept[place : place + 2]
    return kept
