"""One forward for log-probabilities and values, without needless padding.

TRL pads every micro-batch to the longest prompt and the longest completion of the whole rollout. Without Triton it
also projects the prompt to the vocabulary. Here a forward gets no column that is padding in all of its rows, and only
the completion reaches the LM head and the value head. The results are the same.
"""

import functools
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from rlhf_recipes.models.critic import VALUE_HEAD_NAME

ROUTER_LOGITS = "output_router_logits"


@dataclass
class ActorCriticOutput(FusedCausalLMOutput):
    """Add to TRL's fused output the values of the states around each completion token, `(B, T + 1)`.

    `state_values[:, t]` is the value of the hidden state that precedes completion token `t`. The last column is the
    value of the final state.
    """

    state_values: Tensor | None = None


def add_completion_forward(model: PreTrainedModel, *, value_gradient_to_backbone: bool = False) -> None:
    """Let a causal LM take `completion_length=T`: its heads then see the last `T + 1` hidden states only.

    The model then returns the log-probabilities of the last T tokens, given as `shift_labels`. If it has a value head,
    it also returns their values, from the same forward of the backbone. With `backbone_only=True` it returns the
    backbone's output, through every wrapper of the model (DDP, FSDP). Every other call stays as it was, also
    generation. Call this after TRL has added its fused LM head.

    Args:
        model: Causal LM on which TRL's `add_fused_lm_head` was called.
        value_gradient_to_backbone: Whether the value loss may train the backbone, or only the head.
    """
    fused_forward = model.forward

    @functools.wraps(type(model).forward)
    def forward(
        self: PreTrainedModel,
        *args: Any,
        completion_length: int | None = None,
        backbone_only: bool = False,
        **kwargs: Any,
    ) -> Any:
        if backbone_only:
            return self.base_model(*args, **kwargs)
        if completion_length is None:
            return fused_forward(*args, **{**sampling_inputs(self), **kwargs})
        states: list[Tensor] = []

        def keep_completion(module: nn.Module, inputs: Any, output: Any) -> Any:
            states.append(output.last_hidden_state[:, -completion_length - 1 :])
            output.last_hidden_state = states[-1][:, :-1]
            return output

        hook = self.base_model.register_forward_hook(keep_completion)
        try:
            output = fused_forward(*args, **kwargs)
        finally:
            hook.remove()
        head = getattr(self, VALUE_HEAD_NAME, None)
        if head is None:
            return output
        return ActorCriticOutput(
            **output, state_values=head(states[-1] if value_gradient_to_backbone else states[-1].detach())
        )

    model.forward = types.MethodType(forward, model)


class CompletionForward:
    """Replace a model inside TRL's log-probability method, to trim its input and keep the values of its forward.

    TRL's method returns log-probabilities and entropies only. The values are recorded outside the (wrapped) model, so
    that its outputs and its gradient hooks stay as they are.

    Args:
        model: Causal LM, wrapped or not, on which `add_completion_forward` was called.
        completion_length: Number of completion columns at the end of the input, T.
        pad_to_multiple_of: Number that divides the kept prompt columns and the kept completion columns, if possible.
        takes_positions: Whether the model gets the position of each token, as in `generate`. Without positions, a
            model with absolute positions would number a row differently in each batch. A model for images counts by
            itself.
    """

    per_token_logps: Tensor
    """Log-probabilities, `(B, T)`, after `finish`."""
    state_values: Tensor
    """Values, `(B, T + 1)`, after `finish`, if the model has a value head."""

    def __init__(
        self, model: nn.Module, completion_length: int, *, pad_to_multiple_of: int | None, takes_positions: bool
    ) -> None:
        self.model, self.completion_length = model, completion_length
        self.pad_to_multiple_of, self.takes_positions = pad_to_multiple_of or 1, takes_positions
        self._values: list[Tensor] = []

    def __call__(self, *, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **inputs: Any) -> Any:
        """Return TRL's output for the completion only, `(B, T)`."""
        start, end = self._columns(attention_mask)
        width = input_ids.size(1)
        prompt_end = width - self.completion_length
        trimmed = {
            name: x[:, start:end] if isinstance(x, Tensor) and x.shape[:2] == input_ids.shape else x
            for name, x in {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}.items()
        }
        if self.takes_positions:
            trimmed["position_ids"] = (trimmed["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        output = self.model(**trimmed, shift_labels=labels[:, prompt_end:end], completion_length=end - prompt_end)
        if getattr(output, "state_values", None) is not None:
            self._values.append(_widen(output.state_values, width - end))
        return FusedCausalLMOutput(
            log_probs=_widen(output.log_probs, width - end),
            entropy=None if output.entropy is None else _widen(output.entropy, width - end),
            aux_loss=output.aux_loss,
        )

    def finish(self, per_token_logps: Tensor, original: Any) -> Tensor:
        """Keep the results of all chunks, and return the log-probabilities.

        Args:
            per_token_logps: Log-probabilities of all chunks, `(B, T)`.
            original: Index that restores the order of the rows in the batch.
        """
        self.per_token_logps = per_token_logps[original]
        if self._values:
            self.state_values = torch.cat(self._values)[original]
        return self.per_token_logps

    def _columns(self, attention_mask: Tensor) -> tuple[int, int]:
        """Return the range of columns with a token, with at least one of the prompt and one of the completion."""
        width = attention_mask.size(1)
        prompt_end = width - self.completion_length
        used = attention_mask.any(dim=0).int()
        first, last = torch.stack([used.argmax(), width - used.flip(0).argmax()]).tolist()  # one wait for the device
        prompt, completion = (self._rounded(max(n, 1)) for n in (prompt_end - first, last - prompt_end))
        return max(prompt_end - prompt, 0), min(prompt_end + completion, width)

    def _rounded(self, columns: int) -> int:
        return -(-columns // self.pad_to_multiple_of) * self.pad_to_multiple_of


def sampling_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """Return the inputs that let a model sample although its configuration asks for router logits.

    A mixture of experts compares them with the whole attention mask, and in `generate` they are those of one token.
    """
    asks = getattr(model.config.get_text_config(), ROUTER_LOGITS, False)
    return {ROUTER_LOGITS: False} if asks else {}


def rows_by_length(attention_mask: Tensor | None) -> tuple[Any, Any]:
    """Return an index that sorts rows by length, so that chunks need little padding, and the index that undoes it.

    Without a mask both indices leave the order as it is.
    """
    if attention_mask is None:
        return slice(None), slice(None)
    order = attention_mask.sum(dim=1).argsort()
    return order, order.argsort()


def _widen(x: Tensor, columns: int) -> Tensor:
    """Append columns of zeros."""
    return nn.functional.pad(x, (0, columns))
