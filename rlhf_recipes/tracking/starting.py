"""Start a run in MLflow, or choose the run to continue: by a checkpoint, or by the environment variables of MLflow."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Experiment, LifecycleStage, Run
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST
from mlflow.utils.validation import MAX_ENTITY_KEY_LENGTH

from rlhf_recipes.durability.checkpoints import wished_checkpoint
from rlhf_recipes.options.recipes import DEFAULT_EXPERIMENT, TrackingArguments
from rlhf_recipes.options.secrets import reason_of, redact
from rlhf_recipes.tracking.delivery import UNSENT_FILE, send_unsent
from rlhf_recipes.tracking.lineage import read_run_file
from rlhf_recipes.tracking.unfinished import UnusableRunError, close_unfinished, find_run, note_open, note_start

EXPERIMENT_KIND = "mlflow.experimentKind"  # by which the page of an experiment chooses its view
logger = logging.getLogger(__name__)


@contextmanager
def kept_environment() -> Iterator[None]:
    """Restore the variables that MLflow itself sets and deletes while it records."""
    before = {name: os.environ.get(name) for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID")}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})


def tags_of_environment() -> dict[str, Any]:
    """Return the tags that `MLFLOW_TAGS` names.

    Raises:
        ValueError: If it is not a JSON object.
    """
    text = os.environ.get("MLFLOW_TAGS") or "{}"
    try:
        return dict(json.loads(text).items())
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"`MLFLOW_TAGS` is {redact(text)[:100]}, which is no JSON object. Write it as "
            '`{"team": "red"}`, or unset it.'
        ) from error


def start_run(
    tracking: TrackingArguments, run_name: str, stage: str, configs: tuple[Any, ...], output_dir: str | None
) -> tuple[Run, bool]:
    """Start a new run, or choose the one to continue. Return it, and whether it is new.

    A note in `output_dir` names it before it gets a value. A run that a killed process left open there is closed.
    """
    _send_unsent(output_dir)  # they may hold the end of a run, or figures of the one to continue
    given, noted = _given_run(), _interrupted_run(configs)
    continued = noted if given is None else _part_of(given, noted, stage, configs)
    close_unfinished(output_dir, continued)
    if continued is not None:
        note_open(output_dir, continued.info.run_id)
        mlflow.set_experiment(experiment_id=continued.info.experiment_id)
        return mlflow.start_run(run_id=continued.info.run_id, log_system_metrics=False), False
    experiment = _set_experiment(tracking, given)
    if EXPERIMENT_KIND not in experiment.tags:  # a user may have chosen another one
        mlflow.MlflowClient().set_experiment_tag(experiment.experiment_id, EXPERIMENT_KIND, "custom_model_development")
    parent_run_id = tracking.parent_run_id
    if parent_run_id is not None:
        _known_run("parent_run_id", parent_run_id)
    if given is not None and parent_run_id is None:
        parent_run_id = given.info.run_id
        logger.warning(
            f"`MLFLOW_RUN_ID` {parent_run_id} has the records of another stage or run: stage {stage} is recorded as a "
            "new run under it."
        )
    os.environ.pop("MLFLOW_RUN_ID", None)  # MLflow would continue that run
    options: dict[str, Any] = {"log_system_metrics": False, "parent_run_id": parent_run_id}
    options["tags"] = note_start(output_dir, experiment.experiment_id)
    run = mlflow.start_run(run_name=run_name[:MAX_ENTITY_KEY_LENGTH], **options)
    note_open(output_dir, run.info.run_id)
    return run, True


def _send_unsent(output_dir: str | None) -> None:
    """Send the records that the store did not take from an earlier run of this directory."""
    path = Path(output_dir or "", UNSENT_FILE)
    try:
        if output_dir is not None:
            send_unsent(path, mlflow.get_tracking_uri())
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":  # else only a record is wrong
            raise
        reason = redact(str(error.message)).strip().splitlines()[0][:300]
        logger.warning(f"MLflow refuses a record in {path}, so none of them is sent: {reason} Delete the file.")


def _set_experiment(tracking: TrackingArguments, given: Run | None) -> Experiment:
    """Choose the experiment of a new run."""
    name, experiment_id = (os.environ.get(f"MLFLOW_EXPERIMENT_{kind}") for kind in ("NAME", "ID"))
    if given is not None:
        return mlflow.set_experiment(experiment_id=given.info.experiment_id)
    if tracking.experiment_name or not (name or experiment_id):
        option, chosen = "experiment_name", {"experiment_name": tracking.experiment_name or DEFAULT_EXPERIMENT}
    elif name:
        option, chosen = "MLFLOW_EXPERIMENT_NAME", {"experiment_name": name}
    else:
        option, chosen = "MLFLOW_EXPERIMENT_ID", {"experiment_id": str(experiment_id)}
    with _refused_by_name(option, *chosen.values()):
        return mlflow.set_experiment(**chosen)


@contextmanager
def _refused_by_name(option: str, value: str) -> Iterator[None]:
    """Name the option whose value the store does not know: to start the server would not help."""
    try:
        yield
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        reason = reason_of(error)
        raise UnusableRunError(
            f"`{option}` is {redact(value)[:100]}, which MLflow at {redact(mlflow.get_tracking_uri())} refuses: "
            f"{reason} Set another value, or leave it out."
        ) from error


def _given_run() -> Run | None:
    """Return the run of `MLFLOW_RUN_ID`."""
    run_id = os.environ.get("MLFLOW_RUN_ID")
    return _known_run("MLFLOW_RUN_ID", run_id) if run_id else None


def _known_run(option: str, run_id: str) -> Run:
    with _refused_by_name(option, run_id):
        run = mlflow.MlflowClient().get_run(run_id)
        if run.info.lifecycle_stage == LifecycleStage.DELETED:
            raise MlflowException(f"Run '{run_id}' is deleted.", RESOURCE_DOES_NOT_EXIST)
    return run


def _part_of(given: Run, noted: Run | None, stage: str, configs: tuple[Any, ...]) -> Run | None:
    """Return the run to continue under `MLFLOW_RUN_ID`, or `None` for a new one.

    Args:
        given: Run of `MLFLOW_RUN_ID`.
        noted: Run of the checkpoint to resume from.
        stage: Stage of this run.
        configs: Dataclasses with the options of the run.
    """
    if noted is not None and given.info.run_id in (noted.info.run_id, noted.data.tags.get("mlflow.parentRunId")):
        return noted
    if not given.data.metrics and "stage" not in given.data.tags:
        return given
    resumes = any(
        wished_checkpoint(config.resume_from_checkpoint, config.output_dir)
        for config in configs
        if hasattr(config, "resume_from_checkpoint")
    )
    return given if resumes and given.data.tags.get("stage") == stage else None


def _interrupted_run(configs: tuple[Any, ...]) -> Run | None:
    """Return the run of the checkpoint to resume from."""
    for config in configs:
        if not hasattr(config, "resume_from_checkpoint"):
            continue
        checkpoint = wished_checkpoint(config.resume_from_checkpoint, config.output_dir)
        note = checkpoint and (read_run_file(checkpoint) or read_run_file(config.output_dir))
        if not note:
            continue
        run = find_run(note["run_id"])
        if run is None:
            logger.warning(f"The run {note['run_id']} of {checkpoint} is not in this store: a new run begins.")
            return None
        return run
    return None
