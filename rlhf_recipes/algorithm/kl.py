"""Per-token estimators of the KL divergence to the reference policy.

Pure torch, stateless. `estimate_kl` says which kind is right for which use.
"""

from typing import Literal

import torch
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]


def full_kl(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """Return KL(pi || ref) of the next token, by the sum over the vocabulary.

    KL = sum_v pi(v) (log pi(v) - log ref(v))

    A token that pi never chooses adds 0.

    Args:
        log_probs: Log-probabilities under pi, `(.., V)`, nats.
        ref_log_probs: Log-probabilities under the reference, `(.., V)`, nats.

    Returns:
        `(..)`, nats, at least 0 but for rounding.
    """
    probabilities = log_probs.exp()
    return torch.where(probabilities > 0, probabilities * (log_probs - ref_log_probs), 0).sum(dim=-1)


def estimate_kl(per_token_logps: Tensor, ref_per_token_logps: Tensor, kind: KLEstimator = "k1") -> Tensor:
    """Return a per-token estimate of KL(pi || ref) for tokens sampled from pi.

    With `d = log pi - log ref`:  k1 = d,  k2 = d^2 / 2,  k3 = exp(-d) - 1 + d.

    k1 is unbiased and signed. k3 is unbiased and non-negative. k2 is biased and non-negative. As a *reward*, k1 gives
    the gradient of the KL, while the gradient of k3 vanishes near the reference. Use k3 for monitoring.

    Args:
        per_token_logps: Log-probabilities under pi, `(B, T)`, nats.
        ref_per_token_logps: Log-probabilities of the same tokens under the reference, `(B, T)`, nats.
        kind: Estimator, `"k1"`, `"k2"` or `"k3"`.

    Returns:
        `(B, T)`, nats.

    Raises:
        ValueError: If `kind` is unknown.

    Source: Schulman 2020, "Approximating KL Divergence".
    """
    log_ratio = per_token_logps - ref_per_token_logps
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return log_ratio**2 / 2
    if kind == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    raise ValueError(f"`kl_estimator` must be one of 'k1', 'k2', 'k3', got {kind!r}.")


def own_token_term(full_kl: Tensor, k1: Tensor) -> Tensor:
    """Return what the advantage of each token needs beside rewards of `-full_kl`, per unit of the price, `(B, T)`.

    full_kl_t - k1_t

    A KL over the vocabulary is the same for every token that could have been sampled, so as a reward alone it pushes
    only tokens before it. The term has mean 0 in each state, and its policy gradient is the gradient of `-full_kl_t`.
    So the gradient of both is that of the KL of sequences.

    Args:
        full_kl: KL over the vocabulary in the state before each token, nats, `(B, T)`.
        k1: Log-ratio of the sampled token, nats, `(B, T)`.
    """
    return full_kl - k1
