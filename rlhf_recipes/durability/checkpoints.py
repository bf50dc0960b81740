"""Checkpoints that are whole or not there: written elsewhere, listed with sizes and hashes, then renamed.

The trainers decide about the contents of a checkpoint.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

MANIFEST_FILE = "manifest.json"
ABANDONED_FILE = "abandoned.txt"  # in a checkpoint from which a run went back: the reason
STAGING = "_unfinished"  # folder of the output directory for checkpoints that are not whole; a push skips `_*`
HASHING_THREADS = 8
logger = logging.getLogger(__name__)


def publish(staged: Path, final: Path) -> None:
    """List a checkpoint's files, flush them to the disk, and rename the checkpoint in one step.

    It replaces a checkpoint of that name from an earlier attempt.

    Args:
        staged: Folder with the checkpoint, on the same file system as `final`.
        final: Final folder.
    """
    names = sorted(path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.is_file())
    hashes = _hashes(staged, [name for name in names if name != MANIFEST_FILE])
    files = {name: {"bytes": (staged / name).stat().st_size, "sha256": digest} for name, digest in hashes.items()}
    manifest = {"written": time.time(), "files": files}
    (staged / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for path in (*staged.rglob("*"), staged):
        _to_disk(path)
    if final.exists():
        final.rename(staged.with_name(f"{final.name}-replaced"))
    staged.rename(final)
    _to_disk(final.parent)
    shutil.rmtree(staged.parent)


def _hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the hash of each file by its path in the folder."""
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: _hash(folder / name), names), strict=True))


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_defect(checkpoint: str | Path) -> str | None:
    """Return the defect of a checkpoint, as the end of a sentence; `None` if every file is unchanged."""
    folder = Path(checkpoint)
    manifest = _manifest(folder)
    if manifest is None:
        return f"has no readable {MANIFEST_FILE}, so it was not written to the end, or by something else"
    files = manifest["files"]
    for name, expected in files.items():
        if not (folder / name).is_file():
            return f"lacks {name}"
        if (size := (folder / name).stat().st_size) != expected["bytes"]:
            return f"has {size} bytes of {name} instead of {expected['bytes']}"
    changed = [name for name, digest in _hashes(folder, files).items() if digest != files[name]["sha256"]]
    return f"holds another {changed[0]} than was written" if changed else None


def _manifest(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def abandon(checkpoint: Path, reason: str) -> None:
    """Mark a checkpoint from which a run went back: it stays, and only its name resumes it."""
    (checkpoint / ABANDONED_FILE).write_text(f"{reason}\n", encoding="utf-8")
    for path in (checkpoint / ABANDONED_FILE, checkpoint):
        _to_disk(path)


def is_abandoned(checkpoint: Path) -> bool:
    """Return whether `abandon` has marked a checkpoint."""
    return (checkpoint / ABANDONED_FILE).exists()


def checkpoints_by_age(output_dir: str | Path) -> list[Path]:
    """Return the checkpoints of a run: first the abandoned ones, then the others by the time of writing.

    The step does not show the age: a run that went back writes lower steps later.
    """
    found = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    steps = {path: path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-") for path in found if path.is_dir()}
    numbered = {path: int(step) for path, step in steps.items() if step.isdecimal()}
    return sorted(numbered, key=lambda path: (not is_abandoned(path), _written(path), numbered[path]))


def _written(checkpoint: Path) -> float:
    manifest = _manifest(checkpoint)
    return checkpoint.stat().st_mtime if manifest is None else float(manifest["written"])


def last_checkpoint(output_dir: str | Path) -> str | None:
    """Return the latest whole checkpoint, or `None`, and warn of those that are skipped."""
    for checkpoint in reversed(checkpoints_by_age(output_dir)):
        defect = "was left behind when the run went back" if is_abandoned(checkpoint) else find_defect(checkpoint)
        if defect is None:
            return str(checkpoint)
        logger.warning(f"{checkpoint} {defect}: it is passed over, and the one before is used.")
    return None


def wished_checkpoint(resume: str | bool | None, output_dir: str) -> Path | None:
    """Return the checkpoint that `resume_from_checkpoint` asks for, whole or not."""
    wish = _wish(resume)
    if wish == "false":
        return None
    return ([None, *checkpoints_by_age(output_dir)])[-1] if wish == "true" else Path(str(resume))


def _wish(resume: str | bool | None) -> str:
    """Return `true`, `false` or a path, in lower case: a YAML holds a boolean, a command line a text."""
    return str(resume or False).lower()


def checkpoint_to_resume(resume: str | bool | None, output_dir: str) -> str | None:
    """Return the checkpoint that `resume_from_checkpoint` asks for. Every rank must make the call.

    Args:
        resume: A path. True: the latest whole checkpoint in `output_dir`, or a new run if there is none, so that the
            same command starts and resumes a run. False or nothing: a new run.
        output_dir: Output directory of the run.

    Raises:
        ValueError: If the path holds no whole checkpoint.
    """
    wish = _wish(resume)
    if wish == "false":
        return None
    answer: list[Any] = [None, None]  # a checkpoint and its defect, found by one process for all
    if PartialState().is_main_process:
        if wish == "true":
            answer[0] = last_checkpoint(output_dir)
        elif not Path(str(resume)).is_dir():
            answer[1] = "does not exist"
        else:
            answer = [str(resume), find_defect(str(resume))]
    checkpoint, defect = broadcast_object_list(answer)
    if defect is not None:
        raise ValueError(
            f"`resume_from_checkpoint` {resume} {defect}. Name another checkpoint, or set `resume_from_checkpoint: "
            "true` for the latest that is whole."
        )
    return checkpoint


def remove_old(output_dir: str | Path, limit: int | None, keep: Iterable[str | None]) -> None:
    """Delete the oldest checkpoints beyond a number, but never the latest one.

    Args:
        output_dir: Output directory of the run.
        limit: Number of checkpoints that may stay; `None` or 0: all.
        keep: Checkpoints that always stay, such as the best one.
    """
    if not limit:
        return
    checkpoints = checkpoints_by_age(output_dir)
    kept = {Path(path).resolve() for path in keep if path is not None} | {c.resolve() for c in checkpoints[-1:]}
    spare = [checkpoint for checkpoint in checkpoints if checkpoint.resolve() not in kept]
    for checkpoint in spare[: max(0, len(checkpoints) - max(limit, len(kept)))]:
        shutil.rmtree(checkpoint, ignore_errors=True)
