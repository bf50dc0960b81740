"""From scores to advantages: reward shaping, generalised advantage estimation, explained variance.

Pure torch, stateless. `mask` is `(B, T)`, 1 on the policy's own completion tokens. It may have holes (tool output),
which the recursions skip. Nothing here whitens: see `algorithm/masked.py`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_recipes.algorithm.masked import masked_mean, masked_var


def last_valid_index(mask: Tensor) -> Tensor:
    """Return the index of the last cell whose mask is 1, `(B,)`; 0 for a row without one."""
    positions = torch.arange(mask.size(1), device=mask.device)
    return (positions * mask.bool()).amax(dim=1)


def is_truncated(completion_ids: Tensor, mask: Tensor, eos_token_ids: list[int]) -> Tensor:
    """Return whether each completion lacks an EOS at its end, `(B,)`.

    Only the last token decides, never the padded width. A row with an empty mask was not truncated.

    Args:
        completion_ids: Token ids, `(B, T)`.
        mask: Completion tokens, `(B, T)`.
        eos_token_ids: Every token that ends a completion.
    """
    last = completion_ids.gather(1, last_valid_index(mask).unsqueeze(1)).squeeze(1)
    ends = torch.tensor(eos_token_ids, device=last.device)
    return ~torch.isin(last, ends) & mask.bool().any(dim=1)


def leave_one_out_means(scores: Tensor, group_size: int) -> Tensor:
    """Return for each completion the mean score of the other completions of its prompt.

    b_i = sum_{j != i} score_j / (G - 1)

    b_i does not depend on completion i. So `score_i - b_i` has the same expected policy gradient as `score_i`, with
    less variance, and the value of a critic may be subtracted too. A mean that includes score_i would shrink the
    gradient by (G - 1) / G.

    Args:
        scores: Scores, `(N,)`, the G completions of a prompt next to each other. NaN is left out of the means.
        group_size: Completions per prompt, G.

    Returns:
        `(N,)`; 0 where no other completion has a score.

    Source: Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!"; Ahmadian et al. 2024,
    arXiv:2402.14740, eq. 5.
    """
    groups = scores.view(-1, group_size)
    known, filled = groups.isfinite(), groups.nan_to_num(0.0)
    others = known.sum(dim=1, keepdim=True) - known.to(filled.dtype)
    total = filled.sum(dim=1, keepdim=True) - filled
    return (total / others.clamp(min=1)).flatten()


def shape_rewards(scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float, parts: Tensor | None = None) -> Tensor:
    """Return the per-token reward: a KL penalty everywhere, and the score on the last token.

    r_t = -kl_coef * kl_t + [t = last] * score

    With parts of the score that belong to single tokens, the last token has only the rest of the score:
    r_t = -kl_coef * kl_t + [t < last] * part_t + [t = last] * (score - sum_{s < last} part_s)

    The last token is the EOS itself if the policy produced one, never the padding after it. A row with an empty mask
    stays zero. The rewards of a row sum to the score minus the KL penalty, whatever the parts are. Parts of 0 before
    the last token change no bit.

    Args:
        scores: Normalised scores, one per completion, `(B,)`.
        kl: Per-token KL estimate, `(B, T)`, nats.
        mask: Valid completion tokens, `(B, T)`.
        kl_coef: Price of one nat, in score units.
        parts: Normalised rewards of tokens, `(B, T)`. Those of the last token are not read.

    Returns:
        `(B, T)`, zero where `mask` is 0.

    Source: Ziegler et al. 2019, arXiv:1909.08593, eq. 2, written per token.
    """
    mask = mask.bool()
    penalty = torch.where(mask, -kl_coef * kl, 0)
    positions = torch.arange(mask.size(1), device=mask.device)
    is_last = mask & (positions == last_valid_index(mask).unsqueeze(1))
    if parts is not None:
        earlier = torch.where(mask & ~is_last, parts, 0)
        penalty, scores = penalty + earlier, scores - earlier.sum(dim=1)
    return torch.where(is_last, penalty + scores.unsqueeze(1), penalty)


def generalized_advantage_estimation(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    lam: float,
    bootstrap_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return GAE(gamma, lam) advantages and the value targets that they imply.

    delta_t = r_t + gamma * V_{t+1} - V_t,   A_t = delta_t + gamma * lam * A_{t+1},   R_t = A_t + V_t

    V after the last valid token is 0: a completion is a finished episode. For a completion that was cut off,
    `bootstrap_values` may give another value. lam=0 is the one-step error. lam=1 is the return to go minus the value.

    Args:
        rewards: Per-token rewards, `(B, T)`, KL penalty included.
        values: Value of the state *before* each token, `(B, T)`. Not differentiated.
        mask: Valid completion tokens, `(B, T)`.
        gamma: Discount per token, in [0, 1].
        lam: Bias-variance trade-off, in [0, 1].
        bootstrap_values: Value of the state after the last valid token, `(B,)`; 0 for a completion that ended.

    Returns:
        `(advantages, returns)`, each `(B, T)`, zero where `mask` is 0. Not whitened.

    Raises:
        ValueError: If shapes differ, or `gamma` or `lam` is outside [0, 1].

    Source: Schulman et al. 2016, arXiv:1506.02438, eq. 16. Differs: optional bootstrap, holes in the mask.
    """
    if not rewards.shape == values.shape == mask.shape:
        raise ValueError(
            f"`rewards`, `values` and `mask` must have one shape, got {tuple(rewards.shape)}, {tuple(values.shape)} "
            f"and {tuple(mask.shape)}."
        )
    if bootstrap_values is not None and bootstrap_values.shape != rewards.shape[:1]:
        raise ValueError(
            f"`bootstrap_values` must have shape {tuple(rewards.shape[:1])}, got {tuple(bootstrap_values.shape)}."
        )
    for name, number in (("gamma", gamma), ("lam", lam)):
        if not 0.0 <= number <= 1.0:
            raise ValueError(f"`{name}` must lie in [0, 1], got {number}.")
    mask = mask.bool()
    rewards, values = torch.where(mask, rewards, 0), torch.where(mask, values, 0).detach()
    next_value = torch.zeros_like(values[:, 0]) if bootstrap_values is None else bootstrap_values.to(values.dtype)
    next_advantage = torch.zeros_like(next_value)
    advantages = torch.zeros_like(rewards)
    for t in reversed(range(rewards.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = torch.where(mask[:, t], delta + gamma * lam * next_advantage, 0)
        next_advantage = torch.where(mask[:, t], advantages[:, t], next_advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
    return advantages, advantages + values


def explained_variance(
    values: Tensor, returns: Tensor, mask: Tensor, *, variance: Callable[[Tensor, Tensor], Tensor] = masked_var
) -> Tensor:
    """Return `1 - Var(returns - values) / Var(returns)` over the mask: 1 is a perfect critic, 0 a useless one.

    The result is 0 for constant returns, because they leave nothing to explain.

    Args:
        values: Predicted values, `(B, T)`.
        returns: Targets, `(B, T)`.
        mask: Valid completion tokens, `(B, T)`.
        variance: Function of `(values, mask)` that returns a population variance, for example over all ranks.
    """
    total, residual = variance(returns, mask), variance(returns - values, mask)
    # The mean of equal numbers has a rounding error. The square of this error must not count as a variance.
    rounding = (4 * torch.finfo(total.dtype).eps * masked_mean(returns, mask)) ** 2
    return torch.where(total > rounding, 1 - residual / total, 0)


def quarters(mask: Tensor) -> list[Tensor]:
    """Return for each quarter of the completions the mask of its tokens, `(B, T)`.

    Token k of n, counted from 0 over the tokens of the mask, is in quarter `floor(4 k / n)`.

    Args:
        mask: Valid completion tokens, `(B, T)`.
    """
    valid = mask.bool()
    place = 4 * (valid.cumsum(dim=1) - 1) // valid.sum(dim=1, keepdim=True).clamp(min=1)
    return [valid & (place == quarter) for quarter in range(4)]
