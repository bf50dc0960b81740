"""Small files that a killed process leaves old or new, and never half written."""

import json
import os
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that a killed process leaves the old content or the new one."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_note(path: Path, note: dict[str, str]) -> None:
    """Write a note as JSON."""
    write_whole(path, json.dumps(note, indent=2) + "\n")


def read_note(path: Path) -> dict[str, Any] | None:
    """Return a note; `None` if there is none, or if it cannot be read."""
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) else None
