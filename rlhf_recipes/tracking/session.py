"""Open and end the MLflow runs of the recipes, and record into the open run.

The callback of transformers logs metrics into the open run. The recipe opens and ends the run. So a crash is recorded
as FAILED and a termination as KILLED, an evaluation after training opens no second run, and a resumed training
continues the interrupted run.
"""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from accelerate import PartialState
from datasets import Dataset
from transformers import TrainerCallback

from rlhf_recipes.data.digest import dataset_digest
from rlhf_recipes.durability.ending import leave_together
from rlhf_recipes.durability.termination import SIGNALS, TerminatedError, terminate
from rlhf_recipes.evaluation.samples import (
    write_latest,
)
from rlhf_recipes.options.recipes import TrackingArguments, is_recorded, tracking_uri
from rlhf_recipes.options.secrets import redact
from rlhf_recipes.tracking.callback import RunCallback
from rlhf_recipes.tracking.delivery import Delivery
from rlhf_recipes.tracking.description import Input, outcome
from rlhf_recipes.tracking.logged_model import describe_model
from rlhf_recipes.tracking.starting import kept_environment
from rlhf_recipes.tracking.store import open_run, system_metrics
from rlhf_recipes.tracking.stuck import closed_when_stuck
from rlhf_recipes.tracking.trackers import other_trackers
from rlhf_recipes.tracking.unfinished import note_end

logger = logging.getLogger(__name__)


_open: ContextVar[RunCallback | None] = ContextVar("open", default=None)


@contextmanager
def track_run(
    tracking: TrackingArguments, run_name: str, stage: str, *configs: Any, trains: bool = True
) -> Iterator[list[TrainerCallback]]:
    """Record the body of the `with` statement as one MLflow run, on the main process.

    The run ends as FINISHED, as FAILED after an exception, or as KILLED after SIGTERM, SIGHUP or Ctrl-C. The options
    become parameters, where long values are shortened, and the artifact `config.yaml`, where they are not. A run that
    resumes from a checkpoint continues the run of the checkpoint. Its recorded steps are not recorded again, because
    MLflow deletes no values. An option that changed becomes a tag `resume.<option>`.

    Args:
        tracking: Whether and where to record.
        run_name: Name in MLflow.
        stage: `sft`, `reward_modeling`, `ppo` or `evaluation`: a tag for filters.
        configs: Dataclasses with the options of the run.
        trains: Whether the body does more than the preflight. If not, no tracker records it.

    Yields:
        Callbacks for the trainer, in place of `report_to: mlflow`; see `options.changes.options_of_trainer`.

    Raises:
        ValueError: If the store cannot be reached or written. It is raised before the training.
    """
    mlflow.set_tracking_uri(tracking_uri(tracking))  # every process looks for `models:/..`
    report_to = [name for config in configs for name in getattr(config, "report_to", None) or []]
    output_dir = next(config.output_dir for config in configs if hasattr(config, "output_dir"))
    is_training = any(hasattr(config, "resume_from_checkpoint") for config in configs)
    with leave_together(*(("--resume_from_checkpoint", "true") if is_training else ())):
        if not (trains and PartialState().is_main_process):
            yield []
        elif not is_recorded(tracking):
            with other_trackers(report_to, run_name, output_dir, None) as others:
                yield others
        else:
            with (
                signals_as_exceptions(),
                kept_environment(),
                _recorded(tracking, run_name, stage, configs) as own,
                other_trackers(report_to, run_name, output_dir, own.run_id) as others,
            ):
                yield [own, *others]


