"""Options that name something elsewhere: the output of an earlier stage, a model on the Hub, a server, a function."""

import os
import re
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from rlhf_recipes.options.shipped import shipped_configurations

# The stage of the quickstart that writes each folder.
QUICKSTART_STAGES = {
    **dict.fromkeys(("base", "data", "prompts"), "world"),
    **{stage: stage for stage in ("preferences", "sft", "reward_modeling", "ppo")},
}


def is_address(path: Any) -> bool:
    """Return whether this is the address of a server."""
    return isinstance(path, str) and path.startswith(("http://", "https://"))


def is_function(reference: str) -> bool:
    """Return whether this has the form `package.module:function`."""
    module, _, name = reference.partition(":")
    return all(part.isidentifier() for part in (*module.split("."), name))


def why_unread(path: str, *files: str, revision: str | None = None) -> str | None:
    """Return why a directory, or a name on the Hub, has none of the files; `None` if it has one."""
    reasons = []
    for name in files:
        try:
            if cached_file(path, name, revision=revision):
                return None
            reasons.append(f"it has no `{name}`")
        except (OSError, ValueError) as error:
            reasons.append(" ".join(str(error).split()))
    return reasons[0]


def require_path(option: str, path: str | None) -> str:
    """Return an existing local path, or a name on the Hub; for a missing output of a stage, name the stage's command.

    By convention a stage writes `runs/<model>/<stage>` from the shipped configuration `<model>/<stage>`, or from
    `<stage>.yaml` in the working directory. `rlhf quickstart` writes all of `runs/<world>`.

    Args:
        option: Name of the option, for the message.
        path: Value of the option.

    Raises:
        ValueError: If `path` is `None`.
        FileNotFoundError: If it is a local path that does not exist.
    """
    if path is None:
        raise ValueError(f"`{option}` is not set.")
    if os.path.exists(path) or not path.startswith((".", "/", "~", "runs/")):
        return path
    match Path(path).parts:
        case ("runs", "quickstart" | "report" as world, name) if name in QUICKSTART_STAGES:
            option_of_world = "" if world == "quickstart" else f"--world {world} "
            command = f"`rlhf quickstart {option_of_world}--until {QUICKSTART_STAGES[name]}`"
        case ("runs", "smollm2_135m", "base"):
            command = "`make smollm2`"
        case ("runs", model, name) if recipe := re.fullmatch(r"(sft|reward_modeling|ppo)(_\w+)?", name):
            own = f"{name}.yaml" if os.path.isfile(f"{name}.yaml") else "YOUR_CONFIG.yaml"
            config = next((c for c in shipped_configurations(name) if c.startswith(f"{model}/")), own)
            command = f"`rlhf {recipe[1].replace('_', '-')} --config {config}`"
        case _:
            raise FileNotFoundError(f"`{option}` is {path}, which does not exist.")
    raise FileNotFoundError(f"`{option}` is {path}, which does not exist. Run {command} first.")
