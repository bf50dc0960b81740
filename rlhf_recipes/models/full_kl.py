"""The KL between policy and reference over the whole vocabulary, from the last hidden states of both forwards."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_recipes.algorithm.distributed import global_max
from rlhf_recipes.algorithm.kl import full_kl
from rlhf_recipes.models.forward import CompletionForward

CHUNK_LOGITS = 2**24  # of each model at a time: 64 MB in float32
# Largest difference, in nats, between a sampled token's log-probability here and in the forward. The precision is that
# of the logits: under autocast, states may be in float32 and logits in bfloat16.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2}
TOLERANCE_OF_OTHERS = 0.25


@dataclass(frozen=True)
class Side:
    """A model whose forward over a rollout has kept its last hidden states.

    Args:
        forward: Forward that ran.
        head: Function from hidden states `(N, H)` to logits `(N, V)`.
    """

    forward: CompletionForward
    head: Callable[[Tensor], Tensor]


@torch.no_grad()
def chunked_kl(
    policy: Side, reference: Side, completion_ids: Tensor, mask: Tensor, *, vocabulary: int, temperature: float
) -> Tensor:
    """Return KL(policy || reference) of the next token at each token of the mask, nats, `(B, T)`; 0 elsewhere.

    The logits of a few tokens are there at a time, computed from the states: no forward runs again. Equal models have
    equal logits bit by bit, so their KL is exactly 0. Every rank must call this.

    Args:
        policy: Policy.
        reference: Reference.
        completion_ids: Token ids, `(B, T)`.
        mask: Completion tokens, `(B, T)`.
        vocabulary: Size of the vocabulary, V.
        temperature: Temperature of sampling.

    Raises:
        ValueError: If head and states do not give the log-probabilities of the forward: some architectures scale or
            cap their logits.
    """
    mask, sides = mask.bool(), (policy, reference)
    size = max(CHUNK_LOGITS // vocabulary, 1)
    chunks = [side.forward.last_states[mask].split(size) for side in sides]
    known = [side.forward.per_token_logps[mask].split(size) for side in sides]
    found, differences = [], [torch.zeros((), device=mask.device)]
    for number, ids in enumerate(completion_ids[mask].split(size)):
        logits = [side.head(states[number]) for side, states in zip(sides, chunks, strict=True)]
        both = [(x.float() / temperature).log_softmax(dim=-1) for x in logits]
        found.append(full_kl(*both))
        for log_probs, logps in zip(both, known, strict=True):
            of_sampled = log_probs.gather(1, ids.unsqueeze(1)).squeeze(1)
            differences.append((of_sampled - logps[number]).abs().max() if len(ids) else differences[0])
    largest = global_max(torch.stack(differences).max())  # so no rank goes on where another one raises
    _check(largest.item(), logits[0].dtype)
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, torch.cat(found))


def _check(difference: float, dtype: torch.dtype) -> None:
    if difference > TOLERANCE.get(dtype, TOLERANCE_OF_OTHERS):
        raise ValueError(
            f"`kl_estimator: full` does not fit this model: its LM head gives a sampled token a log-probability that "
            f"differs by {difference:.3g} nats from that of the forward, as in models that scale or cap their logits. "
            "Set `kl_estimator: k1`."
        )
