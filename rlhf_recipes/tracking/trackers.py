"""Record a run in other trackers beside MLflow: the callbacks of transformers send the figures, and this the tables.

A tracker whose runs have ids gets the id of the MLflow run. So a run that resumes continues its run there, too.
"""

import importlib
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState

from rlhf_recipes.evaluation.samples import SAMPLES_DIRECTORY, read_table, tables_of_step
from rlhf_recipes.options.secrets import reason_of
from rlhf_recipes.tracking.description import outcome

WITH_TABLES = ("wandb", "trackio")
LOGGING_DIR = "TENSORBOARD_LOGGING_DIR"  # of transformers
# transformers' axis of steps in both trackers.
STEP = "train/global_step"


class TableCallback(TrainerCallback):
    """Send the tables of completions that the trainer wrote.

    Args:
        trackers: Modules `wandb` and `trackio`, in which transformers has opened a run.
        output_dir: Output directory of the run.
    """

    def __init__(self, trackers: list[Any], output_dir: str) -> None:
        self._trackers, self._output_dir = trackers, output_dir
        self._sent: set[Path] = set()

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Send the tables of this step that are not sent yet."""
        if not state.is_world_process_zero:
            return
        for file in tables_of_step(self._output_dir, state.global_step):
            if file in self._sent:
                continue
            self._sent.add(file)
            table = read_table(file)
            name = f"{SAMPLES_DIRECTORY}/{file.stem.rpartition('-')[0]}"
            for tracker in self._trackers:
                tracker.log({name: tracker.Table(dataframe=table), STEP: state.global_step})


@contextmanager
def other_trackers(
    report_to: list[str], run_name: str, output_dir: str, run_id: str | None
) -> Iterator[list[TrainerCallback]]:
    """Let the trackers of `report_to` other than MLflow record inside. Only the first process calls this.

    Args:
        report_to: Names of the trackers.
        run_name: Name of the run.
        output_dir: Output directory of the run.
        run_id: Id of the MLflow run; `None` without one. A resumed run is then a new one in the other trackers.

    Yields:
        Callbacks for the trainer, after those of transformers.

    Raises:
        ValueError: If wandb cannot start a run.
    """
    with ExitStack() as opened:
        if "tensorboard" in report_to and run_id is not None:
            opened.enter_context(_tensorboard_directory(Path(output_dir, "runs", run_id)))
        if "wandb" in report_to:
            opened.enter_context(_wandb_run(run_name, run_id))
        tables = [importlib.import_module(name) for name in WITH_TABLES if name in report_to]
        yield [TableCallback(tables, output_dir)] if tables else []


@contextmanager
def _tensorboard_directory(directory: Path) -> Iterator[None]:
    """Let transformers write its events to a directory, unless the user has named one."""
    if LOGGING_DIR in os.environ:
        yield
        return
    os.environ[LOGGING_DIR] = str(directory)
    try:
        yield
    finally:
        os.environ.pop(LOGGING_DIR, None)


@contextmanager
def _wandb_run(run_name: str, run_id: str | None) -> Iterator[None]:
    """Open a run of wandb, which the callback of transformers then uses, and end it with the outcome of the body."""
    wandb = importlib.import_module("wandb")
    if wandb.run is not None:  # the user's own
        yield
        return
    project = os.environ.get("WANDB_PROJECT", "huggingface")  # the default of transformers
    try:
        run = wandb.init(project=project, name=run_name, id=os.environ.get("WANDB_RUN_ID", run_id), resume="allow")
    except wandb.Error as error:
        raise ValueError(
            f"`report_to` names wandb, which cannot start a run: {reason_of(error)} Log in (`wandb login`), set "
            "`WANDB_MODE=offline`, or leave it out."
        ) from error
    exit_code = 0
    try:
        yield
    except BaseException as error:
        exit_code = int(outcome(error) != "FINISHED")
        raise
    finally:
        run.finish(exit_code=exit_code)
