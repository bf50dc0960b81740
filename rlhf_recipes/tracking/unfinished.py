"""Find the run of a process that was killed, and close it: MLflow would show it as RUNNING for ever.

A note in the output directory names the open run. It is written before the run gets its first value: a run that MLflow
is about to create has no id yet, so it gets a tag whose value is in the note.
"""

import logging
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import mlflow
from mlflow.entities import LifecycleStage, Run
from mlflow.exceptions import MlflowException

from rlhf_recipes.durability.notes import read_note, write_note
from rlhf_recipes.options.secrets import without_credentials

OPEN_FILE = "_mlflow_open.json"  # a push to the Hub skips `_*`
START_TAG = "rlhf_recipes.start"
logger = logging.getLogger(__name__)


class UnusableRunError(ValueError):
    """A run that cannot be recorded. The message says what to change."""


def note_start(output_dir: str | None, experiment_id: str) -> dict[str, str]:
    """Note that a run will be created. Return the tag by which it can be found."""
    tag = {START_TAG: uuid4().hex}
    _write(output_dir, {"experiment_id": experiment_id, "start": tag[START_TAG]})
    return tag


def note_open(output_dir: str | None, run_id: str) -> None:
    """Note that a run is open."""
    _write(output_dir, {"run_id": run_id})


def note_end(output_dir: str | None) -> None:
    """Remove the note of a run that has ended."""
    if output_dir is not None:
        with suppress(OSError):  # the next start sees that the run has ended
            Path(output_dir, OPEN_FILE).unlink()


def _write(output_dir: str | None, note: dict[str, str]) -> None:
    if output_dir is None:
        return
    path = Path(output_dir, OPEN_FILE)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_note(path, note | {"tracking_uri": without_credentials(mlflow.get_tracking_uri())})
    except OSError as error:
        raise UnusableRunError(
            f"`output_dir` {output_dir} cannot be written ({error.strerror}): name another one, or make it writable."
        ) from error


def close_unfinished(output_dir: str | None, continued: Run | None) -> None:
    """Close the run that an earlier process of an output directory left open, unless this process continues it."""
    note = None if output_dir is None else read_note(Path(output_dir, OPEN_FILE))
    if note is None or "tracking_uri" not in note or not ("run_id" in note or "start" in note):
        return
    uri = without_credentials(mlflow.get_tracking_uri())
    if note["tracking_uri"] != uri:
        logger.warning(
            f"An earlier run of {output_dir} did not end. It stays RUNNING in its store, {note['tracking_uri']}, "
            "because this run has another one."
        )
        return
    run = _find(note)
    if run is None or run.info.status != "RUNNING" or (continued and run.info.run_id == continued.info.run_id):
        return
    mlflow.MlflowClient().set_terminated(run.info.run_id, "KILLED")
    logger.warning(
        f"The run {run.info.run_id} of {output_dir} did not end, because its process was killed. It is now KILLED in "
        "MLflow."
    )


def _find(note: dict[str, Any]) -> Run | None:
    """Return the run of a note; `None` if the process was killed before MLflow created it, or it was deleted."""
    if "run_id" in note:
        return find_run(note["run_id"])
    found = mlflow.MlflowClient().search_runs([note["experiment_id"]], f"tags.`{START_TAG}` = '{note['start']}'")
    return found[0] if found else None


def find_run(run_id: str) -> Run | None:
    """Return a run; `None` if the store does not have it, or only as a deleted one."""
    try:
        run = mlflow.MlflowClient().get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return None if run.info.lifecycle_stage == LifecycleStage.DELETED else run
