"""Commands that a user types next, in the form in which this run was started.

Imports only the standard library at first: the command line must start at once.
"""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_recipes.options.shipped import shipped_configurations

# Environment variable with the command that the user has typed, if that is `rlhf`. It is empty where another process,
# for example the quickstart's, tells how to go on.
COMMAND = "RLHF_COMMAND"
LAUNCHED = ("sft", "reward_modeling", "ppo", "baseline")  # accelerate starts these
WITHOUT_CONFIG = ("compare",)  # its few options are the whole command


def command_of(recipe: str, options: Mapping[str, object]) -> str:
    """Return the command that runs a recipe with options: by `rlhf` if that started this process, else by its file."""
    if os.environ.get(COMMAND):
        start = f"rlhf {recipe.replace('_', '-')}"
    else:
        start = f"{'accelerate launch' if recipe in LAUNCHED else 'python'} recipes/{recipe}.py"
    return " ".join([start, *(f"--{name} {shlex.quote(str(value))}" for name, value in options.items())])


def following_command(recipe: str, needed: Mapping[str, str], arguments: Sequence[str] | None = None) -> str | None:
    """Return the command of the next stage; `None` if the quickstart runs it.

    Where the configuration of this stage has a neighbour for the next one, the command names it, and those options
    that it has with other values.

    Args:
        recipe: Recipe of the next stage.
        needed: Options that the next stage needs, by name.
        arguments: Arguments of this stage. Default: those of the process.
    """
    if os.environ.get(COMMAND) == "":
        return None
    config = _neighbour(recipe, list(sys.argv[1:] if arguments is None else arguments))
    known = {} if config is None else _options_in(config)
    options = {name: value for name, value in needed.items() if known.get(name) != value}
    if recipe not in WITHOUT_CONFIG:
        options = {"config": "YOUR_CONFIG.yaml" if config is None else _name(recipe, config)} | options
    return command_of(recipe, options)


def _neighbour(recipe: str, arguments: list[str]) -> Path | None:
    """Return the configuration of a recipe beside that of this run, with the same ending (`_lora`) if there is one."""
    if "--config" not in arguments[:-1]:
        return None
    own = Path(arguments[arguments.index("--config") + 1])
    ending = own.stem.rpartition("_")[2]
    candidates = (own.with_name(f"{recipe}_{ending}.yaml"), own.with_name(f"{recipe}.yaml"))
    return next((path for path in candidates if path.is_file()), None)


def _options_in(config: Path) -> dict[str, Any]:
    import yaml  # only the end of a stage needs it

    options = yaml.safe_load(config.read_text(encoding="utf-8"))
    return options if isinstance(options, dict) else {}


def _name(recipe: str, config: Path) -> str:
    """Return the name of a shipped configuration, which `rlhf` knows, or the path."""
    if os.environ.get(COMMAND):
        for name, path in shipped_configurations(recipe).items():
            if path == config.resolve():
                return name
    return str(config)
