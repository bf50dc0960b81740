"""Score completions with a process reward model: a reward for each step, at the place where the step ends."""

import logging
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_recipes.algorithm.steps import log_odds_of
from rlhf_recipes.models.critic import causal_lm
from rlhf_recipes.models.fingerprint import fingerprint
from rlhf_recipes.models.loading import position_limit
from rlhf_recipes.models.process_reward_model import (
    check_step_head,
    is_process_reward_model,
    load_process_reward_model,
    with_step_head,
)
from rlhf_recipes.models.rope import cut_by_length
from rlhf_recipes.models.vocabulary import with_end_token
from rlhf_recipes.rewards.card import CARD_FILE
from rlhf_recipes.rewards.protocol import Scorer, ScoringRun
from rlhf_recipes.rewards.reading import check_tokens, padded, unknown_tokens, vocabulary_size
from rlhf_recipes.rewards.scorer import Prompt, load_scorer_tokenizer
from rlhf_recipes.rewards.steps import ProcessRewardModelCard, StepReader, StepRow, Steps

logger = logging.getLogger(__name__)


class ProcessRewardModelScorer(Scorer):
    """Reward the steps of completions with a token classifier, on text in the form that it was trained on.

    The model reads the prompt and then each step with a separator after it, all in one forward, and judges a step at
    the last token of that separator.

    Args:
        model: Token classifier with one output, or with two ("wrong" and "right").
        tokenizer: Tokenizer of the model.
        card: Its card, if it has one. See `StepReader`.

    Raises:
        ValueError: If the model has no `score` layer for each token, or no embedding for EOS.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    gives_steps = True
    source: Any = None  # the path or the model that became this scorer
    batch_size: int = 8  # completions per forward pass of equal rows; more of the short ones share one
    policy_eos_token_ids: list[int] | None = None  # a step that was cut off is judged as it is

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, card: ProcessRewardModelCard | None = None
    ) -> None:
        check_step_head(model)
        self.model, self.tokenizer, self.card = model, with_end_token(tokenizer, model), card
        self.reader = StepReader(self.tokenizer, card)
        self.__name__ = Path(model.config._name_or_path or "process_reward_model").name
        self.unknown_tokens = unknown_tokens(self.tokenizer, vocabulary_size(model), self.__name__)
        self.position_limit = position_limit(model)
        model.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls, path: str, *, tokenizer: PreTrainedTokenizerBase | None = None, **kwargs: Any
    ) -> "ProcessRewardModelScorer":
        """Load a process reward model and its tokenizer from a directory or the Hub, and its card from a directory."""
        model, card = load_process_reward_model(path, **kwargs), ProcessRewardModelCard.load(path)
        scorer = cls(model, tokenizer or load_scorer_tokenizer(path), card)  # type: ignore[arg-type]
        scorer.__name__ = Path(path).name  # the configuration of an adapter's model names its base
        if card is None:
            logger.warning(
                f"{path} has no {CARD_FILE}, so its separators and its chat template cannot be checked. Each line of "
                "an answer is a step."
            )
        return scorer

    def identity(self) -> str:
        """Return the fingerprint of the path or model that became this scorer, and the reward of a step."""
        return self.reader.identity(fingerprint(self.model if self.source is None else self.source))

    def prepare(self, run: ScoringRun) -> None:
        """Take the limits of a run, and put the model on its devices."""
        self.batch_size, self.model = run.batch_size, run.prepare_frozen(self.model)

    def __call__(  # type: ignore[override]
        self, prompts: list[Prompt], completions: list[Prompt], completion_ids: Any = None, **kwargs: Any
    ) -> list[Steps | None]:
        """Return for each completion the ends of its steps and their rewards. There may be none.

        A completion has `None` if the model gives NaN for a step, or has no position for the end of a step.
        """
        return self.judged(self.rows(prompts, completions))

    def rows(self, prompts: list[Prompt], completions: list[Prompt]) -> list[StepRow]:
        """Return the tokens and steps of each completion with its prompt.

        Raises:
            ValueError: If the model has no embedding for a token.
        """
        return self._checked(self.reader.rows(prompts, completions))

    def judged(self, rows: list[StepRow]) -> list[Steps | None]:
        """Return the same as a call for the completions that `rows` returned."""
        return [self.reader.rewards(row, odds) for row, odds in zip(rows, self._log_odds(rows), strict=True)]

    def log_odds(self, prompts: list[Prompt], steps: list[list[str]]) -> list[Tensor]:
        """Return the log-odds that each step is right, one tensor per answer.

        Raises:
            ValueError: If the model has no embedding for a token.
        """
        return self._log_odds(self._checked([self.reader.row(*given) for given in zip(prompts, steps, strict=True)]))

    def _checked(self, rows: list[StepRow]) -> list[StepRow]:
        if self.unknown_tokens:
            size = vocabulary_size(self._classifier())
            check_tokens([row.token_ids for row in rows], self.unknown_tokens, size, self.__name__)
        return rows

    def _log_odds(self, rows: list[StepRow]) -> list[Tensor]:
        rows = [row.within(self.position_limit, self.tokenizer.bos_token_id) for row in rows]
        judged = [torch.empty(0)] * len(rows)
        for batch in cut_by_length(self._classifier(), [len(row) for row in rows], self.batch_size):
            of_tokens = self._forward([rows[row].token_ids for row in batch])
            for row, odds in zip(batch, of_tokens, strict=True):
                judged[row] = rows[row].at_ends(odds)
        return judged

    @torch.no_grad()
    def _forward(self, token_ids: list[list[int]]) -> Tensor:
        """Return the log-odds at each token, `(B, T)`."""
        batch = {name: x.to(self.model.device) for name, x in padded(token_ids, 0).items()}
        return log_odds_of(self.model(**batch, use_cache=False).logits).float().cpu()

    def prompt_lengths(self, prompts: list[Prompt]) -> list[int]:
        """Return the number of tokens that the model reads beside those of an answer in one step, one per prompt."""
        return self.reader.prompt_lengths(prompts)

    def _classifier(self) -> Any:
        """Return the model without DeepSpeed's engine and without PEFT around it."""
        return causal_lm(getattr(self.model, "module", self.model))


def as_process_scorer(
    model: str | PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase | None, **kwargs: Any
) -> ProcessRewardModelScorer | None:
    """Return a scorer for a path or a loaded model that judges steps; `None` for any other model.

    Raises:
        ValueError: If a loaded model has no tokenizer and no path to load one from.
    """
    if isinstance(model, str):
        if not is_process_reward_model(model, **kwargs):
            return None
        scorer = ProcessRewardModelScorer.from_pretrained(model, tokenizer=tokenizer, **kwargs)
    else:
        inner = causal_lm(model)
        if not type(inner).__name__.endswith("ForTokenClassification"):
            return None
        path = model.config._name_or_path
        if tokenizer is None and not path:
            raise ValueError(
                "The process reward model was not loaded from a path: pass its tokenizer in "
                "`reward_processing_classes`."
            )
        if inner is model:
            with_step_head(model)
        card = ProcessRewardModelCard.load(path) if path else None
        scorer = ProcessRewardModelScorer(model, tokenizer or load_scorer_tokenizer(path), card)  # type: ignore[arg-type]
    scorer.source = model
    return scorer
