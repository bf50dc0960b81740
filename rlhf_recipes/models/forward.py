"""One forward for log-probabilities and values, without needless padding.

TRL pads every micro-batch to the longest prompt and the longest completion of the whole rollout. Without Triton it
also projects the prompt to the vocabulary. Here a forward gets no column that is padding in all of its rows, and only
the completion reaches the LM head and the value head. The results are the same.
"""

import functools
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import is_triton_available
from trl.trainer.utils import FusedCausalLMOutput

from rlhf_recipes.models.critic import VALUE_HEAD_NAME

ROUTER_LOGITS = "output_router_logits"
# Logits of one forward: 256 MB in float32. The own head holds 4 times as much with its gradient (with a vocabulary of
# 32,768), and TRL's tiles 8 times, as they compute everything twice.
KEPT_LOGITS = 2**26
# A forward without gradient holds the intermediate results of one layer, 15 H numbers per token. A micro-batch that
# trains holds 35 H of one layer, and H of each other layer even with gradient checkpointing.
ROWS_WITHOUT_GRADIENT = 4


@dataclass
class ActorCriticOutput(FusedCausalLMOutput):
    """Add to TRL's fused output the values of the states around each completion token, `(B, T + 1)`.

    `state_values[:, t]` is the value of the hidden state that precedes completion token `t`. The last column is the
    value of the final state.
    """

    state_values: Tensor | None = None
    last_states: Tensor | None = None
    """The last hidden state before each completion token, `(B, T, H)`, if it was asked for."""


def add_completion_forward(
    model: PreTrainedModel,
    *,
    temperature: float,
    cast_lm_head_to_fp32: bool = False,
    value_gradient_to_backbone: bool = False,
) -> None:
    """Let a causal LM take `completion_length=T`: its heads then see the last `T + 1` hidden states only.

    The model then returns the log-probabilities of the last T tokens, given as `shift_labels`. If it has a value head,
    it also returns their values, from the same forward of the backbone. With `backbone_only=True` it returns the
    backbone's output, through every wrapper of the model (DDP, FSDP). Every other call stays as it was, also
    generation. Call this after TRL has added its fused LM head. Where that head would compute small logits twice, the
    model's own head computes them once, see `keeps_logits`.

    Args:
        model: Causal LM on which TRL's `add_fused_lm_head` was called.
        temperature: Temperature of that head.
        cast_lm_head_to_fp32: Whether that head computes in float32. The own head of a policy would do so too, but the
            reference's would not, and their first KL would not be 0.
        value_gradient_to_backbone: Whether the value loss may train the backbone, or only the head.
    """
    fused_forward = model.forward

    @functools.wraps(type(model).forward)
    def forward(
        self: PreTrainedModel,
        *args: Any,
        completion_length: int | None = None,
        backbone_only: bool = False,
        with_entropy: bool = True,
        own_head: bool = True,
        keep_states: bool = False,
        **kwargs: Any,
    ) -> Any:
        if backbone_only:
            return self.base_model(*args, **kwargs)
        if completion_length is None:
            return fused_forward(*args, **{**sampling_inputs(self), **kwargs})
        states: list[Tensor] = []

        def keep_completion(module: nn.Module, inputs: Any, output: Any) -> Any:
            states.append(output.last_hidden_state[:, -completion_length - 1 :])
            # Without the copy torch multiplies frozen weights by another kernel than trained ones: a KL that is not 0.
            output.last_hidden_state = states[-1][:, :-1].contiguous()
            return output

        run = fused_forward
        if own_head and not cast_lm_head_to_fp32 and keeps_logits(self, kwargs["shift_labels"]):
            run = functools.partial(_own_head, fused_forward, temperature=temperature, with_entropy=with_entropy)
        hook = self.base_model.register_forward_hook(keep_completion)
        try:
            output = run(*args, **kwargs)
        finally:
            hook.remove()
        kept = {"last_states": states[-1][:, :-1]} if keep_states else {}
        head = getattr(self, VALUE_HEAD_NAME, None)
        if head is not None:
            kept["state_values"] = head(states[-1] if value_gradient_to_backbone else states[-1].detach())
        return ActorCriticOutput(**output, **kept) if kept else output

    model.forward = types.MethodType(forward, model)


