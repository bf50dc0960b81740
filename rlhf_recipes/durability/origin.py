"""Where a run comes from: commit, versions, command and configuration, without paths and secrets of the machine."""

import functools
import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlhf_recipes.options.secrets import SECRET_NAMES, redact
from rlhf_recipes.options.shipped import shipped, shipped_configurations

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "rlhf-recipes")
# Options about the record of a run, not about the run: addresses of servers, ids and names of trackers.
_OF_TRACKING = ("tracking", "experiment_name", "parent_run_id", "log_model", "registered_", "env", "report_to", "run_")
_LOCAL_SCHEME = re.compile(r"\b(?:file|sqlite):/+")
_ABSOLUTE = re.compile(r"(?<![\w.:/~])(?:/|~[\w-]*/)[^\s\"'`,;:]+")


def versions() -> dict[str, str]:
    """Return the versions of the packages that are installed, by name."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
            continue
    return found


def git_tags() -> dict[str, str]:
    """Return the commit of the working directory and whether its files differ from it. An image has its own commit."""
    commit = _git("rev-parse", "HEAD")
    if not commit:
        built = os.environ.get("RLHF_RECIPES_COMMIT")
        return {"git.commit": built} if built else {}
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {"git.commit": commit} | ({} if changed is None else {"git.dirty": str(bool(changed)).lower()})


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def public_text(text: str) -> str:
    """Return text without secrets and without the absolute paths of this machine.

    A path inside the working directory becomes relative to it. Of another one, the last name stays.
    """
    return _ABSOLUTE.sub(lambda found: _public_path(found[0]), _LOCAL_SCHEME.sub("/", redact(text)))


def _public_path(path: str) -> str:
    whole = Path(os.path.expanduser(path))
    return str(whole.relative_to(Path.cwd())) if whole.is_relative_to(Path.cwd()) else whole.name


def command_of(arguments: Sequence[str], num_processes: int = 1, module: str | None = None) -> str | None:
    """Return the command that starts a run again; `None` if no script has started it.

    A shipped recipe is written as a command of `rlhf`.

    Args:
        arguments: `sys.argv` of the run.
        num_processes: Processes that accelerate started.
        module: Name of the module that `python -m` runs; `None` for a file.
    """
    script, options = Path(arguments[0]), list(arguments[1:])
    if script.suffix != ".py" or "ipykernel" in script.name:
        return None
    is_recipe = script.resolve() == (shipped("recipes") / script.name).resolve()  # a user may have a `ppo.py`, too
    start = ["rlhf", script.stem.replace("_", "-")] if is_recipe else ["accelerate", "launch"]
    if num_processes > 1:
        start += ["--num_processes", str(num_processes)]
    own = [] if is_recipe else ["-m", module] if module else [script.name]
    return shlex.join([*start, *own, *(_public_argument(script.stem, part) for part in _without_tracking(options))])


def _module_of(script: str) -> str | None:
    """Return the module that `python -m` runs, if this is its file."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return None if spec is None or spec.origin != script else str(spec.name).removesuffix(".__main__")


def _without_tracking(options: list[str]) -> list[str]:
    kept, is_shown = [], True
    for part in options:
        if part.startswith("--"):
            is_shown = not _is_private(part[2:].partition("=")[0])
        if is_shown:
            kept.append(part)
    return kept


def _is_private(name: str) -> bool:
    return name.startswith(_OF_TRACKING) or SECRET_NAMES.search(name) is not None


def _public_argument(recipe: str, argument: str) -> str:
    known = {str(path): name for name, path in shipped_configurations(recipe).items()}
    return known.get(argument) or public_text(argument)


def configuration_of(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the options in the YAML file of `--config`, without those of the trackers; none without such a file."""
    options = [part for each in arguments for part in each.split("=", 1)]
    file = Path(options[options.index("--config") + 1]) if "--config" in options[:-1] else None
    try:
        given = yaml.safe_load(file.read_text(encoding="utf-8")) if file is not None else None
    except (OSError, ValueError, yaml.YAMLError):  # a script of the user may mean another kind of file
        given = None
    if not isinstance(given, dict):
        return {}
    return {str(name): _public_value(value) for name, value in given.items() if not _is_private(str(name))}


def _public_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _public_value(entry) for name, entry in value.items() if not _is_private(str(name))}
    if isinstance(value, list):
        return [_public_value(entry) for entry in value]
    return public_text(value) if isinstance(value, str) else value


@dataclass(frozen=True)
class Origin:
    """What the start of a run says about its origin.

    Args:
        command: Command that starts it again; `None` if no script has started it.
        configuration: Options in the YAML file of the command.
        commit: Commit of the working directory, and whether its files differ from it.
        packages: Versions by package.
    """

    command: str | None
    configuration: dict[str, Any]
    commit: str | None
    packages: dict[str, str]

    @classmethod
    def of_process(cls, num_processes: int) -> "Origin":
        """Return the origin of the run of this process.

        Args:
            num_processes: Processes that accelerate started.
        """
        command = command_of(sys.argv, num_processes, _module_of(sys.argv[0]))
        return cls(command, configuration_of(sys.argv), *_code_in(os.getcwd()))


@functools.cache  # the code that a process has loaded is that of its start
def _code_in(directory: str) -> tuple[str | None, dict[str, str]]:
    tags = git_tags()
    changed = ", with changes that are not committed" if tags.get("git.dirty") == "true" else ""
    return (f"{tags['git.commit']}{changed}" if "git.commit" in tags else None), versions()
