"""From the scores of a rollout to what the update trains on: KL shaping, GAE, whitening.

The formulas are in layer 0; here is the order in which PPO applies them. Every rank must make each call.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rlhf_recipes.algorithm.advantages import (
    explained_variance,
    generalized_advantage_estimation,
    last_valid_index,
    shape_rewards,
)
from rlhf_recipes.algorithm.distributed import global_means, global_moments, global_var
from rlhf_recipes.algorithm.kl import estimate_kl
from rlhf_recipes.algorithm.masked import masked_whiten
from rlhf_recipes.algorithm.repetition import repeated_ngrams
from rlhf_recipes.options.ppo import PPOConfig


def values_of_tokens(state_values: Tensor) -> Tensor:
    """Return the value of the state that precedes each completion token, `(B, T)`, of `(B, T + 1)`."""
    return state_values[:, :-1]


def values_after_completion(state_values: Tensor, completion_mask: Tensor) -> Tensor:
    """Return the value of the state that each completion ends in, `(B,)`."""
    return state_values[:, 1:].gather(1, last_valid_index(completion_mask).unsqueeze(1)).squeeze(1)


def loss_mask(batch: dict[str, Any]) -> Tensor:
    """Return the policy's own tokens, `(B, T)`: completion tokens without tool output."""
    mask = batch["completion_mask"]
    return mask * batch["tool_mask"] if "tool_mask" in batch else mask


@dataclass
class RolloutEstimates:
    """What a rollout is worth, each `(B, T)`.

    Args:
        kl: What the reward is charged for, nats.
        rewards: Shaped.
        values: Of the critic that sampled.
        returns: Targets of the critic.
        advantages: Whitened if `PPOConfig.whiten_advantages` says so.
    """

    kl: Tensor
    rewards: Tensor
    values: Tensor
    returns: Tensor
    advantages: Tensor


def estimate_advantages(
    batch: dict[str, Tensor],
    mask: Tensor,
    state_values: Tensor,
    scores: Tensor,
    truncated: Tensor,
    args: PPOConfig,
    *,
    kl_coef: float,
) -> RolloutEstimates:
    """Shape the rewards, estimate advantages and returns, and whiten the advantages over all ranks.

    Args:
        batch: With `old_per_token_logps` and `ref_per_token_logps`, `(B, T)`, and `completion_mask`.
        mask: `(B, T)`, 1 = trains.
        state_values: Of the states around each token, `(B, T + 1)`.
        scores: Normalised, `(B,)`.
        truncated: Which completions the length limit has cut, `(B,)`.
        args: The options.
        kl_coef: Price of a nat.
    """
    if args.missing_eos_penalty is not None:
        scores = scores - args.missing_eos_penalty * truncated
    kl = estimate_kl(batch["old_per_token_logps"], batch["ref_per_token_logps"], args.kl_estimator)
    rewards = shape_rewards(scores, kl, mask, kl_coef=kl_coef)

    values, bootstrap = values_of_tokens(state_values), None
    if args.truncated_completions == "bootstrap":
        bootstrap = values_after_completion(state_values, batch["completion_mask"]) * truncated
    options: Any = {"gamma": args.gamma, "bootstrap_values": bootstrap}
    advantages, returns = generalized_advantage_estimation(rewards, values, mask, lam=args.lam, **options)
    if args.value_lam is not None:
        _, returns = generalized_advantage_estimation(rewards, values, mask, lam=args.value_lam, **options)
    if args.whiten_advantages:
        _, mean, var = global_moments(advantages, mask)
        advantages = masked_whiten(advantages, mask, mean=mean, var=var)
    return RolloutEstimates(kl, rewards, values, returns, advantages)


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
