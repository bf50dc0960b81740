"""The figures of a rollout. Glossary: `docs/metrics.md`."""

import torch

from rlhf_recipes.algorithm.advantages import explained_variance, leave_one_out_means, quarters
from rlhf_recipes.algorithm.distributed import global_means, global_var
from rlhf_recipes.algorithm.repetition import repeated_ngrams
from rlhf_recipes.trainers.rollout import Rollout

MEANS_OVER_COMPLETIONS = ["objective/kl", "objective/rlhf_reward", "objective/non_score_reward"]
MEANS_OVER_COMPLETIONS += ["completions/repeated_ngrams", "objective/kl_full"]
DENSE_FIGURES = [f"objective/dense_rewards_q{quarter}" for quarter in range(1, 5)]


def rollout_metrics(rollout: Rollout, group_size: int) -> tuple[int, dict[str, float]]:
    """Return how many completions of all ranks train, and the figures of the rollout. Glossary: `docs/metrics.md`.

    Args:
        rollout: Rollout with advantages.
        group_size: Completions per prompt.
    """
    mask, scores = rollout.mask, rollout.scores
    by_quarter = quarters(mask)
    is_dense = torch.full(mask.shape[:1], float(rollout.token_rewards is not None), device=mask.device)
    dense = ((rollout.parts * quarter).sum(dim=1) for quarter in by_quarter)
    sums = (x.sum(dim=1) for x in (rollout.k1, rollout.kl, rollout.rewards))  # 0 outside of the mask
    repeated = repeated_ngrams(rollout.completion_ids, rollout.completion_mask)
    means = global_means(mask.any(dim=1), *sums, repeated, is_dense, *dense)
    count, (mean_k1, paid, rlhf_reward, repetition, share_dense, *dense_means) = means
    explained = {"": (rollout.returns, mask), "_mc": (rollout.mc_returns, mask)}
    explained |= {f"_mc_q{i}": (rollout.mc_returns, quarter) for i, quarter in enumerate(by_quarter, start=1)}
    known = scores.isfinite()
    prompts = {}
    if group_size > 1:
        others = leave_one_out_means(scores, group_size)
        compared = known & (known.view(-1, group_size).sum(dim=1) > 1).repeat_interleave(group_size)
        prompts["val/explained_variance_prompt"] = explained_variance(others, scores, compared).item()
    return int(count), {
        "objective/kl": mean_k1,
        "objective/scores": scores[known].mean().item(),
        "objective/rlhf_reward": rlhf_reward,
        "objective/non_score_reward": -rollout.kl_coef * paid,
        "objective/excluded": 1 - count / scores.numel(),
        "kl_coef": rollout.kl_coef,
        "completions/repeated_ngrams": repetition,
    } | ({} if rollout.full_kl is None else {"objective/kl_full": paid}) | {
        f"val/explained_variance{name}": explained_variance(rollout.old_values, *target, variance=global_var).item()
        for name, target in explained.items()
    } | prompts | (dict(zip(DENSE_FIGURES, dense_means, strict=True)) if share_dense else {})