def keeps_logits(model: PreTrainedModel, labels: Tensor) -> bool:
    """Return whether the model's own head is the faster one: without Triton, in float32, and for few logits.

    TRL's head computes the logits in tiles, and again for the gradient. In float32 both heads give the same numbers.
    """
    device = labels.device.type
    # OPT's own forward runs the decoder without the backbone around it, where the completion is cut out.
    if is_triton_available() and device in ("cuda", "xpu") or model.get_decoder() is not model.base_model:
        return False
    is_float32 = model.get_output_embeddings().weight.dtype == torch.float32 and not torch.is_autocast_enabled(device)
    return is_float32 and labels.numel() * model.config.get_text_config().vocab_size <= KEPT_LOGITS


def keep_out_of_autocast(head: Any) -> None:
    """Let a head that TRL has cast to float32 multiply in float32 while answers are sampled, too.

    TRL's fused head of the update switches autocast off. The forward of its float32 head does not.
    """
    forward = head.forward

    def outside_autocast(hidden_states: Tensor) -> Any:
        with torch.autocast(hidden_states.device.type, enabled=False):
            return forward(hidden_states)

    head.forward = outside_autocast


def _own_head(
    forward: Callable[..., Any],
    *args: Any,
    shift_labels: Tensor,
    temperature: float,
    with_entropy: bool,
    fused_lm_head: bool,
    **kwargs: Any,
) -> FusedCausalLMOutput:
    """Return the output of TRL's fused head from the logits of the model's own head, `(B, T)`."""
    output = forward(*args, use_cache=False, **kwargs)
    log_probs = (output.logits.float() / temperature).log_softmax(dim=-1)
    counts = shift_labels != -100
    of_labels = log_probs.gather(-1, shift_labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    entropy = -(log_probs.exp() * log_probs).sum(dim=-1) if with_entropy else None
    return FusedCausalLMOutput(
        log_probs=of_labels.masked_fill(~counts, 0),
        entropy=None if entropy is None else entropy.masked_fill(~counts, 0),
        aux_loss=getattr(output, "aux_loss", None),
    )


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
        columns: Number of prompt and completion columns that the rows need, if it is known: then no forward has to
            wait for the device to tell.
        own_head: Whether the model's own head may serve; see `keeps_logits`.

        keep_states: Whether to keep the last hidden states.

    A caller that runs a batch in parts sets `columns` before each part.
    """

    with_entropy: bool = True
    """Whether the model's own head computes entropies. TRL's head always does."""
    per_token_logps: Tensor
    """Log-probabilities, `(B, T)`, after `finish`."""
    state_values: Tensor
    """Values, `(B, T + 1)`, after `finish`, if the model has a value head."""
    last_states: Tensor
    """Last hidden state before each token, `(B, T, H)`, after `finish`, if they are kept."""

    def __init__(
        self,
        model: nn.Module,
        completion_length: int,
        *,
        pad_to_multiple_of: int | None,
        takes_positions: bool,
        columns: Sequence[int] | None = None,
        own_head: bool = True,
        keep_states: bool = False,
    ) -> None:
        self.own_head, self.keep_states = own_head, keep_states
        self.model, self.completion_length, self.columns = model, completion_length, columns
        self.pad_to_multiple_of, self.takes_positions = pad_to_multiple_of or 1, takes_positions
        self._values: list[Tensor] = []
        self._states: list[Tensor] = []

    def __call__(self, *, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **inputs: Any) -> Any:
        """Return TRL's output for the completion only, `(B, T)`."""
        width = input_ids.size(1)
        prompt_end = width - self.completion_length
        prompt, completion = self.columns or self.columns_of(attention_mask).amax(dim=0).tolist()
        start, end = prompt_end - prompt, prompt_end + completion
        trimmed = {
            name: x[:, start:end] if isinstance(x, Tensor) and x.shape[:2] == input_ids.shape else x
            for name, x in {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}.items()
        }
        if self.takes_positions:
            trimmed["position_ids"] = (trimmed["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        trimmed |= {"shift_labels": labels[:, prompt_end:end]}
        trimmed |= {"with_entropy": self.with_entropy, "own_head": self.own_head}
        if self.keep_states:
            trimmed["keep_states"] = True
        output = self.model(**trimmed, completion_length=end - prompt_end)
        if getattr(output, "state_values", None) is not None:
            self._values.append(_widen(output.state_values, width - end))
        if self.keep_states:
            self._states.append(nn.functional.pad(output.last_states, (0, 0, 0, width - end)))
        return FusedCausalLMOutput(
            log_probs=_widen(output.log_probs, width - end),
            entropy=None if output.entropy is None else _widen(output.entropy, width - end),
            aux_loss=output.aux_loss,
        )

    def finish(self, per_token_logps: Tensor, original: Any = slice(None)) -> Tensor:
        """Keep the results of all parts of a batch, and return the log-probabilities.

        Args:
            per_token_logps: Log-probabilities of all parts, `(B, T)`.
            original: Index that restores the order of the rows in the batch.
        """
        self.per_token_logps = per_token_logps[original]
        if self._values:
            self.state_values = torch.cat(self._values)[original]
        if self._states:
            self.last_states = torch.cat(self._states)[original]
        return self.per_token_logps

    def forget_states(self) -> None:
        """Free the memory of the hidden states."""
        self._states.clear()
        vars(self).pop("last_states", None)

    def columns_of(self, attention_mask: Tensor) -> Tensor:
        """Return how many columns each row needs of prompt and completion, `(B, 2)`, at least one of each."""
        prompt_end = attention_mask.size(1) - self.completion_length
        return needed_columns(attention_mask[:, :prompt_end], attention_mask[:, prompt_end:], self.pad_to_multiple_of)


def needed_columns(prompt_mask: Tensor, completion_mask: Tensor, multiple: int) -> Tensor:
    """Return how many columns a forward needs for each row's prompt and completion, `(B, 2)`, one if no token counts.

    Args:
        prompt_mask: 1 = token, `(B, P)`; the last column is the closest to the completion.
        completion_mask: 1 = token, `(B, T)`.
        multiple: Number that divides the result, unless there are too few columns.
    """
    counted = []
    for mask in (prompt_mask.flip(1), completion_mask):
        places = torch.arange(1, mask.size(1) + 1, device=mask.device)
        needed = nn.functional.pad(mask * places, (0, 1)).amax(dim=1).clamp(min=1)  # a mask may have no column
        counted.append((-(-needed // multiple) * multiple).clamp(max=mask.size(1)))
    return torch.stack(counted, dim=1)


def rows_without_gradient(micro_batch: int, device: torch.device) -> int:
    """Return how many rows a forward without gradient may have, beside a micro-batch that trains.

    Few rows leave a GPU idle. A CPU is as fast with few, and its caches are small.

    Args:
        micro_batch: Number of rows of a micro-batch.
        device: Device of the forward.
    """
    return micro_batch * (ROWS_WITHOUT_GRADIENT if device.type == "cuda" else 1)


def sampling_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """Return the inputs that let a model sample although its configuration asks for router logits.

    A mixture of experts compares them with the whole attention mask, and in `generate` they are those of one token.
    """
    asks = getattr(model.config.get_text_config(), ROUTER_LOGITS, False)
    return {ROUTER_LOGITS: False} if asks else {}


def _widen(x: Tensor, columns: int) -> Tensor:
    """Append columns of zeros."""
    return nn.functional.pad(x, (0, columns))
