"""An earlier run in an output directory: a new run replaces it only if the user says so, and never mixes with it."""

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from rlhf_recipes.durability.checkpoints import checkpoints_by_age, wished_checkpoint
from rlhf_recipes.durability.occupied import LOCK_FILE, occupied
from rlhf_recipes.options.recipes import ExportArguments, PreflightArguments
from rlhf_recipes.options.relevance import class_of

ADAPTER, WHOLE = "adapter_model*", "model*.safetensors"
# Notes that the next start reads to complete the record of the earlier run in MLflow.
NOTES = ("_*", "mlflow_unsent*")
logger = logging.getLogger(__name__)
_to_move: dict[Path, list[Path]] = {}  # files of earlier runs, by directory, until the new run trains


@contextmanager
def own_directory(args: Any, start: PreflightArguments | ExportArguments, *inputs: Any) -> Iterator[None]:
    """Hold the directory in which a recipe saves a model, and refuse an earlier run in it. Every rank calls.

    It is held as by `occupied`. A run that resumes finds its own files. With `overwrite`, `move_earlier_run` moves
    those of an earlier run.

    Args:
        args: Options with `output_dir`: those of a trainer, or of a recipe that has nothing to resume.
        start: Options with `overwrite`.
        inputs: Other options of the run. A directory with an input of the run is not moved.

    Raises:
        ValueError: If a new run would mix with an earlier one, and see `occupied`.
    """
    folder = Path(args.output_dir).resolve()
    with occupied(args.output_dir):
        if files := _earlier_files(folder, args, start, inputs):
            _to_move[folder] = files
        try:
            yield
        finally:
            _to_move.pop(folder, None)


def move_earlier_run(output_dir: str) -> None:
    """Move the files of an earlier run beside the directory, if `own_directory` found some. Every rank must call.

    Raises:
        ValueError: If that is not possible. The files are then back.
    """
    folder = Path(output_dir).resolve()
    if files := _to_move.pop(folder, None):
        refusal = [_move(folder, files) if PartialState().is_main_process else ""]
        _same_on_all(refusal)


def keep_earlier_files(*paths: Path) -> None:
    """Give files of an earlier run, or of the user, other names if they are there: `README.replaced-1.md`."""
    for path in paths if PartialState().is_main_process else ():
        if not path.exists():
            continue
        names = (path.with_stem(f"{path.stem}.replaced-{number}") for number in count(1))
        kept = next(name for name in names if not name.exists())
        path.rename(kept)
        logger.warning(f"{path} was there before. It is now {kept.name}.")


def keep_foreign_card(output_dir: str) -> None:
    """Keep a README.md that no run of this library has written: the model card takes its name."""
    path = Path(output_dir, "README.md")
    if path.is_file() and "rlhf_recipes" not in path.read_text(encoding="utf-8", errors="replace"):
        keep_earlier_files(path)


def check_output_dir(directory: str, *, adapter: bool) -> None:
    """Refuse a directory with weights of the other kind: loading would prefer them to the weights of the run.

    Args:
        directory: Directory in which the run saves.
        adapter: Whether the run saves an adapter, and not a whole model.

    Raises:
        ValueError: If the directory holds the other kind, and keeps it.
    """
    kinds = {True: "an adapter", False: "a whole model"}
    folder = Path(directory)
    if folder.resolve() not in _to_move and any(folder.glob(WHOLE if adapter else ADAPTER)):
        raise ValueError(
            f"`output_dir` {directory} holds {kinds[not adapter]}, and this run would save {kinds[adapter]} beside "
            "it. Choose another `output_dir`, or move the files."
        )


def _earlier_files(
    folder: Path, args: Any, start: PreflightArguments | ExportArguments, inputs: tuple[Any, ...]
) -> list[Path]:
    """Return what to move before the run trains."""
    answer: list[Any] = ["", []]
    if PartialState().is_main_process and not _is_resumed(folder, args) and (found := _found(folder)):
        held = _held(folder, (args, *inputs))
        if start.overwrite:
            answer = [_obstacle(folder, held), [path for path in sorted(folder.iterdir()) if not _stays(path)]]
        else:
            may_resume = hasattr(args, "resume_from_checkpoint")
            answer = [_refusal(folder, found, may_move=not held, may_resume=may_resume), []]
    _same_on_all(answer)
    return list(answer[1])


def _same_on_all(answer: list[Any]) -> None:
    """Give every process the answer of the first one, and raise the refusal that it begins with."""
    if PartialState().num_processes > 1:
        broadcast_object_list(answer)
    if answer[0]:
        raise ValueError(answer[0])