@contextmanager
def _recorded(
    tracking: TrackingArguments, run_name: str, stage: str, configs: tuple[Any, ...]
) -> Iterator[RunCallback]:
    """Open a run, and end it after everything that can be raised."""
    output_dir = next(config.output_dir for config in configs if hasattr(config, "output_dir"))
    before, status, outer = mlflow.active_run(), "FAILED", _open.set(None)
    callback: RunCallback | None = None
    cause: BaseException | None = None
    try:
        note, last_steps, description = open_run(tracking, run_name, stage, configs, output_dir)
        delivery = Delivery(note["run_id"], note["tracking_uri"], output_dir, last_steps or {})
        callback = RunCallback(delivery, output_dir, note, description, is_continued=last_steps is not None)
        _open.set(callback)
        with closed_when_stuck(delivery), system_metrics(note["run_id"], resumed=bool(last_steps)):
            yield callback
        if not callback.has_noted:  # else the note may already hold the id of the model
            callback.note()
        status = "FINISHED"
    except BaseException as error:
        status, cause = outcome(error), error
        if isinstance(error, TerminatedError):
            ignore_signals()  # a second one must not interrupt the record of the end
        raise
    finally:
        _open.reset(outer)
        if callback is not None:
            callback.describe_end(status, cause)
            callback.delivery.close(status)
        elif mlflow.active_run() is not before:
            with suppress(Exception):
                mlflow.end_run(status)
                note_end(output_dir)


@contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """Turn SIGTERM, SIGUSR1 and SIGHUP into exceptions inside. The exit code is the one of a shell, 143, 138 or 129.

    During training, `PreemptionCallback` answers the signals.
    """
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread only
        yield
        return
    before: dict[int, Any] = {number: signal.signal(number, terminate) for number in SIGNALS}
    try:
        yield
    except TerminatedError:
        before = dict.fromkeys(SIGNALS, signal.SIG_IGN)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_signals() -> None:
    """Ignore further signals: the process is ending."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def log_results(metrics: dict[str, float], *files: Path) -> None:
    """Record metrics and files in the open run, at its latest step. Without an open run, do nothing."""
    if (run := _open.get()) is None:
        return
    run.delivery.log_metrics(metrics)
    run.description.add_figures(metrics, run.step)
    for file in files:
        run.delivery.log_artifact(file)


def log_model(tracking: TrackingArguments, directory: str, model_type: str, revision: str | None = None) -> None:
    """Record and register the model that the open run trained and saved. Without an open run, do nothing.

    Args:
        tracking: Options `log_model`, `registered_model_name` and `registered_model_alias`.
        directory: Directory of the saved model.
        model_type: `policy` or `reward_model`.
        revision: Revision of the base of an adapter, if the base is on the Hub.
    """
    run = _open.get()
    if run is None or not tracking.log_model:
        return
    model = describe_model(directory, model_type, revision)
    if model is None:
        logger.warning(f"{directory} holds no weights (`*.safetensors`): the run is recorded without its model.")
        return
    model["registered_model_name"] = tracking.registered_model_name
    model["registered_model_alias"] = tracking.registered_model_alias
    run.note()  # the id of the model is added to the note when the model is sent
    run.delivery.log_model(model)


def log_datasets(name: str | None, **datasets: Dataset | None) -> None:
    """Record the datasets of the open run by a hash of their content. Without an open run, do nothing.

    Args:
        name: Name of the dataset in the options.
        datasets: Splits by purpose (`training`, `evaluation`). `None` is left out.
    """
    if (run := _open.get()) is None:
        return
    for context, dataset in datasets.items():
        if dataset is not None:
            digest = dataset_digest(dataset)
            run.delivery.set_tags({f"dataset.{context}": digest})
            run.delivery.log_dataset(f"{redact(str(name))}:{dataset.split}", digest, context)
            run.description.data.append(Input(f"{context} data", f"{name}: {len(dataset):,} rows"))
    run.delivery.describe(run.description.text())


def log_answers(table: pd.DataFrame, output_dir: str | Path) -> None:
    """Write the answers of an evaluation as the table that MLflow compares, and record it in the open run.

    Args:
        table: Columns `prompt` and `completion`, and others.
        output_dir: Directory of the run.
    """
    write_latest(table, output_dir)
    if (run := _open.get()) is not None:
        run.send_latest()
