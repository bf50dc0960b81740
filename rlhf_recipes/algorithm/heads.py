"""One score from the scores of several heads, and how far the heads disagree."""

import math
from typing import Literal

import torch
from torch import Tensor

HeadRule = Literal["mean", "pessimistic", "soft_min"]


def combine_heads(scores: Tensor, rule: HeadRule = "mean", coef: float = 1.0) -> Tensor:
    r"""Return one score per row: the mean of the heads, or less where they disagree.

    mean:         1/K sum_k r_k
    pessimistic:  mean - coef sd, with the standard deviation of the sample
    soft_min:     -coef log(1/K sum_k exp(-r_k / coef)): the mean for a large `coef`, the minimum for a small one.
                  For normal scores it is about mean - sd^2 / (2 coef).

    With one head, all three are its score.

    Args:
        scores: `(..., K)`.
        rule: Name of a formula above.
        coef: Its coefficient; for `soft_min` positive, in units of the score.

    Source: Coste et al. 2024, arXiv:2310.02743, section 3.3. Differs: `pessimistic` subtracts the deviation, not the
    variance, so `coef` has no unit; `soft_min` is new.
    """
    if rule == "pessimistic":
        return scores.mean(dim=-1) - coef * disagreement(scores)
    if rule == "soft_min":
        return -coef * (torch.logsumexp(-scores / coef, dim=-1) - math.log(scores.size(-1)))
    return scores.mean(dim=-1)


def disagreement(scores: Tensor) -> Tensor:
    """Return the standard deviation of the sample over the heads, 0 with one head.

    Args:
        scores: `(..., K)`.
    """
    return scores.std(dim=-1, correction=1) if scores.size(-1) > 1 else torch.zeros_like(scores[..., 0])


def centred(scores: Tensor, head_means: Tensor) -> Tensor:
    """Return scores whose heads have a common origin, with the same mean over the heads.

    Preferences say nothing about a constant that is added to all scores of a head, so its difference between two heads
    is no disagreement.

    Args:
        scores: `(..., K)`.
        head_means: Mean score of each head on the same texts, `(K,)`.
    """
    return scores - (head_means - head_means.mean())