def _is_resumed(folder: Path, args: Any) -> bool:
    """Return whether a run goes on with a checkpoint of its own directory."""
    checkpoint = wished_checkpoint(getattr(args, "resume_from_checkpoint", None), args.output_dir)
    return checkpoint is not None and checkpoint.absolute().parent.resolve() == folder


def _found(folder: Path) -> str:
    """Return what a directory holds of an earlier run, in words; "" for nothing."""
    if checkpoints := checkpoints_by_age(folder):
        return f"{checkpoints[-1].name} of an earlier run"
    is_there = any(any(folder.glob(pattern)) for pattern in (ADAPTER, WHOLE))
    return "the model of an earlier run" if is_there else ""


def _stays(path: Path) -> bool:
    return path.name == LOCK_FILE or (path.is_file() and any(map(path.match, NOTES)))


def _refusal(folder: Path, found: str, *, may_move: bool, may_resume: bool) -> str:
    go_on = " To continue that run, set `--resume_from_checkpoint true`." if may_resume else ""
    if may_resume and not checkpoints_by_age(folder):
        go_on = " There is no checkpoint to continue that run."
    move = f", or set `--overwrite true`, which moves its files to {_aside(folder).name}" if may_move else ""
    return (
        f"`output_dir` {folder} holds {found}, and a new run would mix with it.{go_on} To start anew, name another "
        f"`output_dir`{move}."
    )


def _held(folder: Path, configs: tuple[Any, ...]) -> str:
    """Return what a directory holds that the run needs, in words; "" for nothing."""
    if _is_in(Path.cwd(), folder):
        return "the working directory"
    named = [(f"`{name}`", value) for config in configs for name, value in vars(config).items() if _is_input(name)]
    named += [("`MLFLOW_TRACKING_URI`", os.environ.get("MLFLOW_TRACKING_URI"))]
    named += [("`--config`", word.rpartition("=")[2]) for word in sys.argv if word.endswith((".yaml", ".yml"))]
    return next((f"{name} {text}" for name, value in named for text in _texts(value) if _is_in(text, folder)), "")


def _is_input(option: str) -> bool:
    return class_of(option) != "place and name"


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)


def _is_in(text: str | Path, folder: Path) -> bool:
    """Return whether a path is in a directory. Other texts are in none."""
    path = Path(str(text).removeprefix("sqlite:///").removeprefix("file://").replace("\0", ""))
    return any(place.is_relative_to(folder) for place in (path.resolve(), path.parent.resolve()))


def _obstacle(folder: Path, held: str) -> str:
    """Return why the files of an earlier run cannot be moved, or "". Nothing is moved yet."""
    aside = _aside(folder)
    if held:
        return (
            f"`overwrite`: `output_dir` {folder} holds {held}, which would move with the files of the earlier run. "
            "Name another `output_dir`."
        )
    try:
        probe = Path(tempfile.mkdtemp(dir=folder, prefix="_"))
        try:
            probe.rename(aside)
        except OSError:
            probe.rmdir()
            raise
        aside.rmdir()
    except OSError as error:
        return _immovable(folder, aside, error)
    return ""


def _immovable(folder: Path, aside: Path, error: OSError) -> str:
    return (
        f"`overwrite`: the files in {folder} cannot be moved to {aside} ({error.strerror}). Name another "
        "`output_dir`, or move them by hand."
    )


def _move(folder: Path, files: list[Path]) -> str:
    """Move the files of an earlier run beside its directory, or none. Return why that is not possible, else ""."""
    aside = _aside(folder)
    try:
        aside.mkdir()
        for path in files:
            if os.path.lexists(path):
                path.rename(aside / path.name)
    except OSError as error:
        left = _put_back(files, aside)
        return _immovable(folder, aside, error) + (f" {', '.join(left)} could not be moved back." if left else "")
    logger.warning(f"`overwrite`: the files of the earlier run in {folder} are now in {aside}.")
    return ""


def _put_back(files: list[Path], aside: Path) -> list[str]:
    """Move files back from where they are. Return the names of those that stay there."""
    for path in files:
        with suppress(OSError):
            (aside / path.name).rename(path)
    with suppress(OSError):
        aside.rmdir()
    return [path.name for path in files if os.path.lexists(aside / path.name)]


def _aside(folder: Path) -> Path:
    names = (folder.with_name(f"{folder.name}.replaced-{number}") for number in count(1))
    return next(name for name in names if not name.exists())
