"""Run a causal LM as plain transformers would: the forward of its class, one row at a time, without padding."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rlhf_recipes.models.critic import causal_lm


@contextmanager
def _forward_of_class(model: Any) -> Iterator[None]:
    """Hide the forwards that TRL, accelerate and this package have put in front of a model's own."""
    added = vars(model).pop("forward", None)
    try:
        yield
    finally:
        if added is not None:
            model.forward = added


@torch.no_grad()
def plain_logits(model: Any, row: list[int]) -> Tensor:
    """Return the logits of a row, `(t, V)` in float32, by the network's own forward in evaluation mode.

    Args:
        model: Causal LM, with an adapter or without.
        row: Token ids.
    """
    network, was_training = causal_lm(model), model.training
    model.eval()
    try:
        with _forward_of_class(network):
            ids = torch.tensor([row], device=network.device)
            logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
            return logits.float()
    finally:
        model.train(was_training)


def plain_logps(model: Any, prompt: list[int], completion: list[int], temperature: float) -> Tensor:
    """Return the log-probabilities of the tokens of a completion, `(T,)` on the CPU."""
    logits = plain_logits(model, prompt + completion)[len(prompt) - 1 : -1] / temperature
    tokens = torch.tensor(completion, device=logits.device)
    return logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0].cpu()
