"""A critic that reads the hidden states of the reward model: `critic: reward`.

The reward model reads every completion to score it, so its states cost nothing more, and they hold what the score
depends on. The critic is a small head on them.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_recipes.models.vocabulary import inner_tokenizer
from rlhf_recipes.options.ppo import PPOConfig
from rlhf_recipes.rewards.protocol import Scorer
from rlhf_recipes.trainers.fitted_critic import FittedCritic, MiniBatch
from rlhf_recipes.trainers.rollout import Rollout

OTHER_TOKENS = 0.01  # share of the vocabulary in which two tokenizers may differ and still count as one
logger = logging.getLogger(__name__)


class RewardCritic(FittedCritic):
    """Estimate the value of states from what the reward model has read so far.

    A row holds the states of a completion, before its tokens and after the last one, `(t + 1, H)`.

    Args:
        args: Options.
        hidden_size: Width of the reward model's states, H.
        device: Device of the head.
        rewards: Identity of the rewards.
    """

    kind = "reward"

    def __init__(self, args: PPOConfig, hidden_size: int, device: torch.device, *, rewards: str = "") -> None:
        super().__init__(args, hidden_size, device, rewards=rewards)
        self.bytes_per_token = 4 * hidden_size

    def rows(self, rollout: Rollout, batch: dict[str, Any]) -> list[Tensor]:
        """Return the states that the reward model has given to the rollout."""
        return rollout.critic_states

    def figures(self, rows: list[Tensor]) -> dict[str, float]:
        """Return how many tokens have a state of their own."""
        return {"val/critic_tokens": share_of_own_states(rows)}

    def read_answers(self, scorer: Any, prompts: list[Any], answers: list[Any]) -> tuple[list[float], list[Tensor]]:
        """Return the scores of finished answers, and the states of each."""
        scores, states = scorer.score_with_states(prompts, answers)
        return scores, states

    def _is_readable(self, row: Tensor) -> Tensor:
        return row.isfinite().all()

    def _values(self, rows: list[Tensor]) -> list[Tensor]:
        return list(self.head(torch.cat(rows)).split([len(row) for row in rows]))

    def _backward(self, batch: MiniBatch) -> None:
        if batch.rows:
            pairs = zip(batch.rows, batch.keep, strict=True)
            values = self.head(torch.cat([row[:-1][kept] for row, kept in pairs]))
            self._add_gradient(values, torch.cat(batch.targets), batch.count)


def share_of_own_states(states: list[Tensor]) -> float:
    """Return the share of tokens before which the critic has read more than before the token in front of them.

    It is below 1 where the reward model reads other tokens than the policy has sampled.

    Args:
        states: Of each completion the states before its tokens and after the last one, `(t + 1, H)`.
    """
    own = torch.stack([(of_row[1:] != of_row[:-1]).any(dim=1).sum() for of_row in states])
    return own.sum().item() / max(sum(len(of_row) - 1 for of_row in states), 1)


def scorer_with_states(scorers: Sequence[Scorer]) -> Any:
    """Return the first scorer whose hidden states a critic can read.

    Raises:
        ValueError: If there is none.
    """
    for scorer in scorers:
        if scorer.gives_states:
            return scorer
    raise ValueError(
        "`critic: reward` reads the hidden states of a reward model in this process, and this run has none: set "
        "`reward_model_path` to a directory or a Hub name, or `reward_adapter`; or set `critic: policy`."
    )


def check_critic(critic: str, dataset: Any, scorers: Sequence[Scorer], tokenizer: Any) -> None:
    """Check that a critic of this kind can read what it needs from the reward models of a run.

    Raises:
        ValueError: If `critic: reward` has no reward model, or one that counts other tokens than the policy, or if
            there are answers for a critic that is not fitted to any.
    """
    if critic == "policy" and dataset is not None:
        raise ValueError(
            "A `critic_dataset` (`critic_dataset_name`) needs `critic: reward` or `critic: adapter`: no other is "
            "fitted."
        )
    if critic == "reward":
        _check_tokenizer(scorer_with_states(scorers), tokenizer)
    if dataset is not None and not scores_all(scorers):
        logger.warning(
            "The critic is not fitted to `critic_dataset` (`critic_dataset_name`): no reward model in this process "
            "gives the whole reward of its answers. It is fitted from the first rollout on."
        )


def scores_all(scorers: Sequence[Scorer]) -> bool:
    """Return whether the only reward of a run is that of a reward model in this process."""
    return len(scorers) == 1 and scorers[0].gives_states


def _check_tokenizer(scorer: Any, tokenizer: Any) -> None:
    vocabulary = inner_tokenizer(tokenizer).get_vocab()
    # Some tokens may be added to one of the two.
    if len(vocabulary.items() ^ scorer.tokenizer.get_vocab().items()) > OTHER_TOKENS * len(vocabulary):
        raise ValueError(
            f"`critic: reward` needs one tokenizer for policy and reward model: {scorer.__name__} has another one, so "
            "its states are not those before the policy's tokens. Set `critic: policy`."
        )
