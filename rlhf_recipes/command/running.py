"""Run a recipe: find its configuration, split off the launcher's options, and start it."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from rlhf_recipes.command.mistakes import UsageError
from rlhf_recipes.command.stages import Stage
from rlhf_recipes.durability import launch
from rlhf_recipes.options import commands
from rlhf_recipes.options.shipped import shipped, shipped_configurations, shipped_launch_files
from rlhf_recipes.options.spelling import did_you_mean


def run_recipe(stage: Stage, arguments: Sequence[str]) -> NoReturn:
    """Run a recipe, and end with its exit code."""
    script = shipped("recipes") / f"{stage.script}.py"
    if stage.launched:
        launcher, options = split_launcher(arguments)
        check_processes(launcher)
        launch.main([*launcher, str(script), *with_configuration(stage, options)])
        sys.exit()
    options = with_configuration(stage, arguments)
    # The recipe takes the place of this process, so its signals and its exit code are those of the command.
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, str(script), *options])


def with_configuration(stage: Stage, arguments: Sequence[str]) -> list[str]:
    """Return the arguments with the path of the configuration, and say on stderr which one that is."""
    options = [part for each in arguments for part in (each.split("=", 1) if each.startswith("--config=") else [each])]
    if "--config" in options[:-1]:
        place = options.index("--config") + 1
        options[place] = found("config", options[place], shipped_configurations(stage.script))
    return options


def found(option: str, name: str, known: Mapping[str, Path]) -> str:
    """Return the path of a file, or of a shipped configuration with this name.

    Raises:
        UsageError: If there is neither.
    """
    path = known.get(name.removesuffix(".yaml"))
    if os.path.isfile(name):
        also = f" (a file here, not the shipped {path})" if path is not None else ""
        sys.stderr.write(f"`--{option}` is {name}{also}.\n")
        return name
    if path is None:
        remedy = f"Shipped are {', '.join(known)}." if known else "None is shipped for this command."
        hint = did_you_mean(name.removesuffix(".yaml"), known)
        raise UsageError(f"`--{option}` {name} is no file and no shipped configuration.{hint} {remedy}")
    sys.stderr.write(f"`--{option}` {name} is the shipped {path}.\n")
    return str(path)


def split_launcher(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the arguments of accelerate, and those of the recipe.

    Without `--config_file` and `--num_processes` there is one process, unless `accelerate config` has written the
    user's own file.
    """
    asked, options = commands.split_launcher(arguments, _LauncherParser)
    if "config_file" in asked:
        asked["config_file"] = found("config_file", asked["config_file"], shipped_launch_files())
    elif not _has_own_file():
        asked = _one_process(asked) | asked
    return commands.as_arguments(asked), options


def check_processes(launcher: Sequence[str]) -> None:
    """Refuse more processes than GPUs where accelerate would start a single one without a word.

    Args:
        launcher: Arguments of accelerate, as `split_launcher` returns them. A file of accelerate counts instead.

    Raises:
        UsageError: If there are more.
    """
    if "--num_processes" not in launcher or "--config_file" in launcher or _has_own_file():
        return
    asked = launcher[launcher.index("--num_processes") + 1]
    machines = launcher[launcher.index("--num_machines") + 1] if "--num_machines" in launcher else "1"
    if asked == "1" or not (asked.isdecimal() and machines.isdecimal()):
        return
    from torch import accelerator  # takes seconds

    gpus = 0 if "--cpu" in launcher else accelerator.device_count()
    if int(asked) > gpus * int(machines):
        raise UsageError(
            f"`--num_processes` {asked} needs as many GPUs, and this training has {gpus}. Leave it out to train in "
            "one process, or start each machine with `--num_machines`."
        )


class _LauncherParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message[:1].upper()}{message[1:]}.")


def _has_own_file() -> bool:
    # The place of `accelerate.commands.config.default_config_file`, whose import takes seconds.
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(home, "accelerate", "default_config.yaml").expanduser().is_file()


def _one_process(asked: Mapping[str, object]) -> dict[str, str]:
    """Return values that accelerate would otherwise guess, with a warning about each."""
    chosen = {"num_machines": "1", "mixed_precision": "no", "dynamo_backend": "no"}
    if "num_processes" not in asked:
        chosen["num_processes"] = "1"
        if "CUDA_VISIBLE_DEVICES" not in os.environ:
            chosen["gpu_ids"] = "0"  # the trainers refuse one process that sees several GPUs
    return chosen
