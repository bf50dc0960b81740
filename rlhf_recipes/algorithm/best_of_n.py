"""Best of n: answer a prompt n times, and keep the answer with the highest score."""

import math

import torch
from torch import Tensor


def best_of_n_weights(scores: Tensor, n: int) -> Tensor:
    """Return the probability that each sample is the best one of n, drawn from its prompt's N without replacement.

    With ranks i = 1..N from the lowest score to the highest: `C(i - 1, n - 1) / C(N, n)`, because the other n - 1
    samples come from the i - 1 lower ones. Equal scores share their probabilities: the choice between them is random.
    The weighted sum of any figure of the samples is its mean over all subsets of size n. So it is an unbiased estimate
    of its mean under best of n, with less noise than one subset has.

    Args:
        scores: Scores that choose, `(P, N)` for P prompts. A missing score (NaN) ranks lowest.
        n: Samples per choice, in [1, N].

    Returns:
        Probabilities, `(P, N)`. Each row sums to 1.

    Source: Nakano et al. 2021, arXiv:2112.09332 (best-of-n estimator). Differs: handles equal scores.
    """
    count = scores.size(1)
    by_rank = torch.tensor(
        [math.comb(rank, n - 1) / math.comb(count, n) for rank in range(count)], dtype=torch.float64
    )
    known = scores.to(torch.float64).nan_to_num(nan=-math.inf)
    higher = known.unsqueeze(2) > known.unsqueeze(1)  # (P, N, N): sample i above sample j
    equal = known.unsqueeze(2) == known.unsqueeze(1)
    cumulated = torch.cat([torch.zeros(1, dtype=torch.float64), by_rank.cumsum(0)])
    below, ties = higher.sum(dim=2), equal.sum(dim=2)
    return (cumulated[below + ties] - cumulated[below]) / ties


def best_of_n_kl_bound(n: int) -> float:
    """Return the upper bound `log n - (n - 1) / n` of the KL of best of n to the policy that it samples from, nats.

    The bound is close if no two answers are equal.

    Source: Beirami et al. 2024, arXiv:2401.01879.
    """
    return math.log(n) - (n - 1) / n
