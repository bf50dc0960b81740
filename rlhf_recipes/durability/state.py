"""The state that PPO keeps between rollouts and that no library saves: one JSON file in every checkpoint."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

STATE_FILE = "ppo_state.json"
PROGRESS_FILE = "ppo_progress_{}.pt"  # by rank: its share of the current rollout, and sums since the latest log
OPTIONAL = {"reference_answers"}  # parts that only some options have: a resume may change them
MOVING = {"reward_normalizer", "kl_controller"}  # parts from whose numbers a training continues


class Stateful(Protocol):
    """An object with a state of plain numbers."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""


def save_ppo_state(folder: Path, parts: Mapping[str, Stateful], file: str = STATE_FILE) -> None:
    """Write the state of every part into a checkpoint."""
    state = {name: part.state_dict() for name, part in parts.items()}
    (folder / file).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


def load_ppo_state(folder: Path, parts: Mapping[str, Stateful], file: str = STATE_FILE) -> None:
    """Restore every part from a checkpoint.

    Raises:
        FileNotFoundError: If the checkpoint has no such file.
        ValueError: If a number that moves with the training is not finite.
    """
    path = folder / file
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: PPOTrainer did not write {folder}, or not to the end.")
    state = json.loads(path.read_text(encoding="utf-8"))
    for name in MOVING & parts.keys():
        _check_finite(path, name, state[name])
    for name, part in parts.items():
        if name in state or name not in OPTIONAL:
            part.load_state_dict(state[name])


def _check_finite(path: Path, part: str, state: dict[str, Any]) -> None:
    for name, value in state.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{path} has {value} as `{name}` of `{part}`. Resume from an earlier checkpoint.")
