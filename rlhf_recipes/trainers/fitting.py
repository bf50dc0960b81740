"""Fit a critic that is no part of the policy between the rollouts, and keep it in checkpoints and beside the policy.

Overrides only, on `trl.GRPOTrainer`.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from rlhf_recipes.algorithm.advantages import leave_one_out_means
from rlhf_recipes.algorithm.normalization import RewardNormalizer
from rlhf_recipes.models.vocabulary import inner_tokenizer
from rlhf_recipes.trainers.adapter_critic import AdapterCritic, check_weights_are_whole
from rlhf_recipes.trainers.fitted_critic import FittedCritic
from rlhf_recipes.trainers.forwards import ForwardTrainer
from rlhf_recipes.trainers.reference_answers import ReferenceAnswers
from rlhf_recipes.trainers.reward_critic import RewardCritic, scorer_with_states, scores_all
from rlhf_recipes.trainers.rollout import Rollout

FACTS_OF_REWARDS = ("the rewards", "the reward adapter")
# A critic that was fitted to returns of one scale is wrong by a factor for those of another.
SCALE_OF_RETURNS = ("reward_norm", "gamma", "missing_eos_penalty")
logger = logging.getLogger(__name__)


class FittingTrainer(ForwardTrainer):
    """Let a rollout have the values of a `FittedCritic`, and fit it. With `critic: policy` there is none.

    A subclass sets the attributes declared here before it trains.
    """

    critic: FittedCritic | None = None
    critic_dataset: Any
    reward_normalizer: RewardNormalizer
    references: ReferenceAnswers | None = None  # with `reward_shaping`
    _starts_with_critic = False  # whether the policy's directory had one

    def build_critic(self, directory: str, facts: dict[str, Any]) -> None:
        """Build the critic that the options name, from the weights beside the policy if there are some.

        Args:
            directory: Directory of the policy that training starts from, or "".
            facts: Result of `facts_of_run`.
        """
        if self.args.critic == "policy":
            return
        device, rewards = self.accelerator.device, self._identity_of_returns(facts)
        if self.args.critic == "reward":
            scorer = scorer_with_states(self.scorers)
            self.critic = RewardCritic(self.args, scorer.hidden_size, device, rewards=rewards)
        else:
            check_weights_are_whole(self.accelerator.distributed_type)
            tokenizer = inner_tokenizer(self.processing_class)
            self.critic = AdapterCritic(self.args, self.model, tokenizer, device, rewards=rewards)
        self._starts_with_critic = self.critic.load(directory, reads=self.accelerator.is_main_process)

    @property
    def _is_grouped(self) -> bool:
        return bool(self.args.group_baseline and self.num_generations > 1)

    def identity_of_scores(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Return what gives the scores: the rewards, and the rule for several heads if it is not the default."""
        identity = {name: facts.get(name) for name in FACTS_OF_REWARDS}
        if self.args.reward_heads == "mean":
            return identity
        return identity | {"reward_heads": [self.args.reward_heads, self.args.reward_heads_coef]}

    def _identity_of_returns(self, facts: dict[str, Any]) -> str:
        """Return what a critic's values are in: the rewards, and the options that scale them."""
        identity = self.identity_of_scores(facts) | {name: getattr(self.args, name) for name in SCALE_OF_RETURNS}
        if self.args.reward_shaping != "none":  # critics that earlier versions have saved do not know it
            identity["reward_shaping"] = self.args.reward_shaping
        identity |= {"weights": self.reward_weights.tolist(), "grouped": self._is_grouped}
        return json.dumps(identity | {"functions": [scorer.origin for scorer in self.scorers]})

    def restore_progress(self) -> None:
        """Restore the critic with the rest. At the start of a run, fit it to the answers of `critic_dataset`."""
        super().restore_progress()
        if self.critic is None:
            return
        if self._resumed_from is not None:
            # The main process of a node has written it.
            index = self.accelerator.process_index
            ranks = dict.fromkeys((index, index - self.accelerator.local_process_index, 0))
            saved = (self._saved_progress(self._resumed_from, rank) for rank in ranks)
            self.critic.restore(next((progress["critic"] for progress in saved if "critic" in progress), None))
        elif self.critic_dataset is not None and self._starts_with_critic:
            if self.accelerator.is_main_process:
                logger.info("The critic is not fitted to `critic_dataset`: it starts with the weights of a saved one.")
        elif self.critic_dataset is not None and scores_all(self.scorers):
            place = {"rank": self.accelerator.process_index, "ranks": self.accelerator.num_processes}
            self.critic.pretrain(self.scorers[0], self.critic_dataset, self._scale_of_returns, **place)

    def _progress(self) -> dict[str, Any]:
        progress = super()._progress()
        if self.critic is not None and self.args.should_save:  # it is the same on all ranks, and may be large
            progress["critic"] = self.critic.state_dict()
        return progress

    def _scale_of_returns(self, scores: Tensor) -> Tensor:
        """Return the scores of pairs of answers on the scale of the returns of a rollout."""
        scores = scores * self.reward_weights[0].to(scores.device)
        if self.references is not None:
            scores = self.references.shaped(scores, [row for row in self.critic_dataset for _ in range(2)])
        if self.args.reward_norm:
            normalizer = self.reward_normalizer
            if not normalizer.is_known:  # the first rollout is scaled by its own statistics, and so are these scores
                normalizer = RewardNormalizer(self.args.reward_norm_decay, self.args.reward_norm_clip)
                normalizer.update(scores)
            scores = normalizer.normalize(scores)
        return (scores - leave_one_out_means(scores, 2) if self._is_grouped else scores).float()

    def critic_values(self, rows: list[Any], length: int) -> Tensor:
        """Return the critic's values, and log what it says about the rows.

        Args:
            rows: Result of `FittedCritic.rows`.
            length: Number of columns of the completions.
        """
        assert self.critic is not None
        self._log_metrics(self.critic.figures(rows))
        return self.critic.values(rows, length)

    def fit_critic(self, rows: list[Any], rollout: Rollout) -> None:
        """Fit the critic to the returns of a rollout that trains."""
        if self.critic is not None and self.model.training:
            place = {"first_row": self.accelerator.process_index * len(rollout.mask), "step": self.state.global_step}
            self.critic.fit(rows, rollout.returns, rollout.mask, **place)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._states_for_critic():
            return super()._calculate_rewards(*args, **kwargs)

    @contextmanager
    def _states_for_critic(self) -> Iterator[None]:
        """Let the reward model give its hidden states to the rollout, inside only: it may serve others too."""
        if self.args.critic != "reward":
            yield
            return
        scorer, rollout = scorer_with_states(self.scorers), self.rollout
        scorer.take_states = lambda states: setattr(rollout, "critic_states", states)
        try:
            yield
        finally:
            scorer.take_states = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy, and beside it the critic, from which a later run starts. Checkpoints hold it already."""
        super().save_model(output_dir, _internal_call)
        if self.critic is not None and self.args.should_save and not _internal_call:
            self.critic.save(output_dir or self.args.output_dir)
