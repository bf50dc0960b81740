"""From sampled tokens to advantages: one record, which each stage of a rollout fills in turn.

TRL samples. The policy gives old log-probabilities and values, and the scorers give scores. Then come the reference,
normalised scores, shaped rewards, GAE and whitening. The formulas are in `algorithm/`. Every rank must make each call.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import gather
from torch import Tensor

from rlhf_recipes.algorithm.advantages import (
    generalized_advantage_estimation,
    is_truncated,
    last_valid_index,
    leave_one_out_means,
    shape_rewards,
)
from rlhf_recipes.algorithm.dense_rewards import centered_parts, onto_own_tokens
from rlhf_recipes.algorithm.distributed import global_max, global_moments, global_sum
from rlhf_recipes.algorithm.kl import estimate_kl, own_token_term
from rlhf_recipes.algorithm.masked import masked_whiten
from rlhf_recipes.algorithm.normalization import RewardNormalizer
from rlhf_recipes.data.messages import Text
from rlhf_recipes.evaluation.samples import dense_column, reward_columns, sample_rows
from rlhf_recipes.models.forward import CompletionForward
from rlhf_recipes.options.ppo import PPOConfig
from rlhf_recipes.trainers.reference_answers import ReferenceAnswers


@dataclass(eq=False)
class Rollout:
    """The completions of this process, their scores, and their advantages.

    B completions of this process, N of all processes, T completion tokens. The comment above a group of fields names
    the method that fills it. An early read or a second fill raises an `AttributeError`.
    """

    rows: list[dict[str, Any]]
    """Rows of the dataset, one per completion."""

    # take_answers
    prompts: list[Text] = field(init=False)
    completions: list[Text] = field(init=False)
    completion_id_lists: list[list[int]] = field(init=False)
    """Without padding."""
    own_scores: dict[str, Tensor] = field(init=False)
    """By reward function, and their weighted sum as `score`; `(B,)` each, NaN where there is none."""
    raw_scores: Tensor = field(init=False)
    """Weighted sum, `(N,)`; NaN where no function has scored, or no reference answer has a score."""

    # PPOTrainer.take_parts
    token_rewards: Tensor | None = field(init=False)
    """Weighted rewards of the tokens, `(B, t)`; `None` if there are only scores."""

    # shape_scores, with `reward_shaping`
    shaped_scores: Tensor = field(init=False)
    """In place of normalised scores, `(B,)`."""

    # RewardModelScorer.__call__
    critic_states: list[Tensor] = field(init=False)
    """With `critic: reward`, the reward model's hidden states before each token and after the last one, `(t + 1, H)`
    per completion."""

    # _get_per_token_logps_and_entropies
    first_forward: CompletionForward = field(init=False)
    """The first forward that TRL runs on the policy's network in this rollout. It is the policy's if TRL returns old
    log-probabilities. If not, it can be the reference's: the same network without its adapter."""

    # take_tokens
    completion_ids: Tensor = field(init=False)
    """`(B, T)`."""
    completion_mask: Tensor = field(init=False)
    """`(B, T)`; all 0 for a completion that does not train."""
    mask: Tensor = field(init=False)
    """`(B, T)`, 1 = trains: the policy's own tokens, without tool output."""
    truncated: Tensor = field(init=False)
    """Completions that the length limit has cut, `(B,)`."""
    parts: Tensor = field(init=False)
    """Weighted rewards of the tokens, which are parts of the scores, `(B, T)`."""
    scores: Tensor = field(init=False)
    """Those of `raw_scores` that train, `(N,)`; NaN for the others."""
    old_per_token_logps: Tensor = field(init=False)
    ref_per_token_logps: Tensor = field(init=False)
    state_values: Tensor = field(init=False)
    """`(B, T + 1)`. Column t: value before token t. Last column: value after the last token."""
    k1: Tensor = field(init=False)
    """`old_per_token_logps - ref_per_token_logps` on the tokens that train, 0 elsewhere; nats, `(B, T)`."""

    # ForwardTrainer._reference_logps and ._full_kl, with `kl_estimator: full`
    reference_forward: CompletionForward = field(init=False)
    full_kl: Tensor | None = field(init=False)
    """KL over the vocabulary at each of the policy's own tokens, nats, `(B, T)`."""

    # normalize_scores
    normalized_scores: Tensor = field(init=False)
    """`(B,)`."""
    normalized_parts: Tensor = field(init=False)
    """`(B, T)`."""

    # estimate_advantages
    kl_coef: float = field(init=False)
    kl: Tensor = field(init=False)
    """KL that the reward subtracts, nats, `(B, T)`: k1 unless `kl_estimator` says otherwise."""
    rewards: Tensor = field(init=False)
    """Shaped, `(B, T)`."""
    old_values: Tensor = field(init=False)
    """Of the state before each token, `(B, T)`."""
    returns: Tensor = field(init=False)
    """Targets of the critic, `(B, T)`."""
    mc_returns: Tensor = field(init=False)
    """Sum of the rewards from each token on, without any value, `(B, T)`."""
    advantages: Tensor = field(init=False)
    """`(B, T)`, whitened if `whiten_advantages` is true."""

    def has(self, name: str) -> bool:
        """Return whether a field is filled."""
        return name in vars(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if self.has(name):
            raise AttributeError(f"`{name}` of this rollout is filled already.")
        super().__setattr__(name, value)

    def forget(self, name: str) -> None:
        """Free the memory of a field that is not needed any more."""
        vars(self).pop(name, None)

    def take_answers(
        self,
        prompts: list[Text],
        completions: list[Text],
        completion_ids: list[list[int]],
        rewards: dict[str, Tensor],
        scores: Tensor,
    ) -> None:
        """Note the answers and their scores.

        Args:
            prompts: Text or messages.
            completions: Text or messages.
            completion_ids: Without padding.
            rewards: By reward function, of all processes, each `(N,)`.
            scores: Their weighted sum, `(N,)`.
        """
        self.prompts, self.completions, self.completion_id_lists = prompts, completions, completion_ids
        self.raw_scores = scores
        columns = reward_columns(rewards) | {"score": scores}
        self.own_scores = {name: own_part(values) for name, values in columns.items()}

    def shape_scores(self, references: ReferenceAnswers, scores: Tensor) -> Tensor:
        """Compare the scores with those of reference answers, and return them, NaN where that was not possible.

        Args:
            references: Scores of reference answers.
            scores: Scores of all processes, `(N,)`.

        Raises:
            ValueError: If steps or tokens have rewards of their own.
        """
        if self.token_rewards is not None:
            raise ValueError("`reward_shaping: par` bounds the score of a whole answer. Return one number per answer.")
        self.shaped_scores = references.shaped(own_part(scores), self.rows)
        return scores.masked_fill(gather(self.shaped_scores.isnan()), torch.nan)

    def take_tokens(
        self,
        batch: dict[str, Any],
        old_per_token_logps: Tensor,
        ref_per_token_logps: Tensor,
        state_values: Tensor,
        eos_token_ids: list[int],
    ) -> None:
        """Note tokens, log-probabilities and values, and leave out completions that cannot train.

        Args:
            batch: TRL's. Its completion mask is empty where `truncated_completions: mask` leaves a completion out.
            old_per_token_logps: Of the policy that has sampled, `(B, T)`.
            ref_per_token_logps: Of the reference, `(B, T)`.
            state_values: Of the critic, `(B, T + 1)`.
            eos_token_ids: Tokens that end a completion.
        """
        self.completion_ids, sampled = batch["completion_ids"], batch["completion_mask"]
        self.scores = self.raw_scores.masked_fill(~gather(sampled.any(dim=1)), torch.nan)
        self.completion_mask = sampled * own_part(self.scores).isfinite().unsqueeze(1)
        self.mask = loss_mask(self.completion_mask, batch)
        rewards = torch.zeros(self.mask.shape, device=self.mask.device)
        if self.token_rewards is not None:  # the batch may be wider than its longest completion
            rewards[:, : self.token_rewards.size(1)] = self.token_rewards
        self.parts = onto_own_tokens(rewards, self.mask)
        is_cut = is_truncated(self.completion_ids, sampled, eos_token_ids)
        self.truncated = is_cut | ~sampled.any(dim=1)  # TRL empties the mask of those that the limit has cut
        # Padding must reach neither a loss nor its gradient.
        self.old_per_token_logps = old_per_token_logps.masked_fill(self.mask == 0, 0)
        self.ref_per_token_logps = ref_per_token_logps.masked_fill(self.mask == 0, 0)
        self.state_values = state_values
        self.k1 = estimate_kl(self.old_per_token_logps, self.ref_per_token_logps, "k1")

    def normalize_scores(self, normalizer: RewardNormalizer | None, *, update: bool) -> None:
        """Bring the scores to the normaliser's scale, or take the shaped ones of those that train.

        Args:
            normalizer: `None` leaves the scores as they are.
            update: Whether these scores count for its statistics.
        """
        if normalizer is not None and update:
            normalizer.update(self.scores)
        scores = own_part(self.scores if normalizer is None else normalizer.normalize(self.scores))
        shaped = self.shaped_scores.masked_fill(scores.isnan(), torch.nan) if self.has("shaped_scores") else scores
        self.normalized_scores = shaped
        parts = self.parts
        dense = torch.tensor(float(self.token_rewards is not None), device=self.mask.device)
        if normalizer is not None and global_max(dense) > 0:  # the mean is over all ranks
            parts = centered_parts(normalizer.normalize_parts(parts), self.mask)
        self.normalized_parts = parts

    def estimate_advantages(self, args: PPOConfig, *, kl_coef: float, group_size: int) -> None:
        """Shape the rewards, estimate advantages and returns, and whiten the advantages over all ranks.

        Args:
            args: Options.
            kl_coef: Price of a nat.
            group_size: Completions per prompt.
        """
        scores = self.normalized_scores
        if args.missing_eos_penalty is not None:
            scores = scores - args.missing_eos_penalty * self.truncated
        self.kl_coef = kl_coef
        self.kl = self._paid_kl(args.kl_estimator)
        priced: Any = {"kl_coef": kl_coef, "parts": self.normalized_parts}
        self.rewards = rewards = shape_rewards(scores, self.kl, self.mask, **priced)
        if args.group_baseline and group_size > 1:
            scores = scores - own_part(leave_one_out_means(gather(scores), group_size))
            rewards = shape_rewards(scores, self.kl, self.mask, **priced)

        self.old_values, bootstrap = self.state_values[:, :-1], None
        if args.truncated_completions == "bootstrap":
            ends = last_valid_index(self.completion_mask).unsqueeze(1)
            bootstrap = self.state_values[:, 1:].gather(1, ends).squeeze(1) * self.truncated
        given: Any = {"gamma": args.gamma, "bootstrap_values": bootstrap}
        states = (rewards, self.old_values, self.mask)
        advantages, returns = generalized_advantage_estimation(*states, lam=args.lam, **given)
        if args.value_lam is not None:
            _, returns = generalized_advantage_estimation(*states, lam=args.value_lam, **given)
        nothing = torch.zeros_like(rewards)
        _, self.mc_returns = generalized_advantage_estimation(rewards, nothing, self.mask, gamma=args.gamma, lam=1.0)
        if self.full_kl is not None:
            advantages = advantages + kl_coef * own_token_term(self.kl, self.k1)
        if args.whiten_advantages:
            _, mean, var = global_moments(advantages, self.mask)
            advantages = masked_whiten(advantages, self.mask, mean=mean, var=var)
        self.returns, self.advantages = returns, advantages

    def _paid_kl(self, estimator: Literal["k1", "k2", "k3", "full"]) -> Tensor:
        if estimator == "full":
            assert self.full_kl is not None
            return self.full_kl.masked_fill(self.mask == 0, 0)
        given = (self.old_per_token_logps, self.ref_per_token_logps)
        return self.k1 if estimator == "k1" else estimate_kl(*given, estimator)

    def columns(self) -> dict[str, Tensor]:
        """Return the tensors that the update reads; TRL shuffles and cuts them with the tokens."""
        names = ("completion_mask", "old_per_token_logps", "ref_per_token_logps", "old_values", "returns")
        tokens = {"num_items_in_batch": global_sum(self.mask.sum()), "advantages": self.advantages}
        return {name: getattr(self, name) for name in names} | tokens

    def samples(self, limit: int | None = None) -> list[dict[str, Any]]:
        """Return a row of text and figures per completion, of the first `limit` completions."""
        shown = slice(limit)
        figures = self.own_scores | {"kl": self.k1.sum(dim=1)}
        rows = sample_rows(
            self.prompts,
            self.completions,
            self.completion_id_lists,
            {name: values[shown] for name, values in figures.items()},
            self.truncated[shown],
        )
        if self.token_rewards is None:
            return rows
        dense = dense_column(self.parts[shown])
        return [row | {"dense_rewards": text} for row, text in zip(rows, dense, strict=True)]


def loss_mask(completion_mask: Tensor, batch: dict[str, Any]) -> Tensor:
    """Return the policy's own tokens, `(B, T)`: completion tokens without the output of tools."""
    return completion_mask * batch.get("tool_mask", 1)


def own_part(values: Tensor) -> Tensor:
    """Return this process's rows `(B, ..)` of a tensor of all processes `(N, ..)`."""
    state = PartialState()
    return values.view(state.num_processes, -1, *values.shape[1:])[state.process_index]
