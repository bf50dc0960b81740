"""Checkpoints that are whole or not there: written elsewhere, listed with sizes and hashes, then renamed.

The trainers decide about the contents of a checkpoint.
"""

import logging
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from rlhf_recipes.durability.manifest import MANIFEST_FILE, Manifest, hashes, read_manifest, write_manifest

ABANDONED_FILE = "abandoned.txt"  # in a checkpoint from which a run went back: the reason
STAGING = "_unfinished"  # folder of the output directory for checkpoints that are not whole; a push skips `_*`
logger = logging.getLogger(__name__)


def publish(staged: Path, final: Path) -> None:
    """List a checkpoint's files, flush them to the disk, and rename the checkpoint in one step.

    It replaces a checkpoint of that name from an earlier attempt.

    Args:
        staged: Folder with the checkpoint, on the same file system as `final`.
        final: Final folder.
    """
    others = (read_manifest(path) for path in _numbered(final.parent))
    write_manifest(staged, 1 + max((other.number for other in others if other is not None), default=0))
    for path in (*staged.rglob("*"), staged):
        _to_disk(path)
    if final.exists():
        final.rename(staged.with_name(f"{final.name}-replaced"))
    staged.rename(final)
    _to_disk(final.parent)
    shutil.rmtree(staged.parent)


def _finish_publishing(output_dir: Path) -> None:
    """Rename what `publish` had written to the end when it was killed: it may have moved away the one before."""
    for staged in _numbered(output_dir / STAGING):
        final = output_dir / staged.name
        if not final.exists() and find_defect(staged) is None:
            staged.rename(final)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_defect(checkpoint: str | Path) -> str | None:
    """Return the defect of a checkpoint, as the end of a sentence; `None` if every file is unchanged."""
    folder = Path(checkpoint)
    manifest = read_manifest(folder)
    if manifest is None:
        return f"has no readable {MANIFEST_FILE}, so it was not written to the end, or by something else"
    try:
        return _missing(folder, manifest) or _changed(folder, manifest)
    except OSError as error:
        return f"cannot be read ({error})"


def _missing(folder: Path, manifest: Manifest) -> str | None:
    for name, (expected, _) in manifest.files.items():
        if not (folder / name).is_file():
            return f"lacks {name}"
        if (size := (folder / name).stat().st_size) != expected:
            return f"has {size} bytes of {name} instead of {expected}"
    return None


def _changed(folder: Path, manifest: Manifest) -> str | None:
    found = hashes(folder, manifest.files)
    changed = [name for name, (_, digest) in manifest.files.items() if found[name] != digest]
    return f"holds another {changed[0]} than was written" if changed else None


def abandon(checkpoint: Path, reason: str) -> None:
    """Mark a checkpoint from which a run went back: it stays, and only its name resumes it."""
    if is_abandoned(checkpoint):
        return
    (checkpoint / ABANDONED_FILE).write_text(f"{reason}\n", encoding="utf-8")
    for path in (checkpoint / ABANDONED_FILE, checkpoint):
        _to_disk(path)


def is_abandoned(checkpoint: Path) -> bool:
    """Return whether `abandon` has marked a checkpoint."""
    return os.path.lexists(checkpoint / ABANDONED_FILE)


def checkpoints_by_age(output_dir: str | Path) -> list[Path]:
    """Return the checkpoints of a run: the abandoned ones, then the others by their number.

    The number only grows. Neither the step nor the clock shows the age: a run that went back writes lower steps later,
    and a clock can be set back. Checkpoints of older releases have no number: their times order them before the rest.
    A damaged list hides the age. Such a checkpoint counts as the newest, so that a resume names it.
    """
    return sorted(_numbered(Path(output_dir)), key=_age)


def _numbered(folder: Path) -> list[Path]:
    found = folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    return [path for path in found if _step(path).isdecimal() and path.is_dir()]


def _step(checkpoint: Path) -> str:
    return checkpoint.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")


def _age(checkpoint: Path) -> tuple[bool, float, float, int]:
    manifest, step = read_manifest(checkpoint), int(_step(checkpoint))
    number, written = (math.inf, 0.0) if manifest is None else (manifest.number, manifest.written)
    return not is_abandoned(checkpoint), number, written, step


def has_files(checkpoint: Path) -> bool:
    """Return whether a checkpoint has all files with their sizes. This costs less than `find_defect`."""
    manifest = read_manifest(checkpoint)
    try:
        return manifest is not None and _missing(checkpoint, manifest) is None
    except OSError:
        return False


def last_checkpoint(output_dir: str | Path) -> str | None:
    """Return the latest whole checkpoint, or `None`, and warn of those that are skipped."""
    for checkpoint in reversed(checkpoints_by_age(output_dir)):
        defect = "was left behind when the run went back" if is_abandoned(checkpoint) else find_defect(checkpoint)
        if defect is None:
            return str(checkpoint)
        logger.warning(f"{checkpoint} {defect}: it is passed over, and the one before is used.")
    return None


def wished_checkpoint(resume: str | bool | None, output_dir: str) -> Path | None:
    """Return the checkpoint that `resume_from_checkpoint` asks for. No file is compared with its hash."""
    wish = _wish(resume)
    if wish == "false":
        return None
    if wish != "true":
        return Path(str(resume))
    _finish_publishing(Path(output_dir))  # else the training would resume from a checkpoint that this does not see
    return ([None, *sorted(checkpoints_by_age(output_dir), key=has_files)])[-1]


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
            _finish_publishing(Path(output_dir))
            answer[0] = last_checkpoint(output_dir)
        elif not os.path.isdir(str(resume)):
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


def remove_old(
    output_dir: str | Path, limit: int | None, keep: Iterable[str | None], *, published: Path | None = None
) -> None:
    """Delete the oldest checkpoints beyond a number, but never the latest one, and never the last that is whole.

    Args:
        output_dir: Output directory of the run.
        limit: Number of checkpoints that may stay; `None` or 0: all.
        keep: Checkpoints that always stay, such as the best one.
        published: Checkpoint that was written just now. It is whole, and so nothing needs to be hashed.
    """
    if not limit:
        return
    checkpoints = sorted(checkpoints_by_age(output_dir), key=lambda path: (not is_abandoned(path), has_files(path)))
    kept = {Path(path).resolve() for path in keep if path is not None} | {c.resolve() for c in checkpoints[-1:]}
    spare = [checkpoint for checkpoint in checkpoints if checkpoint.resolve() not in kept]
    spare = spare[: max(0, len(checkpoints) - max(limit, len(kept)))]
    if spare and published is None:
        whole = next((c for c in reversed(checkpoints) if not is_abandoned(c) and find_defect(c) is None), None)
        spare = [checkpoint for checkpoint in spare if checkpoint != whole]
    _remove(spare, Path(output_dir, STAGING))


def _remove(checkpoints: list[Path], staging: Path) -> None:
    """Move checkpoints out of sight in one step each, then delete them: half a checkpoint must not count as one."""
    if not checkpoints:
        return
    shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed here
    staging.mkdir(exist_ok=True)
    for checkpoint in checkpoints:
        try:
            checkpoint.rename(staging / f"removed-{checkpoint.name}")
        except OSError as error:
            logger.warning(
                f"{checkpoint} is beyond `save_total_limit` and could not be removed: {error}. Delete it by hand when "
                "the run has ended."
            )
    shutil.rmtree(staging, ignore_errors=True)
