"""`rlhf`: one command for all stages.

Imports no library that takes seconds: a command imports what it needs.
"""

import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module

from rlhf_recipes.command.mistakes import UsageError
from rlhf_recipes.command.stages import STAGES
from rlhf_recipes.options.commands import COMMAND
from rlhf_recipes.options.spelling import did_you_mean

# Commands of this library, beside the recipes: the module with its `main`, and a line for the list.
TOOLS = {
    "init": ("rlhf_recipes.command.project", "Write a project: data, a configuration per stage, the next command."),
    "config": ("rlhf_recipes.command.listing", "List the options of a stage by topic."),
    "migrate": ("rlhf_recipes.command.migrate", "Rewrite a configuration of TRL 1.12's PPO."),
    "doctor": ("rlhf_recipes.command.doctor", "Check whether training can run on this machine."),
    "launch": ("rlhf_recipes.durability.launch", "Start a script of your own: `accelerate launch`, with signals."),
}


def main() -> None:
    """Run the command of this process."""
    os.environ[COMMAND] = shlex.join(["rlhf", *sys.argv[1:]])
    try:
        run(sys.argv[1:])
    except UsageError as mistake:
        sys.stderr.write(f"Error: {mistake}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def run(arguments: Sequence[str]) -> None:
    """Run a command.

    Args:
        arguments: Name of the command, and its own arguments.

    Raises:
        UsageError: If there is no such command.
    """
    name, *rest = arguments or ["--help"]
    stage = name.replace("_", "-")
    if name in ("--help", "-h", "help"):
        sys.stdout.write(overview())
    elif name == "--version":
        sys.stdout.write(f"rlhf_recipes {import_module('rlhf_recipes').__version__}\n")
    elif stage in STAGES:
        run_stage(stage, rest)
    elif name in TOOLS:
        tool: Callable[[Sequence[str]], None] = import_module(TOOLS[name][0]).main
        tool(rest)
    else:
        known = (*STAGES, *TOOLS)
        remedy = did_you_mean(name, known, f"The commands are {', '.join(known)}.")
        raise UsageError(f"`{name}` is no command of `rlhf`.{remedy}")


def run_stage(name: str, arguments: Sequence[str]) -> None:
    """Run a recipe, or print what it does."""
    stage = STAGES[name]
    if stage.kinds and not {"--help", "-h"}.isdisjoint(arguments):
        import_module("rlhf_recipes.command.listing").print_help(name, stage)
    else:
        import_module("rlhf_recipes.command.running").run_recipe(stage, arguments)


def overview() -> str:
    """Return the list of commands."""
    return (
        "rlhf COMMAND [OPTIONS]: train a language model with PPO against a learned reward model.\n\n"
        + _rows("Stages", {name: stage.purpose for name, stage in STAGES.items()})
        + _rows("Tools", {name: purpose for name, (_, purpose) in TOOLS.items()})
        + "`rlhf COMMAND --help` explains one.\n"
    )


def _rows(title: str, purposes: Mapping[str, str]) -> str:
    return f"{title}:\n" + "".join(f"  {name:21} {purpose}\n" for name, purpose in purposes.items()) + "\n"
