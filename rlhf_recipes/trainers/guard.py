"""Guards that act while PPO trains: they withhold optimiser steps, go back to a checkpoint, and warn of drift.

Every decision is taken from figures over all ranks, so that all ranks take the same one.
"""

import logging
import math
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, set_seed
from torch import Tensor, nn
from transformers import TrainerCallback

from rlhf_recipes.durability.checkpoints import abandon, checkpoints_by_age, find_defect, is_abandoned
from rlhf_recipes.models.critic import VALUE_HEAD_NAME
from rlhf_recipes.options.ppo import PPOConfig


class CriticWarmupCallback(TrainerCallback):
    """Withhold every gradient but the value head's for the first optimiser steps.

    A zero gradient would still decay weights, and advance Adam's step count, which makes the first real step too long.

    Args:
        model: Policy with a value head.
        steps: Optimiser steps at the start of training.
    """

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.model, self.steps = model, steps

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop the gradients between clipping and the step."""
        if state.global_step < self.steps:
            for name, parameter in self.model.named_parameters():
                if f"{VALUE_HEAD_NAME}." not in name:
                    parameter.grad = None


SEED_STRIDE = 10_007  # between the random numbers of two attempts; more than there are ranks
logger = logging.getLogger(__name__)


class DivergedError(ValueError):
    """A run that cannot go on by itself. The message says what to change."""


class RollbackError(Exception):
    """What unwinds the training loop, to be taken up again from an earlier checkpoint.

    Args:
        reason: What has happened, a sentence.
        advice: What to change if going back does not help, a sentence.
        latest: Latest optimiser step whose checkpoint is good.
    """

    def __init__(self, reason: str, advice: str, latest: int) -> None:
        super().__init__(reason)
        self.reason, self.advice, self.latest = reason, advice, latest


class TrainingGuard(TrainerCallback):
    """Withhold optimiser steps that would do harm, and go back to a checkpoint when that is not enough.

    A step is withheld by dropping its gradients: weights and the optimiser's state stay as they are, bit for bit,
    while step and schedule go on. Its state, plain numbers, is part of every checkpoint.

    Args:
        args: Options.
        is_main: Whether this process is the one that speaks.
        deepspeed: Whether DeepSpeed trains: it steps inside of backward, so that nothing can be withheld.
        fsdp: Whether FSDP trains: weights in shards are not loaded a second time.

    Raises:
        ValueError: If an option cannot be kept under DeepSpeed, FSDP or fp16.
    """

    def __init__(self, args: PPOConfig, *, is_main: bool, deepspeed: bool = False, fsdp: bool = False) -> None:
        if args.max_update_kl is not None and (deepspeed or args.fp16):
            raise ValueError(
                "`max_update_kl` is not available with DeepSpeed or `fp16`: a step cannot be left out there. Use DDP "
                "or FSDP2 with `bf16`, or lower `num_iterations` or `learning_rate`."
            )
        if args.max_kl is not None and (deepspeed or fsdp):
            raise ValueError(
                "`max_kl` is not available with DeepSpeed or FSDP: a run goes back to a checkpoint on one process or "
                "under DDP only. Use `kl_controller: adaptive` or `max_update_kl`, or raise `kl_coef`."
            )
        self.args, self._is_main, self._deepspeed = args, is_main, deepspeed
        self._can_roll_back = not (deepspeed or fsdp or args.save_only_model)
        self.skipped_steps = self.stopped_steps = self.rollbacks = 0
        self.learning_rate_factor = 1.0
        self.has_stopped = False  # for the rest of this rollout
        self._in_a_row = 0
        self.retries = False  # from a checkpoint, which has not been left yet
        self._loaded_factor = 1.0
        self._saved_steps = set[int]()
        self._earlier: list[tuple[int, Path]] = []  # checkpoints of the run that this one resumes
        self._clear_step()

    def _clear_step(self) -> None:
        self._tokens, self._kl, self._is_finite = 0.0, 0.0, True

    def begin_step(self, *, starts_rollout: bool) -> None:
        """Begin a micro-batch."""
        if starts_rollout:
            self.has_stopped = False
        if self.retries:  # else the attempt that went wrong would be sampled again
            set_seed(self.args.seed + SEED_STRIDE * self.rollbacks, device_specific=True)
            self.retries = False

    def observe_update(self, weight: float, metrics: dict[str, float]) -> None:
        """Take note of one micro-batch.

        Args:
            weight: Of its tokens.
            metrics: Of `update_metrics`, times the weight.
        """
        self._tokens += weight
        self._kl += metrics["policy/approx_kl"]
        self._is_finite = self._is_finite and all(map(math.isfinite, metrics.values()))

    def observe_rollout(self, kl: float, step: int) -> None:
        """Look at a rollout before it is trained on.

        Args:
            kl: To the reference, nats per sequence.
            step: Optimiser steps so far.

        Raises:
            RollbackError: If the policy that sampled it has gone too far.
        """
        if self.args.max_kl is not None and not kl <= self.args.max_kl:
            reason = f"Step {step}: the KL to the reference is {kl:.3g} nats, over `max_kl` ({self.args.max_kl:g})."
            advice = "Lower `learning_rate`, raise `kl_coef`, or set `max_update_kl`."
            raise RollbackError(reason, advice, step - 1)  # a checkpoint of this step holds the same policy

    def finish_step(self, model: nn.Module, grad_norm: Any, step: int) -> None:
        """Decide on an optimiser step whose gradients are there.

        Args:
            model: Whose gradients are dropped if it is withheld.
            grad_norm: Over all ranks.
            step: Optimiser steps before this one.

        Raises:
            RollbackError: If too many in a row had to be withheld.
        """
        if self.has_stopped:
            self.stopped_steps += 1
            return
        tokens, kl, is_finite = self._tokens, self._kl, self._is_finite
        self._clear_step()
        # DeepSpeed's norm is of an earlier step, and fp16 overflows while its loss scale is being found.
        if is_finite and (self._deepspeed or self.args.fp16 or _is_finite(grad_norm)):
            self._in_a_row = 0
            if self.args.max_update_kl is not None and kl > self.args.max_update_kl * tokens:
                self._stop(model, kl / tokens, step)
        else:
            self._skip(model, step)

    def _stop(self, model: nn.Module, kl: float, step: int) -> None:
        model.zero_grad()
        if self._is_main and not self.stopped_steps:
            logger.warning(
                f"Step {step + 1}: the policy is {kl:.3g} nats per token from the one that sampled, over "
                "`max_update_kl`: this step and the remaining ones on its rollout are left out. "
                "`guard/stopped_steps` counts them; this line is not repeated."
            )
        self.has_stopped = True
        self.stopped_steps += 1

    def _skip(self, model: nn.Module, step: int) -> None:
        model.zero_grad()
        self.skipped_steps += 1
        self._in_a_row += 1
        limit = self.args.max_skipped_steps
        what = f"Step {step + 1}: the loss or its gradient is not finite"
        if self._in_a_row < limit:
            fate = "DeepSpeed has taken it" if self._deepspeed else "the step is left out"
            self._warn(f"{what}: {fate} ({self._in_a_row} in a row, `max_skipped_steps` is {limit}).")
            return
        advice = (
            "Lower `learning_rate` or `max_grad_norm`, train in `bf16` or float32 rather than `fp16`, and look for "
            "extreme values in `objective/scores`, `objective/kl` and `val/explained_variance`."
        )
        raise RollbackError(f"{what}, {self._in_a_row} steps in a row.", advice, step + 1 - self._in_a_row)

    def _warn(self, message: str) -> None:
        if self._is_main:
            logger.warning(message)

    def roll_back(self, error: RollbackError) -> str:
        """Return the checkpoint to go on from, with a lower learning rate. Every rank must make the call.

        Raises:
            DivergedError: If there is none, or the run has gone back too often.
        """
        args = self.args
        if not self._can_roll_back:
            raise DivergedError(
                f"{error.reason} Under DeepSpeed and FSDP, and with `save_only_model`, a run does not go back by "
                f"itself: resume it from a checkpoint before that, or start again. {error.advice}"
            )
        if self.rollbacks >= args.max_rollbacks:
            raise DivergedError(
                f"{error.reason} The run has gone back to a checkpoint {self.rollbacks} times, the most that "
                f"`max_rollbacks` allows, at last with {self.learning_rate_factor:g} of the learning rate. "
                f"{error.advice}"
            )
        # Found by one process, for all.
        found = self._last_good_checkpoint(error.latest) if self._is_main else None
        (found,) = broadcast_object_list([found])
        if found is None:
            raise DivergedError(
                f"{error.reason} This run has no checkpoint from before that to go back to: lower `save_steps` (a "
                f"rollout is {args.rollout_steps} steps), or raise `save_total_limit`. {error.advice}"
            )
        saved_at, checkpoint = found
        self.rollbacks += 1
        self.learning_rate_factor *= args.rollback_learning_rate_factor
        if self._is_main:
            self._abandon_after(saved_at, error.reason)
        self._saved_steps = {step for step in self._saved_steps if step <= saved_at}
        self._in_a_row, self.retries = 0, True
        self._clear_step()
        self._warn(
            f"{error.reason} Going back to {checkpoint} with {self.learning_rate_factor:g} of the learning rate "
            f"(rollback {self.rollbacks} of {args.max_rollbacks})."
        )
        return checkpoint

    def _abandon_after(self, saved_at: int, reason: str) -> None:
        """Mark what this run has written since: killed before its next checkpoint, it would be taken up from there."""
        here, own = _checkpoints_in(self.args.output_dir), self._saved_steps | {step for step, _ in self._earlier}
        later = [checkpoint for step, checkpoint in here if step > saved_at and step in own]
        for checkpoint in later:
            abandon(checkpoint, reason)
        if later:
            logger.warning(
                f"{', '.join(map(str, later))} stays for a look, until it is replaced or cleared by "
                "`save_total_limit`, and `resume_from_checkpoint: true` passes it over."
            )

    def _last_good_checkpoint(self, latest: int) -> tuple[int, str] | None:
        """Return step and path of the latest whole checkpoint of this run, up to a step."""
        # The directory may hold those of an earlier run.
        saved = [entry for entry in _checkpoints_in(self.args.output_dir) if entry[0] in self._saved_steps]
        for step, checkpoint in reversed(self._earlier + saved):
            if step <= latest and not is_abandoned(checkpoint) and find_defect(checkpoint) is None:
                return step, str(checkpoint)
        return None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remember which checkpoints are this run's."""
        self._saved_steps.add(state.global_step)

    def after_loading(self, optimizer: Any, scheduler: Any, checkpoint: Path, step: int) -> None:
        """Lower the learning rate of a checkpoint to that of this attempt.

        Args:
            optimizer: As it was saved; its groups keep their proportions.
            scheduler: Likewise.
            checkpoint: Where they come from.
            step: Of the checkpoint.
        """
        if not self.retries:
            siblings = _checkpoints_in(checkpoint.parent)
            is_numbered = (step, checkpoint) in siblings  # else it was copied from elsewhere
            self._earlier = [entry for entry in siblings if entry[0] <= step] if is_numbered else [(step, checkpoint)]
            return
        factor = self.learning_rate_factor / self._loaded_factor
        for group in optimizer.param_groups:
            group["lr"] *= factor
            if "initial_lr" in group:
                group["initial_lr"] *= factor
        for name in ("base_lrs", "_last_lr"):
            if hasattr(scheduler, name):
                setattr(scheduler, name, [rate * factor for rate in getattr(scheduler, name)])

    def metrics(self) -> dict[str, float]:
        """Return what the guard has done so far."""
        counts = {
            "skipped_steps": self.skipped_steps,
            "stopped_steps": self.stopped_steps,
            "rollbacks": self.rollbacks,
        }
        return {f"guard/{name}": float(count) for name, count in counts.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""
        names = ("skipped_steps", "stopped_steps", "rollbacks", "learning_rate_factor", "has_stopped")
        return {name: getattr(self, name) for name in names} | {"in_a_row": self._in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; in a run that goes back, counts and learning rate stay this run's."""
        self._loaded_factor, self.has_stopped = state["learning_rate_factor"], state["has_stopped"]
        if not self.retries:
            self._in_a_row = state["in_a_row"]
            for name in ("skipped_steps", "stopped_steps", "rollbacks", "learning_rate_factor"):
                setattr(self, name, state[name])


def _is_finite(grad_norm: Any) -> bool:
    return math.isfinite(grad_norm.item() if isinstance(grad_norm, Tensor) else grad_norm)


def _checkpoints_in(directory: str | Path) -> list[tuple[int, Path]]:
    return [(int(path.name.rpartition("-")[2]), path) for path in checkpoints_by_age(directory)]
