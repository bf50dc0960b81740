"""Rewards of steps and tokens: TRL gets their sums, and PPO also the parts.

Overrides only, on `trl.GRPOTrainer` and `trl.RLOOTrainer`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rlhf_recipes.rewards.calls import RewardCalls
from rlhf_recipes.rewards.dense import KeptAnswer, with_kept_answer
from rlhf_recipes.trainers.saving import SavingTrainer


class DenseRewardTrainer(SavingTrainer):
    """Let reward functions and scorers return the rewards of steps or tokens in place of a score."""

    reward_funcs: list[Any]  # TRL's
    reward_calls: RewardCalls

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: list[list[int]]
    ) -> Tensor:
        functions, given = self.reward_funcs, {"fail": self.reward_calls.fail_to_read, "decode": self.decoder()}
        # TRL calls a module in another way. It returns logits, which are no list.
        kept = [call if isinstance(call, nn.Module) else with_kept_answer(call, **given) for call in functions]
        self.reward_funcs = kept
        try:
            rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        finally:
            self.reward_funcs = functions
        answers = [call if isinstance(call, KeptAnswer) else None for call in kept]
        self.take_parts(answers, completion_ids_list)
        return rewards_per_func

    def decoder(self) -> Callable[[Any], str] | None:
        """Return a function that returns the text of token ids, if `take_parts` needs the rewards of tokens."""
        return None

    def take_parts(self, answers: list[KeptAnswer | None], ids: list[list[int]]) -> None:
        """Look at the answers of the reward functions, of this process. Only PPO needs more than the sums."""


def weighted_parts(answers: list[KeptAnswer | None], weights: list[float], ids: list[list[int]]) -> Tensor | None:
    """Return the weighted rewards of the tokens, `(B, T)`, 0 in the padding; `None` if no function gave any.

    Args:
        answers: Answers of the functions, by token.
        weights: Weights of the functions.
        ids: Token ids of the completions.
    """
    parts = [torch.zeros(len(row), dtype=torch.float64) for row in ids]
    found = False
    for answer, weight in zip(answers, weights, strict=True):
        rows = [] if answer is None else answer.by_token
        for part, row in zip(parts, rows, strict=bool(rows)):
            if row is not None:
                part += weight * torch.tensor(row, dtype=torch.float64)
                found = True
    return pad_sequence(parts, batch_first=True) if found else None
