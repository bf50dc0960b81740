"""A trainer whose figures continue when it is resumed: what transformers and TRL keep in memory only, in checkpoints.

A mixin for TRL's trainers, of overrides of `transformers.Trainer`.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate.utils import send_to_device
from transformers import TrainerCallback

from rlhf_recipes.durability.pushing import PushingTrainer


@runtime_checkable
class CheckpointPart(Protocol):
    """A callback with a file of its own in every checkpoint."""

    def save_into(self, folder: Path) -> None:
        """Write the file into a checkpoint."""


class ProgressTrainer(PushingTrainer):
    """Log the figures of an uninterrupted run after a resume.

    `train_runtime` and the rates count the time of all steps that the run kept, without the pauses between.
    """

    control: Any
    _metrics: Any  # TRL's: figures since the latest log
    _total_train_tokens: int  # TRL's
    _progress_file = "progress_{}.pt"  # by rank
    _began = 0.0  # time at which the run would have begun without pauses, seconds
    is_epoch_over = False  # whether the log, evaluation and checkpoint at the end of the epoch have been decided on
    _owes_epoch_end = False
    _random: TemporaryDirectory[str] | None = None  # random states after an evaluation that was still due
    _of_last_step: tuple[Any, Any] = (None, None)  # gradient norm and learning rate

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(ProgressCallback(self))

    def _save_progress(self, folder: Path) -> None:
        super()._save_progress(folder)
        torch.save(self._progress(), folder / self._progress_file.format(self.accelerator.process_index))
        if self.args.should_save:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, CheckpointPart):
                    callback.save_into(folder)

    def _progress(self) -> dict[str, Any]:
        """Return the figures of this rank since the latest log, and the sums of the run."""
        grad_norm, learning_rate = self._of_last_step
        return {
            "num_processes": self.accelerator.num_processes,
            "metrics": {name: [_plain(value) for value in values] for name, values in self._metrics["train"].items()},
            "loss": self._tr_loss,
            "last_logged": self._globalstep_last_logged,
            "total_loss": self._total_loss_scalar,
            "first_step": self._initial_global_step,
            "first_tokens": self._initial_num_input_tokens_seen,
            "tokens": self._total_train_tokens,
            "seconds": time.time() - self._began,
            "is_training": self.model.training,
            "is_epoch_over": self.is_epoch_over,
            "of_last_step": (grad_norm.item() if isinstance(grad_norm, torch.Tensor) else grad_norm, learning_rate),
        }

    def restore_progress(self) -> None:
        """Continue the figures of the checkpoint that is resumed, if there is one."""
        self._began = time.time()
        self._owes_epoch_end, self._random = False, None
        progress = self._progress_to_resume()
        if not progress:
            return
        self._metrics["train"].clear()
        self._metrics["train"].update(progress["metrics"])
        self._tr_loss, self._globalstep_last_logged = progress["loss"], progress["last_logged"]
        # An earlier version kept only what is above: its mean loss is that of the steps since the latest log.
        self._total_loss_scalar = progress.get("total_loss", 0.0)
        self._initial_global_step = progress.get("first_step", progress["last_logged"])
        if "seconds" not in progress:
            return
        self._began -= progress["seconds"]
        self._initial_num_input_tokens_seen = progress["first_tokens"]
        self._total_train_tokens = progress["tokens"]
        self._of_last_step = progress["of_last_step"]
        self.model.train(progress["is_training"])  # the figures of a log are those of training or of an evaluation
        is_at_end = self.state.epoch.is_integer() or self.state.global_step >= self.state.max_steps
        self._owes_epoch_end = is_at_end and not progress["is_epoch_over"]

    def _progress_to_resume(self) -> dict[str, Any]:
        """Return the progress in the checkpoint that is resumed, or nothing.

        With another number of processes, the figures over all ranks are those of rank 0, and the loss is the mean.
        """
        if self._resumed_from is None:
            return {}
        progress = self._saved_progress(self._resumed_from, self.accelerator.process_index)
        if progress.get("num_processes") == self.accelerator.num_processes:
            return progress
        progress = self._saved_progress(self._resumed_from, 0)
        ranks = range(progress.get("num_processes", 0))
        losses = [self._saved_progress(self._resumed_from, rank)["loss"] for rank in ranks]
        return progress | {"loss": torch.stack(losses).mean()} if losses else {}

    def _saved_progress(self, checkpoint: str, rank: int) -> dict[str, Any]:
        """Return the progress that a rank has saved in a checkpoint, or nothing."""
        path = Path(checkpoint, self._progress_file.format(rank))
        progress = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else {}
        return dict(send_to_device(progress, self.accelerator.device))

    def _run_epoch(self, **kwargs: Any) -> None:
        self._end_epoch_before(kwargs["trial"])
        if not self.control.should_training_stop:
            super()._run_epoch(**kwargs | {"start_time": self._began})

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: float) -> Any:
        self._end_epoch_before(trial)
        return super()._finalize_training(trial, num_train_samples, self._began)

    def _end_epoch_before(self, trial: Any) -> None:
        """Log, evaluate and save at the end of an epoch, if the run was interrupted between its last step and that."""
        if not self._owes_epoch_end:
            return
        self._owes_epoch_end = False
        for order in ("should_log", "should_evaluate", "should_save"):  # of the step, as the checkpoint holds them
            setattr(self.control, order, False)
        grad_norm, learning_rate = self._of_last_step
        with self._random_states_of_checkpoint():
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            ours = (self._tr_loss, grad_norm, self.model_wrapped, trial, self.state.epoch, None, self._began)
            self._maybe_log_save_evaluate(*ours, learning_rate=learning_rate)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        is_late = skip_scheduler and self._resumed_from is not None  # a signal left it out before
        with self._random_states_of_checkpoint() if is_late else nullcontext():
            return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler=skip_scheduler)

    @contextmanager
    def _random_states_of_checkpoint(self) -> Iterator[None]:
        """Draw random numbers inside as the run would have done without the interruption, and go on from there."""
        self._load_rng_state(self._resumed_from)
        yield
        folder = TemporaryDirectory()
        self._save_rng_state(folder.name)
        self._random = folder

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint if self._random is None else self._random.name)

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: Any, *args: Any, learning_rate: float | None = None
    ) -> None:
        self._of_last_step = grad_norm, learning_rate
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, learning_rate=learning_rate)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, but leave the figures of the whole run to the session that ends it."""
        if "train_runtime" in logs and any(callback.preempted for callback in self._preemption_callbacks()):
            return
        super().log(logs, start_time)


class ProgressCallback(TrainerCallback):
    """Restore the progress of a checkpoint, once transformers has set its sums to zero, and notice ends of epochs.

    Args:
        trainer: Trainer that it belongs to.
    """

    def __init__(self, trainer: ProgressTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore it."""
        self._trainer.restore_progress()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note that the epoch is not over."""
        self._trainer.is_epoch_over = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note that it is."""
        self._trainer.is_epoch_over = True


def _plain(figure: Any) -> Any:
    """Return a number that can be loaded without running code; those of numpy cannot."""
    return figure if figure is None or type(figure) in (int, float, torch.Tensor) else float(figure)
