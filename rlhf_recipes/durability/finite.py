"""Stop a training whose numbers are not finite, before it writes weights that cannot be used.

A mixin for TRL's trainers, of overrides of `transformers.Trainer`.
"""

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import Trainer

from rlhf_recipes.algorithm.distributed import global_max

MAX_OVERFLOWS = 20  # under fp16: the loss scale starts at 2**16, and each overflow halves it
# Words of refusals by PEFT and transformers, which do not name the option of a recipe.
OPTION_OF = {"arget modules": "lora_target_modules", "purely quantized": "load_in_4bit` without `use_peft"}
ADVICE = "and train in `bf16` or float32 rather than `fp16` or float16."


class DivergedError(ValueError):
    """A run that cannot continue by itself. The message says what to change."""


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether all numbers are finite, on all ranks. Every rank must make the call.

    Of a weight in shards, each rank looks at its own shard. This costs one reduction and one wait for the device.
    """
    flags = [own_part(tensor).isfinite().all() for tensor in tensors if tensor.is_floating_point()]
    device = PartialState().device  # DeepSpeed's processes reduce nothing on a CPU beside GPUs
    flags = [torch.ones((), dtype=torch.bool, device=device), *(flag.to(device) for flag in flags if not flag.is_meta)]
    return not global_max(torch.stack(flags).all().logical_not().int()).item()


def own_part(tensor: Any) -> Tensor:
    """Return the shard of this rank: of a parameter under ZeRO-3, or of FSDP2's. Return other tensors unchanged."""
    tensor = getattr(tensor, "ds_tensor", tensor).detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class FiniteTrainer(Trainer):
    """End a training whose loss, gradient or weights are not finite, with the name of the last good checkpoint."""

    args: Any
    _last_checkpoint: str | None = None  # written by this run, or the one that it resumes
    _overflows = 0  # steps in a row
    _finite_steps = 0
    _too_large = "`learning_rate`"  # options that may be

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._losses: list[Tensor] = []  # of this optimiser step
        try:
            super().__init__(*args, **kwargs)
        # TRL refuses options that contradict each other, and options whose package is not installed.
        except (ValueError, NotImplementedError, ImportError) as error:
            option = next((f" (`{name}`)" for words, name in OPTION_OF.items() if words in str(error)), "")
            raise ValueError(f"{error}{option}") from error

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
        if not all_finite(weight for weight in self.model.parameters() if weight.requires_grad):
            raise DivergedError(
                f"The weights are not finite after step {self.state.global_step}, so they are not saved. "
                f"{self._way_back()} {self._advice()}"
            )

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
