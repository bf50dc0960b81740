"""An earlier run in an output directory: a new run replaces it only if the user says so, and never mixes with it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from rlhf_recipes.durability.checkpoints import checkpoints_by_age, is_new_run
from rlhf_recipes.durability.occupied import LOCK_FILE, occupied
from rlhf_recipes.options.recipes import PreflightArguments

WEIGHTS = ("model*.safetensors", "adapter_model*")
# Notes that the next start reads to complete the record of the earlier run in MLflow.
NOTES = ("_*", "mlflow_unsent*")
logger = logging.getLogger(__name__)


@contextmanager
def own_directory(args: Any, preflight_args: PreflightArguments) -> Iterator[None]:
    """Hold the output directory of a training, as `occupied` does, without an earlier run in it. Every rank must call.

    A run that resumes finds its own files. `overwrite` moves those of an earlier run beside the directory.

    Args:
        args: Options of the trainer.
        preflight_args: Options of the start.

    Raises:
        ValueError: If a new run would mix with an earlier one, and see `occupied`.
    """
    with occupied(args.output_dir):
        if is_new_run(args.resume_from_checkpoint):
            _make_room(Path(args.output_dir).resolve(), preflight_args)
        yield


def _make_room(folder: Path, preflight_args: PreflightArguments) -> None:
    state, refusal = PartialState(), [""]
    if state.is_main_process and (found := _found(folder)):
        if not preflight_args.overwrite:
            refusal = [_refusal(folder, found)]
        elif not preflight_args.preflight_only:
            refusal = [_move(folder)]
    if state.num_processes > 1:
        broadcast_object_list(refusal)
    if refusal[0]:
        raise ValueError(refusal[0])


def _found(folder: Path) -> str:
    """Return what a directory holds of an earlier run, in words; "" for nothing."""
    if checkpoints := checkpoints_by_age(folder):
        return f"{checkpoints[-1].name} of an earlier run"
    return "the model of an earlier run" if any(any(folder.glob(pattern)) for pattern in WEIGHTS) else ""


def _refusal(folder: Path, found: str) -> str:
    return (
        f"`output_dir` {folder} holds {found}, and a new run would mix with it. To continue that run, set "
        "`--resume_from_checkpoint true`. To start anew, name another `output_dir`, or set `--overwrite true`, which "
        f"moves its files to {_aside(folder).name}."
    )


def _move(folder: Path) -> str:
    """Move the files of an earlier run beside its directory. Return the reason if that is not possible, else ""."""
    aside = _aside(folder)
    try:
        aside.mkdir()
        for path in sorted(folder.iterdir()):
            if not (path.name == LOCK_FILE or (path.is_file() and any(map(path.match, NOTES)))):
                path.rename(aside / path.name)
    except OSError as error:
        return (
            f"`overwrite`: the files in {folder} cannot be moved to {aside} ({error.strerror}). Name another "
            "`output_dir`, or move them by hand."
        )
    logger.warning(f"`overwrite`: the files of the earlier run in {folder} are now in {aside}.")
    return ""


def _aside(folder: Path) -> Path:
    names = (folder.with_name(f"{folder.name}.replaced-{number}") for number in count(1))
    return next(name for name in names if not name.exists())
