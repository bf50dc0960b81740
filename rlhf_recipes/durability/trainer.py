"""A trainer whose checkpoints are whole or not there.

Overrides only, on `transformers.Trainer`, to be mixed into TRL's trainers.
"""

import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from rlhf_recipes.durability.checkpoints import STAGING, checkpoint_to_resume, publish, remove_old
from rlhf_recipes.durability.termination import SIGNALS
from rlhf_recipes.options.secrets import keep_token_out_of_files, without_secrets


class DurableTrainer(Trainer):
    """Write a checkpoint beside the others and rename it when it is whole; resume only from one that is."""

    args: Any
    _staging: str | None = None  # folder in which a checkpoint is being written
    _resumed_from: str | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as transformers does.

        Args:
            resume_from_checkpoint: As in `checkpoints.checkpoint_to_resume`: true starts afresh if there is none.
            args: Passed on.
            kwargs: Passed on.

        Raises:
            ValueError: If the checkpoint is not whole, or holds nothing but the model.
        """
        self._resumed_from = checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)
        if checkpoint is not None:
            _refuse_weights_alone(checkpoint)
        self.args.restore_callback_states_from_checkpoint = True  # early stopping counts on
        return super().train(checkpoint, *args, **kwargs)

    def _run_epoch(self, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # transformers would train one step more
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler=skip_scheduler)
        at_resume = skip_scheduler and self.state.global_step > 0  # it was due before
        if at_resume and self._determine_best_metric(metrics, trial):
            self.state.best_model_checkpoint = self._resumed_from  # which was written before it was known as the best
        return metrics

    def _get_dataloader(self, *args: Any, **options: Any) -> Any:
        """Return TRL's, whose worker processes do not end of the signal that a scheduler sends to all of a job."""
        loader = super()._get_dataloader(*args, **options)
        inner = getattr(loader, "base_dataloader", loader)  # accelerate's is around torch's
        inner.worker_init_fn = partial(_ignore_signals, inner.worker_init_fn)
        return loader

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir, name = Path(self._get_output_dir(trial)), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staged, final = run_dir / STAGING / name, run_dir / name
        if self.args.should_save:
            shutil.rmtree(staged.parent, ignore_errors=True)  # of an attempt that did not come to its end
        self.accelerator.wait_for_everyone()
        self._staging = str(staged.parent)
        try:
            super()._save_checkpoint(model, trial)
            self._save_progress(staged)
            if self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = str(final)
                if self.args.should_save:  # transformers has written the path in which it is staged
                    self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                publish(staged, final)
        except Exception as error:  # a full disk has another exception in every library
            if self.args.should_save:
                shutil.rmtree(staged.parent, ignore_errors=True)
            raise OSError(
                f"Checkpoint {final} could not be written: {error} Those before it are whole. Make room, or keep "
                "fewer by `save_total_limit`, and go on with `resume_from_checkpoint: true`."
            ) from error
        finally:
            self._staging = None
        if self.args.should_save:
            remove_old(run_dir, self.args.save_total_limit, keep=[self.state.best_model_checkpoint])
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with self._secrets_kept_out():
            super()._save(output_dir, state_dict=state_dict)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        with self._secrets_kept_out():
            super()._push_from_checkpoint(checkpoint_folder)

    @contextmanager
    def _secrets_kept_out(self) -> Iterator[None]:
        """Give transformers options without secrets while it writes a pickle of them beside the weights."""
        keep_token_out_of_files(self.args)
        args, self.args = self.args, without_secrets(self.args)
        try:
            yield
        finally:
            self.args = args

    def _save_progress(self, folder: Path) -> None:
        """Write what transformers does not know of into a checkpoint. Every rank makes the call."""


def _ignore_signals(initialize: Any, worker: int) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if initialize is not None:
        initialize(worker)


def _refuse_weights_alone(checkpoint: str) -> None:
    """Refuse what transformers would go on from in silence, with an optimiser and a schedule that begin anew."""
    if not any(Path(checkpoint).glob("rng_state*.pth")):  # beside the optimiser, whose files differ by the backend
        raise ValueError(
            f"`resume_from_checkpoint` {checkpoint} was written with `save_only_model: true`: it has no optimiser, "
            "schedule and random states to go on with. Name a checkpoint that has them, or start a run from its "
            f"weights: `model_name_or_path: {checkpoint}`, another `output_dir`, no `resume_from_checkpoint`."
        )
