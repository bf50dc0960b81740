"""A trainer that writes a checkpoint whole or not at all, and resumes from it.

A mixin for TRL's trainers, of overrides of `transformers.Trainer`.
"""

import logging
import math
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from rlhf_recipes.algorithm.distributed import global_max
from rlhf_recipes.durability.checkpoints import STAGING, checkpoint_to_resume, publish, remove_old
from rlhf_recipes.durability.collectives import hangs_named, limit_collectives
from rlhf_recipes.durability.extensions import watch_locks
from rlhf_recipes.durability.finite import FiniteTrainer
from rlhf_recipes.durability.occupied import occupied
from rlhf_recipes.durability.pickles import refuse_code
from rlhf_recipes.durability.preemption import PreemptionCallback, evaluation_is_due
from rlhf_recipes.durability.termination import STOPS
from rlhf_recipes.options.changes import with_changes
from rlhf_recipes.options.secrets import without_secrets

FINISHED_FILE = "finished.txt"  # in the last checkpoint of a run that ended itself before its last step: the step
logger = logging.getLogger(__name__)
watch_locks()  # DeepSpeed compiles when the options of a run are created, before there is a trainer


class DurableTrainer(FiniteTrainer):
    """Write a checkpoint in a folder of its own and rename it when it is whole; resume only from a whole one.

    Never change the options of the user. transformers takes some decisions from its options alone: for these it gets
    other options during one call.
    """

    control: Any  # transformers' TrainerControl
    _staging: str | None = None  # folder of a checkpoint that is not whole yet
    _resumed_from: str | None = None
    _has_failed = False  # an evaluation, which the next checkpoint still owes
    _has_stopped = False  # the run ended itself after an evaluation, before its last step
    _saved_step = 0  # of the latest checkpoint
    _saved_end = False  # whether the latest checkpoint shows that the run has ended itself

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as transformers does, from the checkpoint that `checkpoints.checkpoint_to_resume` finds.

        Raises:
            ValueError: If another process trains in `output_dir`; if the checkpoint is not whole, holds only the
                model, or may run code; or if the numbers of the training are not finite, see `FiniteTrainer`.
        """
        with occupied(self.args.output_dir):
            return self._train_alone(resume_from_checkpoint, *args, **kwargs)

    def _train_alone(self, resume_from_checkpoint: str | bool | None, *args: Any, **kwargs: Any) -> Any:
        self._resumed_from = checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)
        self._last_checkpoint, self._saved_step = checkpoint, 0
        self._has_stopped = self._saved_end = checkpoint is not None and Path(checkpoint, FINISHED_FILE).exists()
        changes = {"restore_callback_states_from_checkpoint": True}  # early stopping goes on counting
        if checkpoint is not None:
            refuse_code(checkpoint)
            _refuse_weights_alone(checkpoint)
            if self._has_stopped:
                logger.warning(
                    f"The run of {checkpoint} has ended itself after an evaluation, so no step is trained. To train "
                    f"on, start a run from its weights: `model_name_or_path: {checkpoint}`, another `output_dir`."
                )
            state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
            self._saved_step = state.global_step
            # The run was evaluated at its start. Only an evaluation that a signal left out is still due.
            changes["eval_on_start"] = evaluation_is_due(state)
        else:
            self.check_start()
        with hangs_named(), self._options(with_changes(self.args, **changes)):
            output = super().train(checkpoint, *args, **kwargs)
        if checkpoint is None:
            self.check_any_step()
        return output

    def create_accelerator_and_postprocess(self) -> None:
        """Connect the processes as transformers does, and limit their waits for each other."""
        super().create_accelerator_and_postprocess()
        limit_collectives(self.args.ddp_timeout)

    def _run_epoch(self, **kwargs: Any) -> None:
        # transformers looks at both only after a step.
        if self.state.global_step >= self.state.max_steps or self._has_stopped:
            self.control.should_training_stop = True
            return
        before, is_resumed = self.state.global_step, bool(kwargs.get("steps_trained_in_current_epoch"))
        super()._run_epoch(**kwargs)
        is_stopped = self.control.should_training_stop or self.control.should_epoch_stop
        if self.state.global_step == before and not (is_stopped or is_resumed):  # transformers ends as usual, or never
            raise ValueError(
                f"A pass over `train_dataset` made no optimiser step after step {before}: it has fewer rows than one "
                "step needs (`per_device_train_batch_size` x processes x `gradient_accumulation_steps`). Add rows, or "
                "lower one of these."
            )

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        is_alone = self.accelerator.num_processes == 1
        is_last = self.state.global_step >= self.state.max_steps and not self.args.push_to_hub
        if is_last and not is_alone:  # after an error of one process, the others would not take part in saving
            self.save_model(self.args.output_dir)
            self.accelerator.wait_for_everyone()
        was_stopped = self.control.should_training_stop
        try:
            metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler=skip_scheduler)
        except Exception:
            if is_alone and self.state.global_step > 0:
                self._keep_trained(trial, is_last=is_last)
            raise
        # A callback that ends a run for another reason, such as a time limit, does not wait for an evaluation.
        self._has_stopped = self._has_stopped or (self.control.should_training_stop and not was_stopped)
        is_late = skip_scheduler and self.state.global_step > 0  # a signal left it out before
        if is_late and self._determine_best_metric(metrics, trial):
            self.state.best_model_checkpoint = self._resumed_from  # written before anything showed that it is the best
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Plan a checkpoint of each new best model, also between two others: `load_best_model_at_end` needs it."""
        name = f"eval_{(self.args.metric_for_best_model or '').removeprefix('eval_')}"
        if not math.isfinite(metrics.get(name, 0.0)):
            logger.warning(
                f"Step {self.state.global_step}: {name} is {metrics[name]}. It cannot show the best checkpoint."
            )
            return False
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best and self.args.load_best_model_at_end:
            self.control.should_save = True
        return is_best

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        """Write the checkpoint that shows the end, if the last one does not. Keep it, whatever is the best one."""
        if self._owes_checkpoint():
            self._save_checkpoint(self.model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        with self._options(with_changes(self.args, save_total_limit=None)):  # 1 would delete it
            return super()._finalize_training(trial, *args, **kwargs)

    def _owes_checkpoint(self) -> bool:
        """Return whether a resume would train again what this run has trained."""
        step = self.state.global_step
        if self.args.save_strategy == SaveStrategy.NO or self.args.save_only_model:
            return False
        return not self._saved_end if self._has_stopped else step >= self.state.max_steps and step != self._saved_step

    def _load_best_model(self) -> None:
        refuse_code(str(self.state.best_model_checkpoint))  # it may come from a resumed checkpoint, as a text
        super()._load_best_model()

    def _keep_trained(self, trial: Any, *, is_last: bool) -> None:
        """After a failed evaluation, write a checkpoint and the model of the last step.

        A resume begins with that evaluation.
        """
        for callback in self._preemption_callbacks():
            callback.evaluation_due = True
        self._has_failed = True
        try:
            self._save_checkpoint(self.model, trial)
            if is_last:
                self.save_model(self.args.output_dir)
        except Exception as error:  # the run ends with the error of the evaluation
            logger.warning(f"The evaluation failed, and so did this: {error}")
            return
        logger.warning(
            f"The evaluation failed. {self._last_checkpoint} holds what was trained: correct the cause, and resume "
            "with `resume_from_checkpoint: true`."
        )

    def _get_dataloader(self, *args: Any, **options: Any) -> Any:
        """Return TRL's, with worker processes that ignore the signal of a scheduler to every process of a job."""
        loader = super()._get_dataloader(*args, **options)
        inner = getattr(loader, "base_dataloader", loader)  # accelerate's is around torch's
        inner.worker_init_fn = partial(_ignore_signals, inner.worker_init_fn)
        return loader

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.check_trained()  # also what evaluations and callbacks have done since the step
        self.check_moments()
        run_dir, name = Path(self._get_output_dir(trial)), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staged, final = run_dir / STAGING / name, run_dir / name
        if self.args.should_save:
            shutil.rmtree(staged.parent, ignore_errors=True)  # of an attempt that failed
        self.accelerator.wait_for_everyone()
        self._staging = str(staged.parent)
        # Weights alone cannot be resumed.
        is_left = self._has_failed or any(callback.preempted for callback in self._preemption_callbacks())
        only_model = self.args.save_only_model and not is_left
        try:
            with hangs_named():
                with self._options(with_changes(self.args, save_only_model=only_model)):
                    super()._save_checkpoint(model, trial)
                self._complete(staged, final)
        except Exception as error:  # every library has its own exception for a full disk
            if self.args.should_save:
                shutil.rmtree(staged.parent, ignore_errors=True)
            if isinstance(error, TimeoutError) and error.errno is None:  # of `hangs_named`, not of a file
                raise
            raise OSError(
                f"Checkpoint {final} could not be written: {error} Those before it are whole. Make room, or keep "
                "fewer by `save_total_limit`, and resume with `resume_from_checkpoint: true`."
            ) from error
        finally:
            self._staging = None
        self._last_checkpoint = str(final)
        self._saved_step, self._saved_end = self.state.global_step, self._has_stopped
        if self.args.should_save:
            keep = [self.state.best_model_checkpoint]
            remove_old(run_dir, self.args.save_total_limit, keep, published=final)
        self.accelerator.wait_for_everyone()

    def _complete(self, staged: Path, final: Path) -> None:
        """Add to a checkpoint what transformers does not save, and give it its final name when all have written."""
        self._save_progress(staged)
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(final)
            if self.args.should_save:  # transformers has written the path of the unfinished checkpoint
                self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if self._has_stopped:
                (staged / FINISHED_FILE).write_text(f"{self.state.global_step}\n", encoding="utf-8")
            publish(staged, final)

    def _on_any_rank(self, flag: Tensor) -> bool:
        """Return whether a rank has set the flag, and ask for signals in the same reduction."""
        callbacks = self._preemption_callbacks()
        own = flag.new_tensor(max((callback.received for callback in callbacks), default=0))
        is_set, number = global_max(torch.stack([flag, own])).tolist()
        for callback in callbacks:
            callback.agreed = number
        return bool(is_set)

    def _preemption_callbacks(self) -> list[PreemptionCallback]:
        # A restored checkpoint replaces the callback by another instance: look it up each time.
        return [c for c in self.callback_handler.callbacks if isinstance(c, PreemptionCallback)]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, if its weights are finite.

        Raises:
            DivergedError: If they are not.
        """
        if not _internal_call:  # else `_save_checkpoint` has looked at them
            self.check_trained()
            with self._explained_if_full(output_dir or self.args.output_dir):
                super().save_model(output_dir)
            return
        super().save_model(output_dir, _internal_call)

    def save_state(self) -> None:
        """Save the state of the trainer."""
        with self._explained_if_full(self.args.output_dir):
            super().save_state()

    @contextmanager
    def _explained_if_full(self, folder: str) -> Iterator[None]:
        """Say in one line that a file of the end could not be written, and what is whole."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            if isinstance(error, OSError) and error.errno is None:  # of a push to the Hub
                raise
            raise OSError(
                f"{folder} could not be written: {error} {self._way_back()} Make room, and run the same command with "
                "`resume_from_checkpoint: true`."
            ) from error

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with self._options(without_secrets(self.args)):  # transformers pickles them beside the weights
            super()._save(output_dir, state_dict=state_dict)

    @contextmanager
    def _options(self, args: Any) -> Iterator[None]:
        """Give transformers other options for a while."""
        own, self.args = self.args, args
        try:
            yield
        finally:
            self.args = own

    def _save_progress(self, folder: Path) -> None:
        """Write into a checkpoint what transformers does not save. Every rank makes the call."""


def _ignore_signals(initialize: Any, worker: int) -> None:
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    if initialize is not None:
        initialize(worker)


def _refuse_weights_alone(checkpoint: str) -> None:
    """Refuse a checkpoint from which transformers would silently resume with a new optimiser and a new schedule."""
    if not any(Path(checkpoint).glob("rng_state*.pth")):  # beside the optimiser, whose files differ by the backend
        raise ValueError(
            f"`resume_from_checkpoint` {checkpoint} was written with `save_only_model: true`: it has no optimiser, "
            "schedule and random states, which a resume needs. Name a checkpoint that has them, or start a run from "
            f"its weights: `model_name_or_path: {checkpoint}`, another `output_dir`, no `resume_from_checkpoint`."
        )
