"""Commands that a user types next, in the form in which this run was started.

Imports only the standard library at first: the command line must start at once.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rlhf_recipes.options.shipped import shipped_configurations

# Environment variable with the command that the user has typed, if that is `rlhf`. It is empty where another process,
# for example the quickstart's, tells how to go on.
COMMAND = "RLHF_COMMAND"
LAUNCHED = ("sft", "reward_modeling", "process_reward_modeling", "ppo", "baseline")  # accelerate starts these
WITHOUT_CONFIG = ("compare",)  # its few options are the whole command
# Options of `accelerate launch` that a training takes too. For all others there is `rlhf launch`. No recipe has an
# option with one of these names.
LAUNCHER_OPTIONS = (
    "config_file",
    "num_processes",
    "num_machines",
    "machine_rank",
    "main_process_ip",
    "main_process_port",
    "gpu_ids",
    "mixed_precision",
    "rdzv_backend",
    "rdzv_conf",
    "max_restarts",
)
LAUNCHER_FLAGS = ("cpu", "same_network")
# PPO reads its reward model as a whole model, or as an adapter on the base of the policy.
ALTERNATIVES = {"reward_model_path": "reward_adapter"}


def split_launcher(
    arguments: Sequence[str], parser: type[argparse.ArgumentParser] = argparse.ArgumentParser
) -> tuple[dict[str, Any], list[str]]:
    """Return the options of accelerate among the arguments of a training, and the other arguments."""
    known = parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name in LAUNCHER_OPTIONS:
        known.add_argument(f"--{name}")
    for name in LAUNCHER_FLAGS:
        known.add_argument(f"--{name}", action="store_true")
    namespace, others = known.parse_known_args(arguments)
    return vars(namespace), others


def as_arguments(options: Mapping[str, object]) -> list[str]:
    """Return options as arguments of a command; of one that is `True`, the name alone."""
    pairs = ([f"--{name}"] if value is True else [f"--{name}", str(value)] for name, value in options.items())
    return [part for pair in pairs for part in pair]


def command_of(recipe: str, options: Mapping[str, object]) -> str:
    """Return the command that runs a recipe with options: by `rlhf` if that started this process, else by its file.

    A training gets the options of accelerate that `rlhf` has got for this process.
    """
    launcher: dict[str, Any] = {}
    if typed := os.environ.get(COMMAND):
        start = f"rlhf {recipe.replace('_', '-')}"
        launcher = split_launcher(shlex.split(typed))[0] if recipe in LAUNCHED else {}
    else:
        start = f"{'accelerate launch' if recipe in LAUNCHED else 'python'} recipes/{recipe}.py"
    return " ".join([start, *map(shlex.quote, as_arguments(launcher | dict(options)))])


def following_command(recipe: str, needed: Mapping[str, str], arguments: Sequence[str] | None = None) -> str | None:
    """Return the command of the next stage; `None` if the quickstart runs it, or if a comparison would find no record.

    Where the configuration of this stage has a neighbour for the next one, the command names it, and those options
    that it lacks.

    Args:
        recipe: Recipe of the next stage.
        needed: Options that the next stage needs, by name.
        arguments: Arguments of this stage. Default: those of the process.
    """
    if os.environ.get(COMMAND) == "":
        return None
    if recipe in WITHOUT_CONFIG:
        return command_of(recipe, needed) if needed else None
    given = _given(sys.argv[1:] if arguments is None else arguments)
    config = _neighbour(recipe, given.get("config"))
    known = {} if config is None else _options_in(config)
    if recipe in LAUNCHED:
        options = _added(needed, known, _changed(given))
    else:  # an evaluation is of this result
        options = {name: value for name, value in needed.items() if known.get(name) != value}
    return command_of(recipe, {"config": "YOUR_CONFIG.yaml" if config is None else _name(recipe, config)} | options)


def _given(arguments: Sequence[str]) -> dict[str, str]:
    """Return the options on a command line with their values, by name."""
    parts = [part for each in arguments for part in (each.split("=", 1) if each.startswith("--") else [each])]
    return {name[2:]: value for name, value in pairwise(parts) if name.startswith("--")}


def _neighbour(recipe: str, config: str | None) -> Path | None:
    """Return the configuration of a recipe beside that of this run, with the same ending (`_lora`) if there is one."""
    if config is None:
        return None
    own = Path(config)
    ending = own.stem.rpartition("_")[2]
    candidates = (own.with_name(f"{recipe}_{ending}.yaml"), own.with_name(f"{recipe}.yaml"))
    return next((path for path in candidates if path.is_file()), None)


def _changed(given: Mapping[str, str]) -> dict[str, str]:
    """Return the values on the command line of this stage, by the value in its configuration that each replaces."""
    own = _options_in(Path(given["config"])) if "config" in given else {}
    return {str(own[name]): value for name, value in given.items() if name in own}


def _added(needed: Mapping[str, str], known: Mapping[str, Any], changed: Mapping[str, str]) -> dict[str, str]:
    """Return the options of the next training that its configuration lacks.

    What a configuration says stays, because it may name another model than this result: the reward model of an adapter
    starts from the base. Only a value that the command line of this stage has replaced is replaced there, too.
    """
    added = {}
    for name, value in needed.items():
        own = next((each for each in (name, ALTERNATIVES.get(name)) if each in known), None)
        if own is None:
            added[name] = value
        elif str(known[own]) in changed:
            added[own] = changed[str(known[own])]
        elif name == "dataset_name":  # the data that this stage has made
            added[name] = value
    return added


def _options_in(config: Path) -> dict[str, Any]:
    import yaml  # only the end of a stage needs it

    try:
        options = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):  # the user may still write it, and this stage is done
        options = None
    given = options.items() if isinstance(options, dict) else ()
    return {name: value for name, value in given if value is not None}


def _name(recipe: str, config: Path) -> str:
    """Return the name of a shipped configuration, which `rlhf` knows, or the path."""
    if os.environ.get(COMMAND):
        for name, path in shipped_configurations(recipe).items():
            if path == config.resolve():
                return name
    return str(config)
