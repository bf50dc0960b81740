"""The parser of the tools: a mistake is one line with the remedy."""

import argparse
from typing import Any, NoReturn

from rlhf_recipes.command.mistakes import UsageError
from rlhf_recipes.options.spelling import did_you_mean


class ArgumentParser(argparse.ArgumentParser):
    """Parse the arguments of `rlhf TOOL`.

    Args:
        tool: Name of the tool.
        purpose: What it does.
    """

    def __init__(self, tool: str, purpose: str) -> None:
        self.known: list[str] = []
        super().__init__(f"rlhf {tool}", description=purpose, allow_abbrev=False)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:  # type: ignore[override]
        """Add an argument, and remember its name for a misspelt one."""
        self.known += [name for name in names if name.startswith("--")]
        return super().add_argument(*names, **options)

    def parse_args(self, arguments: Any = None, namespace: Any = None) -> Any:
        """Return the arguments.

        Raises:
            UsageError: If one is unknown or wrong.
        """
        asked, unknown = self.parse_known_args(arguments, namespace)
        if unknown and unknown[0].partition("=")[0] in self.known:  # argparse reads no argument there
            raise UsageError(f"`{unknown[0]}` comes after `--`, where only names are read: leave out `--`.")
        if unknown:
            remedy = did_you_mean(unknown[0], self.known, f"`{self.prog} --help` lists the arguments.")
            raise UsageError(f"`{unknown[0]}` is no argument of `{self.prog}`.{remedy}")
        return asked

    def error(self, message: str) -> NoReturn:
        """Raise a mistake that argparse has found."""
        raise UsageError(f"{message[:1].upper()}{message[1:]}. `{self.prog} --help` lists the arguments.")
