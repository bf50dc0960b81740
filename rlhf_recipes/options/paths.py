"""Options that name something elsewhere: the output of an earlier stage, a model on the Hub, a server, a function."""

import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers.utils import cached_file

from rlhf_recipes.options.shipped import shipped_configurations
from rlhf_recipes.options.spelling import directory_meant

# Reasons why the Hub gives no file, by the error; the first one that fits counts.
REASONS = (
    (GatedRepoError, "the Hub asks you to accept the terms of its owner: do it on its page, and set HF_TOKEN"),
    (RepositoryNotFoundError, "the Hub has none of this name, or it is private: correct the name, or set HF_TOKEN"),
    (RevisionNotFoundError, "the Hub has no such revision of it"),
    (
        (LocalEntryNotFoundError, OfflineModeIsEnabled),
        "the Hub does not answer or HF_HUB_OFFLINE is set, and its cache here has none of this name: correct the "
        "path, or download it before",
    ),
)
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


def is_judge_file(reference: str) -> bool:
    """Return whether this names the YAML file of a judge."""
    return reference.endswith((".yaml", ".yml"))


def function_name(reference: str) -> str:
    """Return the name of a function or of a judge: the part after the colon, or the name of the file."""
    return Path(reference).stem if is_judge_file(reference) else reference.split(":")[-1]


def why_unread(path: str, *files: str, revision: str | None = None) -> str | None:
    """Return why a directory, or a name on the Hub, has none of the files; `None` if it has one."""
    reasons = []
    for name in files:
        try:
            if cached_file(path, name, revision=revision):
                return None
            reasons.append(f"it has no `{name}`")
        except (OSError, ValueError) as error:
            reasons.append(_reason(error))
    return reasons[0]


def _reason(error: Exception) -> str:
    """Return why the Hub gives no file, in words of this library where they are known."""
    known = (reason for kinds, reason in REASONS if isinstance(error.__cause__, kinds))
    return next(known, " ".join(str(error).split()))


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
        case ("runs", model, name) if recipe := re.fullmatch(r"(sft|(?:process_)?reward_modeling|ppo)(_\w+)?", name):
            own = f"{name}.yaml" if os.path.isfile(f"{name}.yaml") else "YOUR_CONFIG.yaml"
            config = next((c for c in shipped_configurations(name) if c.startswith(f"{model}/")), own)
            command = f"`rlhf {recipe[1].replace('_', '-')} --config {config}`"
        case _:
            raise FileNotFoundError(f"`{option}` is {path}, which does not exist.{directory_meant(path)}")
    raise FileNotFoundError(f"`{option}` is {path}, which does not exist. Run {command} first.")
