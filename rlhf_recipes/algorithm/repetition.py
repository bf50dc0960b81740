"""The share of a completion that repeats itself."""

import torch
from torch import Tensor


def repeated_ngrams(completion_ids: Tensor, mask: Tensor, n: int = 4) -> Tensor:
    """Return the share of each completion's n-grams that occurred in it before, `(B,)`, or 0 without n-grams.

    Args:
        completion_ids: Token ids, `(B, T)`.
        mask: Completion tokens, `(B, T)`.
        n: Number of tokens in an n-gram.
    """
    if completion_ids.size(1) < n:
        return torch.zeros(completion_ids.size(0), device=completion_ids.device)
    ngrams, whole = completion_ids.unfold(1, n, 1), mask.bool().unfold(1, n, 1).all(dim=-1)
    hashes = torch.zeros_like(ngrams[..., 0])
    for token in ngrams.unbind(dim=-1):
        hashes = (hashes * 1_000_003 + token) & (2**62 - 1)  # it wraps around: two n-grams collide once in 4e18
    alone = -1 - torch.arange(hashes.size(1), device=hashes.device)
    hashes = torch.where(whole, hashes, alone).sort(dim=1).values
    repeats = (hashes[:, 1:] == hashes[:, :-1]).sum(dim=1)
    return repeats / whole.sum(dim=1).clamp(min=1)
