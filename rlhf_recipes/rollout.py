"""From the scores of a rollout to what the update trains on: KL shaping, GAE, whitening.

Layer L2. The formulas are in layer 0; here is the order in which PPO applies them. Every rank must make each call.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rlhf_recipes.advantages import generalized_advantage_estimation, shape_rewards
from rlhf_recipes.completion_forward import values_after_completion, values_of_tokens
from rlhf_recipes.configs import PPOConfig
from rlhf_recipes.distributed import global_moments
from rlhf_recipes.kl import estimate_kl
from rlhf_recipes.masked import masked_whiten


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
