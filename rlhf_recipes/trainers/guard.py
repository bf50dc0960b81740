"""Take or leave out an optimiser step, or ask for a rollback to a checkpoint.

Every decision follows from figures over all ranks, so that all ranks take the same one.
"""

import logging
import math
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from rlhf_recipes.models.critic import VALUE_HEAD_NAME
from rlhf_recipes.options.ppo import PPOConfig
from rlhf_recipes.trainers.rollback import Rollback, RollbackError

logger = logging.getLogger(__name__)


class TrainingGuard:
    """Leave out optimiser steps that would do harm, and ask for a rollback when that is not enough.

    A step is left out by dropping its gradients: weights and the optimiser's state stay as they are, bit for bit,
    while step and schedule go on. The state of the guard is plain numbers, and part of every checkpoint.

    Args:
        args: Options.
        is_main: Whether this process logs.
        deepspeed: Whether DeepSpeed trains: it steps inside of backward, so that no step can be left out.
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
        is_possible = not (deepspeed or fsdp or args.save_only_model)
        self.rollback = Rollback(args, is_main=is_main, is_possible=is_possible)
        self.skipped_steps = self.stopped_steps = 0
        self.has_stopped = False  # for the rest of this rollout
        self._in_a_row = 0
        self._clear_step()

    def _clear_step(self) -> None:
        self._tokens, self._kl, self._is_finite = 0.0, 0.0, True

    def begin_step(self, *, starts_rollout: bool) -> None:
        """Begin a micro-batch."""
        if starts_rollout:
            self.has_stopped = False
        self.rollback.begin_attempt()

    def observe_update(self, weight: float, metrics: dict[str, float]) -> None:
        """Add one micro-batch to the sums of the step.

        Args:
            weight: Number of its tokens, on all ranks.
            metrics: Sums over these tokens.
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
            RollbackError: If the KL is over `max_kl`.
        """
        if self.args.max_kl is not None and not kl <= self.args.max_kl:
            reason = f"Step {step}: the KL to the reference is {kl:.3g} nats, over `max_kl` ({self.args.max_kl:g})."
            advice = "Lower `learning_rate`, raise `kl_coef`, or set `max_update_kl`."
            raise RollbackError(reason, advice, step - 1)  # a checkpoint of this step holds the same policy

    def finish_step(self, model: nn.Module, grad_norm: Any, step: int) -> None:
        """Decide on an optimiser step after its backward pass.

        Args:
            model: Model that loses its gradients if the step is left out.
            grad_norm: Over all ranks.
            step: Optimiser steps before this one.

        Raises:
            RollbackError: If too many steps in a row had to be left out.
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
            if self._is_main:
                logger.warning(f"{what}: {fate} ({self._in_a_row} in a row, `max_skipped_steps` is {limit}).")
            return
        advice = (
            "Lower `learning_rate` or `max_grad_norm`, train in `bf16` or float32 rather than `fp16`, and look for "
            "extreme values in `objective/scores`, `objective/kl` and `val/explained_variance`."
        )
        raise RollbackError(f"{what}, {self._in_a_row} steps in a row.", advice, step + 1 - self._in_a_row)

    def roll_back(self, error: RollbackError) -> str:
        """Return the checkpoint to go on from, see `Rollback.to_checkpoint`; the next step starts from clean sums."""
        self._in_a_row = 0
        self._clear_step()
        return self.rollback.to_checkpoint(error)

    def metrics(self) -> dict[str, float]:
        """Return the counts of skipped and stopped steps and of rollbacks."""
        counts = {
            "skipped_steps": self.skipped_steps,
            "stopped_steps": self.stopped_steps,
            "rollbacks": self.rollback.count,
        }
        return {f"guard/{name}": float(count) for name, count in counts.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with that of the rollback."""
        names = ("skipped_steps", "stopped_steps", "has_stopped")
        return {name: getattr(self, name) for name in names} | {
            "in_a_row": self._in_a_row,
            **self.rollback.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; a run that goes back keeps its own counts."""
        self.has_stopped = state["has_stopped"]
        if not self.rollback.is_pending:
            self._in_a_row = state["in_a_row"]
            self.skipped_steps, self.stopped_steps = state["skipped_steps"], state["stopped_steps"]
        self.rollback.load_state_dict(state)


def _is_finite(grad_norm: Any) -> bool:
    return math.isfinite(grad_norm.item() if isinstance(grad_norm, Tensor) else grad_norm)


class CriticWarmupCallback(TrainerCallback):
    """Drop every gradient but the value head's for the first optimiser steps.

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
