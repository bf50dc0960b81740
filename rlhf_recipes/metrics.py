"""The figures that PPO logs about a rollout and about an update, over all ranks.

Layer L2. Every rank must make each call. The glossary is in `recipes/README.md`.
"""

import math

from torch import Tensor

from rlhf_recipes.advantages import explained_variance
from rlhf_recipes.configs import PPOConfig
from rlhf_recipes.distributed import global_means, global_var
from rlhf_recipes.kl import estimate_kl
from rlhf_recipes.losses import is_value_clipped


def episodes(step: int, args: PPOConfig) -> int:
    """Return how many completions all ranks have sampled when optimiser step `step` ends: those of whole rollouts."""
    return math.ceil(step / args.rollout_steps) * args.generation_batch_size


def rollout_metrics(
    batch: dict[str, Tensor], mask: Tensor, *, scores: Tensor, rewards: Tensor, kl: Tensor, kl_coef: float
) -> tuple[int, dict[str, float]]:
    """Return the number of completions that train, and what was sampled.

    Args:
        batch: With `old_per_token_logps`, `ref_per_token_logps`, `old_values` and `returns`, `(B, T)`.
        mask: `(B, T)`, 1 = trains.
        scores: Raw scores of all ranks.
        rewards: Shaped rewards, `(B, T)`.
        kl: What the reward was charged for, `(B, T)`.
        kl_coef: Its price.
    """
    k1 = estimate_kl(batch["old_per_token_logps"], batch["ref_per_token_logps"], "k1")
    sums = ((x.masked_fill(mask == 0, 0)).sum(dim=1) for x in (k1, kl, rewards))
    count, (mean_k1, paid, rlhf_reward) = global_means(mask.any(dim=1), *sums)
    explained = explained_variance(batch["old_values"], batch["returns"], mask, variance=global_var)
    return int(count), {
        "objective/kl": mean_k1,
        "objective/scores": scores[scores.isfinite()].mean().item(),
        "objective/rlhf_reward": rlhf_reward,
        "objective/non_score_reward": -kl_coef * paid,
        "objective/excluded": 1 - count / scores.numel(),
        "val/explained_variance": explained.item(),
        "kl_coef": kl_coef,
    }


def update_metrics(
    per_token_logps: Tensor,
    batch: dict[str, Tensor],
    values: Tensor,
    value_loss: Tensor,
    mask: Tensor,
    *,
    cliprange: float,
    micro_batches: int,
) -> dict[str, float]:
    """Return how far one micro-batch has moved from its rollout.

    Each figure is weighed by the micro-batch's tokens over those of an average one: the mean over the micro-batches of
    a rollout is then the mean over its tokens, though short answers share a micro-batch.

    Args:
        per_token_logps: Of the current policy, `(B, T)`, like all tensors.
        batch: With `old_per_token_logps`, `old_values` and `num_items_in_batch`, the rollout's tokens.
        values: Of the current critic.
        value_loss: Per token.
        mask: 1 = trains.
        cliprange: Trust region of the values.
        micro_batches: Of the rollout.
    """
    count, (approx_kl, mean_loss, clip_fraction) = global_means(
        mask,
        estimate_kl(batch["old_per_token_logps"], per_token_logps.detach(), "k3"),
        value_loss.detach(),
        is_value_clipped(values.detach(), batch["old_values"], cliprange=cliprange),
    )
    weight = count * micro_batches / max(batch["num_items_in_batch"].item(), 1.0)
    metrics = {"policy/approx_kl": approx_kl, "loss/value": mean_loss, "val/clip_fraction": clip_fraction}
    return {name: weight * value for name, value in metrics.items()}
