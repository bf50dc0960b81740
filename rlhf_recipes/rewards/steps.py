"""Read answers as steps, and turn the log-odds of steps into rewards. No model is called here.

A scorer with a model in this process and a client of a server share this, so both judge a step at the same token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_recipes.algorithm.steps import StepReward, step_rewards
from rlhf_recipes.data.messages import Text, as_text
from rlhf_recipes.data.rendering import prompt_ids
from rlhf_recipes.data.steps import StepBoundary, StepRule, step_token_ids
from rlhf_recipes.rewards.card import RewardModelCard
from rlhf_recipes.rewards.reading import cut_front

Steps = list[tuple[int, float]]  # end of a step in characters of the completion, and its reward
CUT = -1  # place of a step whose end a model has no position for


@dataclass(frozen=True)
class ProcessRewardModelCard(RewardModelCard):
    """Describe the training of a process reward model.

    `score_mean` and `score_std` are those of the summed rewards of an answer, and `eval_accuracy` is the share of
    steps.

    Args:
        step_separator: Text between two steps.
        step_boundary: Where a separator ends a step, see `StepRule`.
        step_reward: What a step gives, see `step_rewards`.
        first_error_f1: See `step_metrics`; `None` without an evaluation.
    """

    ranks_pairs: ClassVar[bool] = False

    step_separator: str = "\n"
    step_boundary: StepBoundary = "separator"
    step_reward: StepReward = "signed"
    first_error_f1: float | None = None

    @property
    def rule(self) -> StepRule:
        """Return where a step ends."""
        return StepRule(self.step_separator, self.step_boundary)


@dataclass(frozen=True)
class StepRow:
    """Hold the tokens of a prompt and its answer, and the places of the steps in them.

    Args:
        token_ids: Tokens that the model reads, T of them.
        places: Index of the token at which each of N steps is judged, or `CUT`.
        ends: Characters of the answer up to the end of each step.
    """

    token_ids: list[int]
    places: list[int]
    ends: Sequence[int] = ()

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.token_ids)

    @property
    def has_all_ends(self) -> bool:
        """Return whether the model reads the end of every step."""
        return CUT not in self.places

    def within(self, limit: int | None, bos_id: int | None) -> "StepRow":
        """Return the row without the beginning that a model has no positions for. See `cut_front`."""
        cut = len(self) - (limit or len(self))
        if cut <= 0:
            return self
        first = int(self.token_ids[0] == bos_id)  # this token stays
        places = [place - cut if place - cut >= first else CUT for place in self.places]
        return StepRow(cut_front(self.token_ids, limit, bos_id), places, self.ends)

    def at_ends(self, log_odds: Tensor) -> Tensor:
        """Return the log-odds of the steps, `(N,)`, from those of tokens, `(T,)`; NaN where an end is cut off."""
        places = torch.tensor(self.places, dtype=torch.long)
        return log_odds[places].masked_fill(places == CUT, math.nan)


class StepReader:
    """Split answers into steps, and reward the steps, by the rules of a card.

    Args:
        tokenizer: Tokenizer of the model.
        card: Card of the model. Without one, steps end at a line break, and a step gives `2p - 1`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, card: ProcessRewardModelCard | None) -> None:
        self.tokenizer = tokenizer
        self.rule = StepRule() if card is None else card.rule
        self.step_reward: StepReward = "signed" if card is None else card.step_reward

    def identity(self, weights: str) -> str:
        """Return the identity of a scorer with these rules and a fingerprint of its weights."""
        return f"{weights}, {self.rule}, {self.step_reward}"

    def rows(self, prompts: list[Text], completions: list[Text]) -> list[StepRow]:
        """Return the tokens and steps of each completion with its prompt. There may be no step."""
        rows = []
        for prompt, text in zip(prompts, map(as_text, completions), strict=True):
            bounds = self.rule.bounds(text)
            row = self.row(prompt, [text[start:end] for start, end in bounds])
            rows.append(StepRow(row.token_ids, row.places, [end for _, end in bounds]))
        return rows

    def row(self, prompt: Text, steps: list[str]) -> StepRow:
        """Return the tokens of a prompt with steps."""
        return StepRow(*step_token_ids(self.tokenizer, prompt, steps, self.rule.separator))

    def rewards(self, row: StepRow, log_odds: Tensor) -> Steps | None:
        """Return the ends of the steps of a completion and their rewards; `None` if a step has no number.

        Args:
            row: Row of the completion.
            log_odds: Log-odds that each step is right, `(N,)`.
        """
        rewards = step_rewards(log_odds, self.step_reward)
        return None if rewards.isnan().any() else list(zip(row.ends, rewards.tolist(), strict=True))

    def prompt_lengths(self, prompts: list[Text]) -> list[int]:
        """Return the number of tokens that the model reads beside those of an answer in one step, one per prompt."""
        boundary = len(self.tokenizer(self.rule.separator, add_special_tokens=False)["input_ids"])
        return [len(prompt_ids(self.tokenizer, [prompt])[0]) + boundary for prompt in prompts]
