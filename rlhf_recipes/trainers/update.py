"""The figures that PPO logs about a rollout and about an update, over all ranks.

Every rank must make each call. The glossary is `docs/metrics.md`.
"""

import math
from typing import Any

import torch
from torch import Tensor

from rlhf_recipes.algorithm.distributed import global_means
from rlhf_recipes.algorithm.kl import estimate_kl
from rlhf_recipes.algorithm.losses import is_value_clipped
from rlhf_recipes.options.ppo import PPOConfig


def group_by_length(micro_batches: list[dict[str, Any]], window: int) -> list[dict[str, Any]]:
    """Cut the rows of each optimiser step into micro-batches anew, by length, so that each needs little padding.

    A step keeps its rows, and its gradient does not depend on how they are cut: all losses of `PPOConfig` are sums or
    means over micro-batches of one size.

    Args:
        micro_batches: Of one rollout, of one size, in the order of training.
        window: Micro-batches per optimiser step.
    """
    grouped: list[dict[str, Any]] = []
    for start in range(0, len(micro_batches), window):
        step = micro_batches[start : start + window]
        names = [name for name, x in step[0].items() if isinstance(x, Tensor) and x.ndim > 0]
        rows = {name: torch.cat([batch[name] for batch in step]) for name in names}
        order = (rows["prompt_mask"].sum(dim=1) + rows["completion_mask"].sum(dim=1)).argsort()
        for batch, part in zip(step, order.chunk(len(step)), strict=True):
            grouped.append({**batch, **{name: x[part] for name, x in rows.items()}})
    return grouped


def episodes(step: int, args: PPOConfig) -> int:
    """Return how many completions all ranks have sampled when optimiser step `step` ends: those of whole rollouts."""
    return math.ceil(step / args.rollout_steps) * args.generation_batch_size


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
