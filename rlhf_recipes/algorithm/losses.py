"""The losses that TRL does not have: the clipped value loss, the averaging of token losses, and the trust region.

Pure torch, stateless. TRL computes the clipped surrogate of the policy. Only the tests repeat its definition.
"""

import math

import torch
from torch import Tensor

from rlhf_recipes.algorithm.masked import masked_mean, masked_sum

MEANS_OVER_ROWS = ("grpo", "dr_grpo")  # kinds of average that divide by the number of rows


def per_token_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, cliprange: float) -> Tensor:
    """Return the clipped squared error of the critic for each element.

    0.5 * max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2)

    Because of the maximum, the critic gains nothing by a move of more than `cliprange` from the rollout's value.

    Args:
        values: Current values of any shape, the only argument that gets a gradient.
        old_values: Values at rollout time, of the same shape.
        returns: Targets of the same shape.
        cliprange: Half width of the clip, c above, in units of the return.

    Source: Schulman et al. 2017 reference code; Huang et al. 2022, "The 37 implementation details of PPO", detail 9.
    """
    old_values, returns = old_values.detach(), returns.detach()
    clipped = old_values + (values - old_values).clamp(-cliprange, cliprange)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def aggregate_token_loss(
    per_token_loss: Tensor,
    mask: Tensor,
    *,
    loss_type: str = "grpo",
    num_items: Tensor | float | None = None,
    max_completion_length: int | None = None,
) -> Tensor:
    """Average a token loss as TRL averages the policy loss of the same `loss_type`.

    grpo: mean over a sequence's tokens, then over sequences.  dapo: sum over tokens / `num_items`.
    dr_grpo: sum over tokens / (B * `max_completion_length`).
    None of the three depends on how a batch of whole sequences is cut into equal micro-batches. In micro-batches of
    different size those of `MEANS_OVER_ROWS` need a weight: their number of rows over its mean.

    Args:
        per_token_loss: Loss of each token, `(B, T)`.
        mask: Valid completion tokens, `(B, T)`. A row without one counts as 0.
        loss_type: Kind of average, `"grpo"`, `"dapo"` or `"dr_grpo"`.
        num_items: Number of tokens to divide by, for `"dapo"`.
        max_completion_length: Number of tokens per sequence to divide by, for `"dr_grpo"`.

    Raises:
        ValueError: If `loss_type` is unknown, or its denominator is missing.

    Source: DeepSeekMath, arXiv:2402.03300, eq. 1 (grpo); arXiv:2503.14476, eq. 8 (dapo); arXiv:2503.20783 (dr_grpo).
    """
    if loss_type == "grpo":
        return masked_mean(per_token_loss, mask, dim=1).mean()
    total = masked_sum(per_token_loss, mask)
    if loss_type == "dapo" and num_items is not None:
        return total / torch.as_tensor(num_items, device=total.device).clamp(min=1)
    if loss_type == "dr_grpo" and max_completion_length is not None:
        return total / (per_token_loss.size(0) * max_completion_length)
    raise ValueError(
        f"`loss_type` must be 'grpo', 'dapo' (with `num_items`) or 'dr_grpo' (with `max_completion_length`), got "
        f"{loss_type!r}."
    )


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, cliprange: float
) -> Tensor:
    """Return the clipped value loss, averaged over each sequence's tokens and then over sequences.

    Args:
        values: Current values, `(B, T)`, the only argument that gets a gradient.
        old_values: Values at rollout time, `(B, T)`.
        returns: Targets, `(B, T)`.
        mask: Valid completion tokens, `(B, T)`.
        cliprange: Half width of the clip, in units of the return.

    Returns:
        A scalar.
    """
    # The fill comes before the squares. Otherwise a NaN in the padding would reach the gradient through them.
    values, old_values, returns = (torch.where(mask.bool(), x, 0) for x in (values, old_values, returns))
    return aggregate_token_loss(per_token_value_loss(values, old_values, returns, cliprange=cliprange), mask)


def trust_region_mask(
    log_ratio: Tensor, advantages: Tensor, mask: Tensor, *, level: str, epsilon_low: float, epsilon_high: float
) -> Tensor:
    """Return 1 for each token whose policy loss may train, and 0 for one that the trust region stops, `(B, T)`.

    token: c_t = log_ratio_t.  sequence: c_t = sum_u log_ratio_u, over the whole completion.
    prefix: c_t = sum_{u <= t} log_ratio_u.
    Stopped where A_t > 0 and exp(c_t) > 1 + epsilon_high, or A_t < 0 and exp(c_t) < 1 - epsilon_low.

    With PPO's surrogate l_t(theta), the masked loss is L(theta) = -sum_t mask_t(theta) * l_t(theta). Inside the region
    its gradient is PPO's. Outside, a token trains only if its advantage leads back. L jumps at the border, and its
    gradient has no term for the jump: L is a local objective, like that of a line search, and has no global one.

    PPO's clip sees the ratio of each token alone, and many small moves of one sign pass it: over T tokens the ratio of
    the completion can reach (1 + epsilon)^T. RLOO's clip is the sequence level with one advantage per completion,
    except that it weighs the gradient by the completion's ratio, and this by the token's. GSPO takes the T-th root of
    the completion's ratio, so its region widens with the length. The prefix level uses the weight that importance
    sampling gives to a state and the token sampled in it: early tokens stay free where only later ones have moved.

    Args:
        log_ratio: Log-probability of the current policy minus that of the policy that sampled, `(B, T)`.
        advantages: Advantages, `(B, T)`; only the sign counts.
        mask: Valid completion tokens, `(B, T)`.
        level: `"token"`, where the mask is that of PPO's clip, `"sequence"` or `"prefix"`.
        epsilon_low: Distance of the lower border from a ratio of 1; from 1 on there is no lower border.
        epsilon_high: Distance of the upper border from a ratio of 1, > 0.

    Source: Ahmadian et al. 2024, arXiv:2402.14740 (RLOO); Zheng et al. 2025, arXiv:2507.18071, eq. 7 (GSPO). Differs:
    an advantage per token, and no division of the exponent by the length.
    """
    moved = torch.where(mask.bool(), log_ratio.detach(), 0)
    totals = {"token": moved, "prefix": moved.cumsum(dim=1), "sequence": moved.sum(dim=1, keepdim=True)}
    too_likely = totals[level] > math.log1p(epsilon_high)
    too_unlikely = totals[level] < (math.log1p(-epsilon_low) if epsilon_low < 1 else -math.inf)
    return (~((advantages > 0) & too_likely | (advantages < 0) & too_unlikely)).to(log_ratio.dtype)


def is_value_clipped(values: Tensor, old_values: Tensor, *, cliprange: float) -> Tensor:
    """Return, for each element, 1 if the value moved further than `cliprange` since the rollout, else 0."""
    return ((values - old_values).abs() > cliprange).to(values.dtype)


def l2_penalty(scores: Tensor) -> Tensor:
    """Return the mean squared score. Together with weight decay it keeps an unnormalised reward model bounded."""
    return (scores**2).mean()
