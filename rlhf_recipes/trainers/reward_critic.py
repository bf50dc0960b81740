"""A critic that reads the hidden states of the reward model: `critic: reward`.

The reward model reads every completion to score it, so its states cost nothing more, and they hold what the score
depends on. The critic is a small head on them, fitted after each rollout for several epochs. Each rank keeps a copy.
"""

import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss, pad
from torch.nn.utils.rnn import pad_sequence

from rlhf_recipes.algorithm.distributed import global_sum
from rlhf_recipes.algorithm.value_head import ValueHead
from rlhf_recipes.durability.finite import all_finite
from rlhf_recipes.models.vocabulary import inner_tokenizer
from rlhf_recipes.options.ppo import PPOConfig
from rlhf_recipes.rewards.protocol import Scorer
from rlhf_recipes.trainers.rollback import RollbackError

MINI_BATCHES = 4  # per epoch
PRETRAINING_ROWS, PRETRAINING_EPOCHS = 32, 10
OTHER_TOKENS = 0.01  # share of the vocabulary in which two tokenizers may differ and still count as one
logger = logging.getLogger(__name__)


class RewardCritic:
    """Estimate the value of states from what the reward model has read so far.

    Args:
        args: Options.
        hidden_size: Width of the reward model's states, H.
        device: Device of the head.
    """

    def __init__(self, args: PPOConfig, hidden_size: int, device: torch.device) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(args.seed)  # `torch.manual_seed` would also seed every GPU
            head = ValueHead(hidden_size, args.value_head_size, args.value_head_activation)
        self.head, self.epochs = head.to(device), args.critic_epochs
        learning_rate: Any = args.value_head_learning_rate
        self.optimizer = torch.optim.Adam(self.head.parameters(), lr=learning_rate, eps=1e-6)

    @torch.no_grad()
    def values(self, states: list[Tensor], length: int) -> Tensor:
        """Return the values of the states around each token, `(B, T + 1)`, 0 in the padding.

        Args:
            states: Of each completion the states before its tokens and after the last one, `(t + 1, H)`.
            length: Number of columns of the completions, T.
        """
        lengths = [len(of_row) for of_row in states]
        known = self.head(
            torch.cat(states)
        ).nan_to_num()  # a reward model may fail on a row that another reward scores
        values = pad_sequence(list(known.split(lengths)), batch_first=True)
        return pad(values, (0, length + 1 - values.size(1)))

    def fit(self, states: list[Tensor], returns: Tensor, mask: Tensor, *, first_row: int = 0, step: int = 0) -> None:
        """Fit the head to the returns of a rollout. Every rank must call this.

        Args:
            states: See `values`.
            returns: Targets, `(B, T)`.
            mask: Tokens that train, `(B, T)`.
            first_row: Number of this rank's first row in the rollout of all ranks.
            step: Optimiser steps of the policy so far.

        Raises:
            RollbackError: If the head is not finite afterwards.
        """
        batches = _mini_batches(states, returns, mask, MINI_BATCHES, first_row)
        for batch in itertools.chain(*itertools.repeat(batches, self.epochs)):
            self._step(*batch)
        self._check(step)

    def pretrain(self, scorer: Any, dataset: Any, scale: Callable[[Tensor], Tensor]) -> None:
        """Fit the head to answers that exist already: the score of an answer is the target of all of its states.

        Every rank does the same on the same answers.

        Args:
            scorer: Reward model that gives states.
            dataset: `prompt`, `chosen` and `rejected`.
            scale: Brings the scores of the answers, each `chosen` before its `rejected`, to the scale of the returns.

        Raises:
            RollbackError: If the head is not finite afterwards.
        """
        prompts = [prompt for prompt in dataset["prompt"] for _ in range(2)]
        answers = [answer for pair in zip(dataset["chosen"], dataset["rejected"], strict=True) for answer in pair]
        scores, states = scorer.score_with_states(prompts, answers)
        targets = scale(torch.tensor(scores, device=next(self.head.parameters()).device))
        lengths = torch.tensor([len(of_row) - 1 for of_row in states], device=targets.device)
        mask = torch.arange(int(lengths.max()), device=targets.device) < lengths.unsqueeze(1)
        returns = targets.unsqueeze(1).expand(mask.shape)
        batches = _mini_batches(states, returns, mask, -(-len(states) // PRETRAINING_ROWS), first_row=0)
        for batch in itertools.chain(*itertools.repeat(batches, PRETRAINING_EPOCHS)):
            self._step(*batch)
        self._check(0)

    def _check(self, step: int) -> None:
        moments = (value for state in self.optimizer.state.values() for value in state.values())
        if not all_finite([*self.head.parameters(), *moments]):
            reason = f"Step {step}: the critic of `critic: reward` is not finite after it was fitted."
            raise RollbackError(reason, "Lower `value_head_learning_rate`.", step)

    def _step(self, features: Tensor, targets: Tensor, count: float) -> None:
        """Take one step on a mini-batch that all ranks share, with `count` targets in all."""
        with torch.enable_grad():
            error = mse_loss(self.head(features), targets, reduction="sum")
            self.optimizer.zero_grad()
            (error / max(count, 1.0)).backward()
        for parameter in self.head.parameters():
            assert parameter.grad is not None
            parameter.grad = global_sum(parameter.grad)
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Return head and optimiser."""
        return {"head": self.head.state_dict(), "optimizer": self.optimizer.state_dict()}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: If the checkpoint had no such critic.
        """
        if state is None:
            raise ValueError("The checkpoint holds no critic of `critic: reward`: resume with `critic: policy`.")
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])


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
    """Check that a critic of this kind can read what the reward models of a run read.

    Raises:
        ValueError: If `critic: reward` has no reward model, or one that counts other tokens than the policy, or if
            there are answers for a critic that is not fitted to any.
    """
    if critic != "reward":
        if dataset is not None:
            raise ValueError("A `critic_dataset` (`critic_dataset_name`) needs `critic: reward`: no other is fitted.")
        return
    if dataset is not None and len(scorers) > 1:
        logger.warning(
            "The critic is not fitted to `critic_dataset` (`critic_dataset_name`): the reward model's scores of its "
            "answers are not the sum of this run's rewards. It is fitted from the first rollout on."
        )
    scorer = scorer_with_states(scorers)
    vocabulary = inner_tokenizer(tokenizer).get_vocab()
    # Some tokens may be added to one of the two.
    if len(vocabulary.items() ^ scorer.tokenizer.get_vocab().items()) > OTHER_TOKENS * len(vocabulary):
        raise ValueError(
            f"`critic: reward` needs one tokenizer for policy and reward model: {scorer.__name__} has another one, so "
            "its states are not those before the policy's tokens. Set `critic: policy`."
        )


def _mini_batches(
    states: list[Tensor], returns: Tensor, mask: Tensor, count: int, first_row: int
) -> list[tuple[Tensor, Tensor, float]]:
    """Return `count` mini-batches: states `(n, H)`, their targets `(n,)`, and the number of targets of all ranks.

    The rows are dealt out by their number in the whole rollout, so the mini-batches do not depend on the number of
    ranks.
    """
    batches = []
    for number in range(count):
        # A rank can have no row of a mini-batch, and takes part in its step all the same.
        features, targets = [states[0][:0]], [returns[0, :0]]
        for row in range((number - first_row) % count, len(states), count):
            is_finite = states[row].isfinite().all() & returns[row].isfinite().all()
            keep = mask[row, : len(states[row]) - 1].bool() & is_finite
            features.append(states[row][:-1][keep])
            targets.append(returns[row, : len(keep)][keep])
        batches.append((torch.cat(features), torch.cat(targets)))
    totals = global_sum(torch.tensor([float(len(targets)) for _, targets in batches], device=returns.device)).tolist()
    return [(*batch, total) for batch, total in zip(batches, totals, strict=True)]
