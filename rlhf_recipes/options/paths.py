"""Paths that options name: where an earlier stage has left its output."""

import re
from pathlib import Path


def require_path(option: str, path: str | None) -> str:
    """Return `path` if it can be loaded from; a missing output of an earlier stage is named with its command.

    By convention `recipes/<stage>.py` writes `runs/<model>/<stage>` from `recipes/configs/<model>/<stage>.yaml`, and
    `recipes/quickstart.py` all of `runs/quickstart`.

    Args:
        option: Name of the option, for the message.
        path: Its value: a local path, or a name on the Hub.

    Raises:
        ValueError: If `path` is `None`.
        FileNotFoundError: If it is a local path that does not exist.
    """
    if path is None:
        raise ValueError(f"`{option}` is not set.")
    if Path(path).exists() or not path.startswith((".", "/", "~", "runs/")):
        return path
    match Path(path).parts:
        case ("runs", "quickstart", "base" | "data" | "prompts"):
            command = "`python recipes/quickstart.py --until world`"
        case ("runs", "quickstart", "preferences" | "sft" | "reward_modeling" | "ppo" as stage):
            command = f"`python recipes/quickstart.py --until {stage}`"
        case ("runs", "smollm2_135m", "base"):
            command = "`make smollm2`"
        case ("runs", model, name) if recipe := re.fullmatch(r"(sft|reward_modeling|ppo)(_\w+)?", name):
            shipped = sorted(Path("recipes", "configs", model).glob(f"{name}*.yaml"))
            config = f"recipes/configs/{model}/{shipped[0].name}" if shipped else "YOUR_CONFIG.yaml"
            command = f"`accelerate launch recipes/{recipe[1]}.py --config {config}`"
        case _:
            raise FileNotFoundError(f"`{option}` is {path}, which does not exist.")
    raise FileNotFoundError(f"`{option}` is {path}, which does not exist. Run {command} first.")
