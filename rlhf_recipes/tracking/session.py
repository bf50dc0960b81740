"""MLflow runs, owned by the recipe.

Transformers' callback logs metrics into the run that is open; who opens and ends it is decided here, so that
a crash is recorded as FAILED, a termination as KILLED, an evaluation after training opens no run of its own, and a
resumed training continues the run that was interrupted.
"""

import json
import logging
import multiprocessing
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
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
from rlhf_recipes.evaluation.alarms import alarms_of_log
from rlhf_recipes.evaluation.samples import SAMPLES_DIRECTORY, tables_of_step, tables_until
from rlhf_recipes.options.ppo import PPOConfig
from rlhf_recipes.options.recipes import TrackingArguments, tracking_uri
from rlhf_recipes.options.secrets import redact
from rlhf_recipes.tracking.delivery import Delivery
from rlhf_recipes.tracking.lineage import write_run_file
from rlhf_recipes.tracking.logged_model import describe_model
from rlhf_recipes.tracking.store import end_run, open_run, system_metrics

SHOWN_TABLES = 60  # that MLflow's page shows as tables, the latest: a tag holds no more than 8,000 characters
logger = logging.getLogger(__name__)


class RunCallback(MLflowCallback):
    """transformers' callback, writing into the run that is open, by a way that does not lose what a store refuses."""

    def __init__(self, delivery: Delivery, output_dir: str, run: dict[str, str]) -> None:
        super().__init__()
        self.delivery = self._ml_flow = delivery
        self._output_dir = output_dir
        self._run = run
        self._tables: list[Path] = []
        self._alarms = ""
        self.has_noted = False

    def setup(self, args: Any, state: Any, model: Any) -> None:
        """Leave the run and its parameters alone: they are recorded before training."""
        self._async_log = False  # as far as transformers is concerned: a delivery returns at once
        self._initialized = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Know the tables that the run has sent before it was interrupted: the tag that shows tables holds all."""
        super().on_train_begin(args, state, control, **kwargs)
        self._tables = tables_until(self._output_dir, state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, model: Any = None, **kwargs: Any) -> None:
        """Send the figures, and the tables of completions that the trainer has written at this step."""
        super().on_log(args, state, control, logs, model, **kwargs)
        tables = [table for table in tables_of_step(self._output_dir, state.global_step) if table not in self._tables]
        for table in tables:
            self._ml_flow.log_artifact(table, SAMPLES_DIRECTORY)
        if tables:
            self._tables += tables
            shown = [{"path": f"{SAMPLES_DIRECTORY}/{table.name}", "type": "table"} for table in self._tables]
            self._ml_flow.set_tags({LOGGED_ARTIFACTS: json.dumps(shown[-SHOWN_TABLES:])})

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the run beside the checkpoint, for a resume."""
        if state.is_world_process_zero:
            self.note()
        self.on_evaluate(args, state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the alarms that the figures so far give, when they change."""
        if isinstance(args, PPOConfig):
            alarms = " ".join(alarms_of_log(state.log_history, target_kl=args.held_kl)) or "none"
            if alarms != self._alarms:
                self._ml_flow.set_tags({"alarms": alarms})
            self._alarms = alarms

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the run where the weights are about to be saved, and the alarms that its figures give."""
        self.on_save(args, state, control)

    def note(self) -> None:
        """Write which run has made what is in the output directory."""
        write_run_file(self._output_dir, self._run)
        self.has_noted = True


_open: ContextVar[RunCallback | None] = ContextVar("open", default=None)


@contextmanager
def track_run(
    tracking: TrackingArguments, run_name: str, stage: str, *configs: Any
) -> Iterator[list[TrainerCallback]]:
    """Record what happens inside as one MLflow run, on the main process.

    The run ends as FINISHED, as FAILED after an exception, as KILLED after SIGTERM or Ctrl-C. Its configuration
    becomes its parameters, long values shortened, and the artifact `config.yaml`, whole. If it resumes from the
    checkpoint of another run, that run goes on: steps that it has recorded are not recorded again (MLflow deletes no
    values), and what has changed becomes a tag `resume.<option>`.

    Args:
        tracking: Where to record, or not at all.
        run_name: Name shown in MLflow.
        stage: `sft`, `reward_modeling`, `ppo` or `evaluation`; a tag to filter by.
        configs: Dataclasses with the run's options.

    Yields:
        Callbacks for the trainer, in place of `report_to: mlflow`; see `options.changes.options_of_trainer`.

    Raises:
        ValueError: If the store cannot be reached or written; before anything is trained.
    """
    mlflow.set_tracking_uri(tracking_uri(tracking))  # where every process looks for `models:/..`
    with leave_together():
        if not tracking.tracking or not PartialState().is_main_process:
            yield []
            return
        output_dir = next(config.output_dir for config in configs if hasattr(config, "output_dir"))
        note, last_steps = open_run(tracking, run_name, stage, configs)
        delivery = Delivery(note["run_id"], note["tracking_uri"], output_dir, last_steps)
        callback = RunCallback(delivery, output_dir, note)
        outer = _open.set(callback)
        status = "FAILED"
        try:
            with system_metrics(note["run_id"], resumed=bool(last_steps)), signals_as_exceptions():
                yield [callback]
            if not callback.has_noted:  # else the model's id may stand there already
                callback.note()
            status = "FINISHED"
        except BaseException as error:
            status = outcome(error)
            raise
        finally:
            _open.reset(outer)
            delivery.close(status)


def outcome(error: BaseException) -> str:
    """Return the status of a run that an exception has ended."""
    if isinstance(error, KeyboardInterrupt | TerminatedError):
        return "KILLED"
    return "FINISHED" if isinstance(error, SystemExit) and not error.code else "FAILED"


@contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """Let SIGTERM and SIGUSR1 unwind what is inside, as Ctrl-C does; the exit code is the shell's, 143 or 138.

    While a trainer trains, `PreemptionCallback` answers first.
    """
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread only
        yield
        return
    before: dict[int, Any] = {number: signal.signal(number, terminate) for number in SIGNALS}
    try:
        yield
    except TerminatedError:
        before = dict.fromkeys(SIGNALS, signal.SIG_IGN)  # the next signal must not cut short the record of the end
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def log_results(metrics: dict[str, float], *files: Path) -> None:
    """Record metrics and files in the open run, at its latest step; without one, do nothing."""
    if (run := _open.get()) is None:
        return
    run.delivery.log_metrics(metrics)
    for file in files:
        run.delivery.log_artifact(file)


def log_model(tracking: TrackingArguments, directory: str, model_type: str, revision: str | None = None) -> None:
    """Record the model that the open run has trained and saved, and register it if asked; without a run, do nothing.

    Args:
        tracking: Whether to, and as a version of which registered model.
        directory: Where the model was saved.
        model_type: `policy` or `reward_model`.
        revision: Of the base of an adapter, if that is on the Hub.
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
    run.note()  # to which the model's id is added when it is sent
    run.delivery.log_model(model)


def log_datasets(name: str | None, **datasets: Dataset | None) -> None:
    """Record which data the open run uses, by a hash of its content; without a run, do nothing.

    Args:
        name: Of the dataset, as given by the user.
        datasets: By what they are for (`training`, `evaluation`); `None` is left out.
    """
    if (run := _open.get()) is None:
        return
    for context, dataset in datasets.items():
        if dataset is not None:
            digest = dataset_digest(dataset)
            run.delivery.set_tags({f"dataset.{context}": digest})
            run.delivery.log_dataset(f"{redact(str(name))}:{dataset.split}", digest, context)


@contextmanager
def track_pipeline(tracking: TrackingArguments, run_name: str, seed: int) -> Iterator[list[str]]:
    """Record a run that holds those of several stages, which run in processes of their own.

    MLflow works in a process of its own too: a store that is open must not be carried into a forked stage.

    Args:
        tracking: Where to record.
        run_name: Name shown in MLflow.
        seed: Of all stages.

    Yields:
        The options that put a stage's run under it; none without tracking.
    """
    if not tracking.tracking:
        yield []
        return
    note = _in_own_process(_open_pipeline, tracking, run_name, seed)
    status = "FAILED"
    try:
        with signals_as_exceptions():
            yield ["--parent_run_id", note["run_id"]]
        status = "FINISHED"
    except BaseException as error:
        status = outcome(error)
        raise
    finally:
        _in_own_process(end_run, tracking, note["run_id"], status)


def _open_pipeline(tracking: TrackingArguments, run_name: str, seed: int) -> dict[str, str]:
    return open_run(tracking, run_name, "pipeline", (), seed=seed)[0]


def _in_own_process(function: Any, *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except ValueError as error:  # raised again here, where a recipe knows it as a refusal of this library
            raise ValueError(str(error)) from None
