"""Open and end the MLflow runs of the recipes, and record into the open run.

The callback of transformers logs metrics into the open run. The recipe opens and ends the run. So a crash is recorded
as FAILED and a termination as KILLED, an evaluation after training opens no second run, and a resumed training
continues the interrupted run.
"""

import json
import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import mlflow
from accelerate import PartialState
from datasets import Dataset
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS as LOGGED_ARTIFACTS
from transformers import TrainerCallback
from transformers.integrations import MLflowCallback

from rlhf_recipes.data.digest import dataset_digest
from rlhf_recipes.durability.ending import leave_together
from rlhf_recipes.durability.termination import SIGNALS, TerminatedError, terminate
from rlhf_recipes.evaluation.alarms import current_alarms
from rlhf_recipes.evaluation.samples import SAMPLES_DIRECTORY, tables_of_step, tables_until
from rlhf_recipes.options.ppo import PPOConfig
from rlhf_recipes.options.recipes import TrackingArguments, is_recorded, tracking_uri
from rlhf_recipes.options.secrets import redact
from rlhf_recipes.tracking.delivery import Delivery
from rlhf_recipes.tracking.lineage import write_run_file
from rlhf_recipes.tracking.logged_model import describe_model
from rlhf_recipes.tracking.starting import kept_environment
from rlhf_recipes.tracking.store import open_run, system_metrics
from rlhf_recipes.tracking.stuck import closed_when_stuck
from rlhf_recipes.tracking.unfinished import note_end

SHOWN_TABLES = 60  # the latest ones, which the page of MLflow shows: a tag holds at most 8,000 characters
logger = logging.getLogger(__name__)


class RunCallback(MLflowCallback):
    """The callback of transformers, which sends the records of the open run by a `Delivery`."""

    def __init__(
        self, delivery: Delivery, output_dir: str, run: dict[str, str], *, is_continued: bool = False
    ) -> None:
        super().__init__()
        self.delivery = self._ml_flow = delivery
        self._output_dir = output_dir
        self._run, self._is_continued = run, is_continued
        self._tables: list[Path] = []
        self._alarms = ""
        self.has_noted = False

    def setup(self, args: Any, state: Any, model: Any) -> None:
        """Do not open a run or record parameters: `open_run` does both before training."""
        self._async_log = False  # a delivery does not wait
        self._initialized = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Send again what a killed process may not have sent: the figures and tables until the checkpoint."""
        super().on_train_begin(args, state, control, **kwargs)
        self._tables = tables_until(self._output_dir, state.global_step)
        if self._is_continued and state.is_world_process_zero:
            for entry in state.log_history:
                figures = {name: value for name, value in entry.items() if name != "step"}
                self._ml_flow.log_metrics(figures, step=entry["step"])  # sends only those that the run does not have
            self._ml_flow.log_missing_artifacts(self._tables, SAMPLES_DIRECTORY)
            self._show_tables()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, model: Any = None, **kwargs: Any) -> None:
        """Send the metrics, and the tables of completions that the trainer wrote at this step."""
        if not state.is_world_process_zero:
            return
        self._ml_flow.log_metrics(logs, step=state.global_step)  # transformers would make two names one
        tables = [table for table in tables_of_step(self._output_dir, state.global_step) if table not in self._tables]
        for table in tables:
            self._ml_flow.log_artifact(table, SAMPLES_DIRECTORY)
        if tables:
            self._tables += tables
            self._show_tables()

    def _show_tables(self) -> None:
        shown = [{"path": f"{SAMPLES_DIRECTORY}/{table.name}", "type": "table"} for table in self._tables]
        if shown:
            self._ml_flow.set_tags({LOGGED_ARTIFACTS: json.dumps(shown[-SHOWN_TABLES:])})

    def save_into(self, folder: Path) -> None:
        """Write the note of the run into a checkpoint, which a resume then cannot take for that of another run."""
        write_run_file(folder, self._run)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the note of the run for a resume, and record the alarms."""
        if state.is_world_process_zero:
            self.note()
        self.on_evaluate(args, state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the alarms of the log so far, if they have changed."""
        if isinstance(args, PPOConfig):
            alarms = " ".join(current_alarms(args, state)) or "none"
            if alarms != self._alarms:
                self._ml_flow.set_tags({"alarms": alarms})
            self._alarms = alarms

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the note of the run before the weights are saved, and record the alarms."""
        self.on_save(args, state, control)

    def note(self) -> None:
        """Write the note of the run into the output directory."""
        write_run_file(self._output_dir, self._run)
        self.has_noted = True


_open: ContextVar[RunCallback | None] = ContextVar("open", default=None)


@contextmanager
def track_run(
    tracking: TrackingArguments, run_name: str, stage: str, *configs: Any
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

    Yields:
        Callbacks for the trainer, in place of `report_to: mlflow`; see `options.changes.options_of_trainer`.

    Raises:
        ValueError: If the store cannot be reached or written. It is raised before the training.
    """
    mlflow.set_tracking_uri(tracking_uri(tracking))  # every process looks for `models:/..`
    is_training = any(hasattr(config, "resume_from_checkpoint") for config in configs)
    with leave_together(*(("--resume_from_checkpoint", "true") if is_training else ())):
        if not is_recorded(tracking) or not PartialState().is_main_process:
            yield []
            return
        with signals_as_exceptions(), kept_environment(), _recorded(tracking, run_name, stage, configs) as callback:
            yield [callback]


@contextmanager
def _recorded(
    tracking: TrackingArguments, run_name: str, stage: str, configs: tuple[Any, ...]
) -> Iterator[RunCallback]:
    """Open a run, and end it after everything that can be raised."""
    output_dir = next(config.output_dir for config in configs if hasattr(config, "output_dir"))
    before, status, delivery, outer = mlflow.active_run(), "FAILED", None, _open.set(None)
    try:
        note, last_steps = open_run(tracking, run_name, stage, configs, output_dir)
        delivery = Delivery(note["run_id"], note["tracking_uri"], output_dir, last_steps or {})
        callback = RunCallback(delivery, output_dir, note, is_continued=last_steps is not None)
        _open.set(callback)
        with closed_when_stuck(delivery), system_metrics(note["run_id"], resumed=bool(last_steps)):
            yield callback
        if not callback.has_noted:  # else the note may already hold the id of the model
            callback.note()
        status = "FINISHED"
    except BaseException as error:
        status = outcome(error)
        if isinstance(error, TerminatedError):
            ignore_signals()  # a second one must not interrupt the record of the end
        raise
    finally:
        _open.reset(outer)
        if delivery is not None:
            delivery.close(status)
        elif mlflow.active_run() is not before:
            with suppress(Exception):
                mlflow.end_run(status)
                note_end(output_dir)


def outcome(error: BaseException) -> str:
    """Return the status of a run that an exception ended."""
    if isinstance(error, KeyboardInterrupt | TerminatedError):
        return "KILLED"
    return "FINISHED" if isinstance(error, SystemExit) and not error.code else "FAILED"


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
