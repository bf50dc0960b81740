"""Stop a training whose numbers are not finite, before it writes weights that cannot be used.

A mixin for TRL's trainers, of overrides of `transformers.Trainer`.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from transformers import Trainer, TrainerCallback

from rlhf_recipes.algorithm.distributed import global_max
from rlhf_recipes.options.refusals import is_refusal, with_option

MAX_OVERFLOWS = 20  # under fp16: the loss scale starts at 2**16, and each overflow halves it
STEP_ADVICE = "Look at `adam_epsilon`, which must be above 0, and at `weight_decay` and `max_grad_norm`."
ADVICE = "and train in `bf16` or float32 rather than `fp16` or float16."


class DivergedError(ValueError):
    """A run that cannot continue by itself. The message says what to change."""


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether all numbers are finite, on all ranks. Every rank must make the call.

    This costs one reduction and one wait for the device.
    """
    return not global_max(not_finite(tensors)).item()


def not_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Return 1 if a number on this rank is not finite, else 0, on the device.

    Of a weight in shards, each rank looks at its own shard. This reads each number once.
    """
    own = [own_part(tensor) for tensor in tensors if tensor.is_floating_point()]
    # Numbers of one byte are those of a frozen, quantised base. torch has no norm of them.
    own = [tensor for tensor in own if tensor.element_size() > 1 and not tensor.is_meta and tensor.numel()]
    # With ZeRO's offload, weights are on the CPU. There, the extremes cost a twentieth of a norm.
    here = [tensor for tensor in own if tensor.device.type == "cpu"]
    is_finite = all(extreme.isfinite().item() for tensor in here for extreme in torch.aminmax(tensor))
    # The largest number does not overflow, as a sum would. DeepSpeed's processes reduce nothing on a CPU beside GPUs.
    largest = get_total_norm([tensor for tensor in own if tensor.device.type != "cpu"], norm_type=math.inf)
    return (largest.to(PartialState().device).isfinite() & is_finite).logical_not().int()


def own_part(tensor: Any) -> Tensor:
    """Return the shard of this rank: of a parameter under ZeRO-3, or of FSDP2's. Return other tensors unchanged."""
    tensor = getattr(tensor, "ds_tensor", tensor).detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class AfterStep(TrainerCallback):
    """Call a check after each optimiser step, before anything samples, evaluates or saves."""

    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Call the check."""
        self._check()


class FiniteTrainer(Trainer):
    """End a training whose loss, gradient or weights are not finite, with the name of the last good checkpoint."""

    args: Any
    _last_checkpoint: str | None = None  # written by this run, or the one that it resumes
    _overflows = 0  # steps in a row
    _finite_steps = 0
    _too_large = "`learning_rate`"  # options whose value may be too large

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._losses: list[Tensor] = []  # of this optimiser step
        try:
            super().__init__(*args, **kwargs)
        # TRL refuses options that contradict each other, and options whose package is not installed.
        except (ValueError, NotImplementedError, ImportError) as error:
            if not is_refusal(error):
                raise
            raise ValueError(with_option(error)) from error
        self.callback_handler.callbacks.insert(0, AfterStep(self.check_step))  # the others use what it finds

    def check_start(self) -> None:
        """Check the weights that training starts from.

        Raises:
            DivergedError: If one is not finite.
        """
        if all_finite(self.model.parameters()):
            return
        names = (name for name, weight in self.model.named_parameters() if not all_finite([weight]))
        raise DivergedError(
            f"The weight {next(names)!r} is not finite before the first step. Load another model, or use another "
            "`dtype`."
        )

    def check_trained(self) -> None:
        """Check the trained weights before they are written.

        Raises:
            DivergedError: If one is not finite.
        """
        if not all_finite(self._trained_weights()):
            raise DivergedError(
                f"The weights are not finite after step {self.state.global_step}, so they are not saved. "
                f"{self._way_back()} {self._advice()}"
            )

    def check_step(self) -> None:
        """Check the weights that an optimiser step has made. Its loss and its gradient may have been finite.

        Raises:
            DivergedError: If one is not finite.
        """
        step = self.state.global_step
        if self._on_any_rank(not_finite(self._trained_weights())):
            reason = f"Step {step} made weights that are not finite, from a finite loss and a finite gradient."
            raise self.diverged(reason, f"{self._advice()} {STEP_ADVICE}", step - 1)

    def check_moments(self) -> None:
        """Check the state of the optimiser before it is written into a checkpoint.

        Raises:
            DivergedError: If a number of it is not finite: from then on, its weights do not move.
        """
        states = getattr(self.optimizer, "state", {}).values()
        if not all_finite(x for state in states for x in state.values() if isinstance(x, Tensor)):
            step = self.state.global_step
            reason = f"Step {step}: the state of the optimizer is not finite, so no checkpoint is written."
            raise self.diverged(reason, f"{self._advice()} {STEP_ADVICE}", step - 1)

    def diverged(self, reason: str, advice: str, latest: int) -> Exception:
        """Return the error that ends a training.

        Args:
            reason: Sentence that says what happened.
            advice: Sentences that say what to change.
            latest: Last optimiser step whose checkpoint is good.
        """
        return DivergedError(f"{reason} {self._way_back()} {advice}")

    def _on_any_rank(self, flag: Tensor) -> bool:
        return bool(global_max(flag).item())

    def _trained_weights(self) -> Iterator[Tensor]:
        return (weight for weight in self.model.parameters() if weight.requires_grad)

    def _advice(self) -> str:
        return f"Lower {self._too_large}, {ADVICE}"

    def _way_back(self) -> str:
        if self._last_checkpoint is None:
            return "There is no checkpoint from before."
        return f"The last good checkpoint is {self._last_checkpoint}."

    def check_any_step(self) -> None:
        """Check that some step has changed the weights.

        Raises:
            DivergedError: If fp16 has left out every step.
        """
        if self._overflows and not self._finite_steps:
            raise DivergedError(f"All {self._overflows} steps overflowed, so nothing was trained. {self._advice()}")

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Train on a micro-batch, and keep its loss."""
        loss = super().training_step(*args, **kwargs)
        self._losses.append(loss.detach())
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        try:
            self.finish_step(model, grad_norm)
        finally:
            self._losses.clear()
        return grad_norm

    def finish_step(self, model: nn.Module, grad_norm: Any) -> None:
        """Look at an optimiser step after its backward pass.

        Args:
            model: Model with the gradients.
            grad_norm: Over all ranks; `None` if DeepSpeed does not know it yet.

        Raises:
            DivergedError: If the loss or the gradient is not finite. Under fp16, only if it stays so.
        """
        if hasattr(grad_norm, "full_tensor"):  # of FSDP2
            grad_norm = grad_norm.full_tensor()
        norms = [] if grad_norm is None else [torch.as_tensor(grad_norm, dtype=torch.float32)]
        if all_finite([*self._losses, *norms]):
            self._overflows, self._finite_steps = 0, self._finite_steps + 1
            return
        self._overflows += 1
        if not self.args.fp16 or self._overflows >= MAX_OVERFLOWS:
            in_a_row = f", {self._overflows} steps in a row" if self._overflows > 1 else ""
            raise DivergedError(
                f"Step {self.state.global_step + 1}: the loss or its gradient is not finite{in_a_row}. "
                f"{self._way_back()} {self._advice()}"
            )
