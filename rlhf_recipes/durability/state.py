"""The state that PPO keeps between rollouts and that no library saves: one JSON file in every checkpoint."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

STATE_FILE = "ppo_state.json"
PROGRESS_FILE = "ppo_progress_{}.pt"  # by rank: its share of the current rollout, and sums since the latest log


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
    """
    path = folder / file
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: PPOTrainer did not write {folder}, or not to the end.")
    state = json.loads(path.read_text(encoding="utf-8"))
    for name, part in parts.items():
        part.load_state_dict(state[name])
