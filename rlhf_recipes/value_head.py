"""The critic: an MLP on the policy's own hidden states, carried by the policy as a submodule.

Layer L2. DDP, ZeRO, FSDP, PEFT's `modules_to_save` and checkpoints see one more submodule of the causal LM; generation
and weight synchronisation never call it. The policy's forward is TRL's; this adds one output field to it.
"""

import functools
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback
from trl.trainer.utils import FusedCausalLMOutput

from rlhf_recipes.advantages import last_valid_index

VALUE_HEAD_NAME = "value_head"
VALUE_HEAD_FILE = "value_head.safetensors"
ACTIVATIONS = {"silu": nn.SiLU, "gelu": nn.GELU}


class ValueHead(nn.Module):
    """Map hidden states to state values: Linear -> SiLU or GELU -> Linear, in float32.

    The output is unbounded and starts at exactly 0, so that the first advantages are those of the rewards alone.
    ReLU is refused: a head whose units have died cannot follow a reward whose sign changes.

    Args:
        hidden_size: Width of the hidden states, H.
        head_size: Width of the hidden layer; H when `None`.
        activation: `"silu"` or `"gelu"`.

    Raises:
        ValueError: If `activation` is neither.

    Source: zero-initialised output, Huang et al. 2023, "The N implementation details of RLHF with PPO".
    """

    def __init__(self, hidden_size: int, head_size: int | None = None, activation: str = "silu") -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"`value_head_activation` must be one of {', '.join(ACTIVATIONS)}, got {activation!r}.")
        head_size = head_size or hidden_size
        self.hidden = nn.Linear(hidden_size, head_size, dtype=torch.float32)
        self.activation = ACTIVATIONS[activation]()
        self.output = nn.Linear(head_size, 1, dtype=torch.float32)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return values `(B, L)` of hidden states `(B, L, H)`; float32 whatever the autocast."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            hidden_states = hidden_states.to(self.output.weight.dtype)
            return self.output(self.activation(self.hidden(hidden_states))).squeeze(-1)


@dataclass
class ActorCriticOutput(FusedCausalLMOutput):
    """TRL's fused output, and the value of the state after each input token, `(B, L)`.

    `state_values[:, i]` reads the hidden state at token `i`, which is the one that precedes token `i + 1`.
    """

    state_values: Tensor | None = None


def attach_value_head(model: PreTrainedModel, head: ValueHead) -> None:
    """Register `head` on a causal LM. Call it before an accelerator wraps the model."""
    head.to(model.device)
    setattr(model, VALUE_HEAD_NAME, head)


def add_state_values(model: PreTrainedModel, *, value_gradient_to_backbone: bool) -> None:
    """Make a causal LM with a value head return `ActorCriticOutput` when called with `fused_lm_head=True`.

    One forward of the backbone serves the log-probabilities and the values. Every other call, generation included, is
    left as it was. Call it after TRL has added its fused LM head.

    Args:
        model: Causal LM on which `attach_value_head` and TRL's `add_fused_lm_head` were called.
        value_gradient_to_backbone: Whether the value loss may train the backbone, or only the head.
    """
    fused_forward = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return fused_forward(*args, **kwargs)
        hidden_states: list[Tensor] = []
        hook = self.base_model.register_forward_hook(
            lambda module, inputs, output: hidden_states.append(output.last_hidden_state)
        )
        try:
            output = fused_forward(*args, fused_lm_head=True, **kwargs)
        finally:
            hook.remove()
        states = hidden_states[-1] if value_gradient_to_backbone else hidden_states[-1].detach()
        return ActorCriticOutput(**output, state_values=getattr(self, VALUE_HEAD_NAME)(states))

    model.forward = types.MethodType(forward, model)


class ValueRecorder:
    """Stand in for a model and keep the `state_values` of its calls, for a caller that drops them.

    TRL's log-probability method returns log-probabilities and entropies only. Recording outside the (wrapped) model
    leaves its outputs and its gradient hooks alone.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.state_values: list[Tensor] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model; keep the values if its output has any (the reference has none)."""
        output = self.model(*args, **kwargs)
        if isinstance(output, ActorCriticOutput) and output.state_values is not None:
            self.state_values.append(output.state_values)
        return output


def values_of_tokens(state_values: Tensor, length: int) -> Tensor:
    """Return the value of the state that precedes each completion token, `(B, T)`."""
    return state_values[:, -length - 1 : -1]


def values_after_completion(state_values: Tensor, completion_mask: Tensor) -> Tensor:
    """Return the value of the state that each completion ends in, `(B,)`."""
    completion_values = state_values[:, -completion_mask.size(1) :]
    return completion_values.gather(1, last_valid_index(completion_mask).unsqueeze(1)).squeeze(1)


@contextmanager
def without_value_head(model: nn.Module) -> Iterator[None]:
    """Take the head off a model (and out of its PEFT configuration) while a plain policy is saved."""
    owner = next((m for m in model.modules() if VALUE_HEAD_NAME in m._modules), None)
    configs = getattr(model, "peft_config", {}).values()
    saved_modules = [config.modules_to_save for config in configs]
    head = owner._modules.pop(VALUE_HEAD_NAME) if owner is not None else None
    for config in configs:
        kept = [name for name in config.modules_to_save or [] if name != VALUE_HEAD_NAME]
        config.modules_to_save = kept or None
    try:
        yield
    finally:
        for config, modules in zip(configs, saved_modules, strict=True):
            config.modules_to_save = modules
        if owner is not None:
            owner._modules[VALUE_HEAD_NAME] = head


def trained_value_head(model: nn.Module) -> ValueHead:
    """Return the head that learns: under PEFT, the adapter's copy and not the frozen original."""
    heads = (module for module in model.modules() if isinstance(module, ValueHead))
    return next(head for head in heads if all(parameter.requires_grad for parameter in head.parameters()))


def save_value_head(model: nn.Module, directory: str | Path) -> None:
    """Write the trained head beside a policy that was saved without it."""
    save_file(trained_value_head(model).state_dict(), Path(directory, VALUE_HEAD_FILE))


def load_value_head(head: ValueHead, directory: str | Path) -> bool:
    """Load the head that `save_value_head` wrote, if there is one. Return whether there was.

    A model that was not loaded from anywhere has the directory "", and no head.

    Raises:
        ValueError: If it has another size than the run's `value_head_size`.
    """
    path = Path(directory, VALUE_HEAD_FILE)
    if not directory or not path.is_file():
        return False
    state = load_file(path)
    if state["hidden.weight"].shape != head.hidden.weight.shape:
        raise ValueError(
            f"The value head in {directory} has shape {tuple(state['hidden.weight'].shape)}, this run's has "
            f"{tuple(head.hidden.weight.shape)}. Set `value_head_size` to {state['hidden.weight'].size(0)}."
        )
    head.load_state_dict(state)
    return True


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
