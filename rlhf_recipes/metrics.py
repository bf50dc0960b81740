"""The figures that PPO logs about a rollout and about an update, over all ranks.

Layer L2. Every rank must make each call. The glossary is `docs/metrics.md`.
"""

import math

import torch
from torch import Tensor

from rlhf_recipes.advantages import explained_variance
from rlhf_recipes.configs import PPOConfig
from rlhf_recipes.distributed import global_means, global_var
from rlhf_recipes.kl import estimate_kl
from rlhf_recipes.losses import is_value_clipped
from rlhf_recipes.rollout import RolloutEstimates


def episodes(step: int, args: PPOConfig) -> int:
    """Return how many completions all ranks have sampled when optimiser step `step` ends: those of whole rollouts."""
    return math.ceil(step / args.rollout_steps) * args.generation_batch_size


def repeated_ngrams(completion_ids: Tensor, mask: Tensor, n: int = 4) -> Tensor:
    """Return which share of each completion's n-grams has occurred in it before, `(B,)`; 0 if it has none.

    Args:
        completion_ids: `(B, T)`.
        mask: `(B, T)`, 1 = belongs to the completion.
        n: Tokens.
    """
    if completion_ids.size(1) < n:
        return torch.zeros(completion_ids.size(0), device=completion_ids.device)
    ngrams, whole = completion_ids.unfold(1, n, 1), mask.bool().unfold(1, n, 1).all(dim=-1)
    hashes = torch.zeros_like(ngrams[..., 0])
    for token in ngrams.unbind(dim=-1):
        hashes = (hashes * 1_000_003 + token) & (2**62 - 1)  # wraps around: two n-grams meet once in 4e18
    alone = -1 - torch.arange(hashes.size(1), device=hashes.device)
    hashes = torch.where(whole, hashes, alone).sort(dim=1).values
    repeats = (hashes[:, 1:] == hashes[:, :-1]).sum(dim=1)
    return repeats / whole.sum(dim=1).clamp(min=1)


def rollout_metrics(
    batch: dict[str, Tensor], mask: Tensor, estimates: RolloutEstimates, *, scores: Tensor, kl_coef: float
) -> tuple[int, dict[str, float]]:
    """Return the number of completions that train, and what was sampled.

    Args:
        batch: With `completion_ids`, `completion_mask`, `old_per_token_logps` and `ref_per_token_logps`, `(B, T)`.
        mask: `(B, T)`, 1 = trains.
        estimates: Of the rollout.
        scores: Raw scores of all ranks.
        kl_coef: Price of a nat.
    """
    k1 = estimate_kl(batch["old_per_token_logps"], batch["ref_per_token_logps"], "k1")
    sums = ((x.masked_fill(mask == 0, 0)).sum(dim=1) for x in (k1, estimates.kl, estimates.rewards))
    repeated = repeated_ngrams(batch["completion_ids"], batch["completion_mask"])
    count, (mean_k1, paid, rlhf_reward, repetition) = global_means(mask.any(dim=1), *sums, repeated)
    explained = explained_variance(estimates.values, estimates.returns, mask, variance=global_var)
    return int(count), {
        "objective/kl": mean_k1,
        "objective/scores": scores[scores.isfinite()].mean().item(),
        "objective/rlhf_reward": rlhf_reward,
        "objective/non_score_reward": -kl_coef * paid,
        "objective/excluded": 1 - count / scores.numel(),
        "val/explained_variance": explained.item(),
        "kl_coef": kl_coef,
        "completions/repeated_ngrams": repetition,
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
) -> tuple[float, dict[str, float]]:
    """Return the weight of one micro-batch, and how far it has moved from its rollout.

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
    return weight, {name: weight * value for name, value in metrics.items()}
