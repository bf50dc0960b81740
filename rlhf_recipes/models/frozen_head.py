"""Keep torch from copying the weights of a frozen LM head, once for each row of a batch."""

from typing import Any

from torch import Tensor, nn

from rlhf_recipes.models.critic import causal_lm


def keep_head_weights_uncopied(model: nn.Module) -> None:
    """Let the LM head of a causal LM take contiguous states, in place.

    The states of the last tokens of each row are a slice of all. For a slice and a weight without gradient, torch
    multiplies by row on a CPU, and copies the weights for each row before that. With LoRA, the first forward of each
    call of `generate` is such a one.
    """
    head: Any = causal_lm(model).get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(_contiguous)


def _contiguous(head: nn.Module, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in states)
