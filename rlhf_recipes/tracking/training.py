"""Train from Python as the recipes do: checked before the first step, recorded, and saved."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.integrations import MLflowCallback, TensorBoardCallback

from rlhf_recipes.durability.earlier_run import keep_foreign_card, move_earlier_run, own_directory
from rlhf_recipes.durability.preemption import PreemptionCallback
from rlhf_recipes.options.changes import with_changes
from rlhf_recipes.options.recipes import PreflightArguments, TrackingArguments
from rlhf_recipes.preflight.preflight import preflight
from rlhf_recipes.rewards.card import CARD_FILE
from rlhf_recipes.tracking.session import log_datasets, log_model, log_results, track_run
from rlhf_recipes.tracking.trackers import LOGGING_DIR


def train(
    trainer: Any, tracking: TrackingArguments | None = None, checks: PreflightArguments | None = None
) -> dict[str, float]:
    """Check, train and save a trainer of this library, record the run, and return its final metrics.

    The run is recorded in MLflow if `report_to` of the trainer's options names `mlflow`, and in the other trackers of
    `report_to`. The run ends with the call, and takes transformers' own callback for MLflow from the trainer: a later
    `trainer.evaluate()` is recorded in the other trackers alone. `resume_from_checkpoint` of the options resumes the
    run. Every process must call this.

    Args:
        trainer: `PPOTrainer`, `RewardModelTrainer`, or another trainer of `rlhf_recipes.trainers`.
        tracking: Store, experiment and name of the registered model in MLflow. Default: those of the environment.
        checks: Options of the start, for example `overwrite`.

    Raises:
        ValueError: If the output directory holds an earlier run, the preflight finds an error, the store cannot be
            reached, or the training data are no `datasets.Dataset`.
    """
    args, wanted, checks = trainer.args, tracking or TrackingArguments(), checks or PreflightArguments()
    wanted = replace(wanted, tracking=wanted.tracking and "mlflow" in args.report_to)
    rows, evaluation = trainer.given_data or (trainer.train_dataset, trainer.eval_dataset)
    if not isinstance(rows, Dataset):
        raise ValueError(
            f"`train_dataset` is a {type(rows).__name__}. `rlhf_recipes.train` counts rows before the first step, so "
            "it needs a `datasets.Dataset`. Give the trainer one, or call `trainer.train()`."
        )
    evaluation = evaluation if isinstance(evaluation, Dataset) else None
    with (
        training_run(trainer.stage, wanted, checks, trainer.given, args) as callbacks,
        _attached(trainer, callbacks),
    ):
        log_datasets(rows.info.dataset_name or "a dataset in memory", training=rows, evaluation=evaluation)
        preflight(trainer, rows, evaluation, checks, wanted)
        return train_and_save(trainer, wanted)


@contextmanager
def training_run(
    stage: str, tracking: TrackingArguments, checks: PreflightArguments, *configs: Any
) -> Iterator[list[TrainerCallback]]:
    """Hold the output directory of a training, and record the body, as `own_directory` and `track_run` do.

    Args:
        stage: Stage of the run, for MLflow.
        tracking: Whether and where to record. A preflight alone is not recorded.
        checks: Options of the start.
        configs: Options of the run. Those of the trainer have `output_dir` and `run_name`.

    Yields:
        Callbacks for the trainer.
    """
    args = next(config for config in configs if hasattr(config, "output_dir"))
    recorded, trains = checks.recorded(tracking), not checks.preflight_only
    with (
        own_directory(args, checks, tracking, *configs),
        track_run(recorded, args.run_name or args.output_dir, stage, *configs, trains=trains) as callbacks,
    ):
        yield callbacks


def train_and_save(trainer: Any, tracking: TrackingArguments) -> dict[str, float]:
    """Train or resume, save, evaluate if the stage ends so, and record the result in the open run.

    Args:
        trainer: Trainer of this library, after its preflight.
        tracking: Options of the record.

    Returns:
        The final metrics.
    """
    args = trainer.args
    move_earlier_run(args.output_dir)
    keep_foreign_card(args.output_dir)
    metrics = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint).metrics | trainer.conclude()
    card = Path(args.output_dir, CARD_FILE)
    log_results(metrics, *[card] * card.is_file())
    log_model(tracking, args.output_dir, trainer.model_type, trainer.given.model_revision)
    return metrics


@contextmanager
def _attached(trainer: Any, callbacks: list[TrainerCallback]) -> Iterator[None]:
    """Give a trainer the callbacks of the record, and one that answers signals, inside."""
    trainer.remove_callback(MLflowCallback)  # transformers' own would record all twice
    events = [
        c for c in trainer.callback_handler.callbacks if isinstance(c, TensorBoardCallback) and not c.logging_dir
    ]
    for callback in events:  # it has read the environment before the run was open
        callback.logging_dir = os.environ.get(LOGGING_DIR)
    known = {type(callback) for callback in trainer.callback_handler.callbacks}
    own = [*callbacks] if PreemptionCallback in known else [*callbacks, PreemptionCallback()]
    # The callbacks that print take a figure out of the log, so they come last.
    printing = [trainer.pop_callback(kind) for kind in (ProgressCallback, PrinterCallback)]
    for callback in (*own, *filter(None, printing)):
        trainer.add_callback(callback)
    given = trainer.args
    # TRL's profiling would write to MLflow itself, and wait for it.
    trainer.args = with_changes(given, report_to=[name for name in given.report_to if name != "mlflow"])
    try:
        yield
    finally:
        trainer.args = given
        for callback in events:
            callback.logging_dir = None  # the next run has a directory of its own
        for callback in own:
            trainer.remove_callback(type(callback))  # a checkpoint may have replaced the object
