"""Score completions with a learned reward model.

The reward model reads text, never the policy's token ids, so it may have another tokenizer.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import apply_chat_template

from rlhf_recipes.models.reward_model import load_reward_model
from rlhf_recipes.models.safe_loading import safe_loading
from rlhf_recipes.rewards.card import CARD_FILE, RewardModelCard
from rlhf_recipes.rewards.client import finished_completions

logger = logging.getLogger(__name__)
Prompt = str | list[dict[str, Any]]


class RewardModelScorer:
    """Score completions with a reward model, on exactly the text that it was trained on.

    Plain text is `prompt + completion + EOS` (the prompt ends with the separator), as in reward modelling; the EOS is
    left out of a completion that was cut off. Chat goes through the reward model's own chat template.

    Args:
        model: Sequence classifier with one output; `None` where a subclass attaches it later.
        tokenizer: The reward model's.
        card: What the reward model was trained with, if known.
        batch_size: Completions per forward.
        policy_eos_token_ids: Ids that end a completion of the policy; `None` takes every completion as finished.
    """

    runs_in_process = True  # with collectives under ZeRO-3: `RewardCalls` leaves it alone

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        card: RewardModelCard | None = None,
        batch_size: int = 8,
        policy_eos_token_ids: list[int] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.card = model, tokenizer, card
        self.batch_size, self.policy_eos_token_ids = batch_size, policy_eos_token_ids
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if model is not None:
            model.eval().requires_grad_(False)
            model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
            self.__name__ = Path(model.config._name_or_path or "reward_model").name

    @classmethod
    def from_pretrained(cls, path: str, **kwargs: Any) -> "RewardModelScorer":
        """Load a reward model and its tokenizer from a directory or the Hub, and its card from a directory."""
        tokenizer, card = load_scorer_tokenizer(path), RewardModelCard.load(path)
        scorer = cls(load_reward_model(path, **kwargs), tokenizer, card)
        scorer.__name__ = Path(path).name  # an adapter's model bears the name of its base
        if card is None:
            logger.warning(
                f"{path} has no {CARD_FILE}: whether its separator and template are this run's cannot be checked."
            )
        return scorer

    def __call__(
        self,
        prompts: list[Prompt],
        completions: list[Prompt],
        completion_ids: list[list[int]] | None = None,
        **kwargs: Any,
    ) -> list[float]:
        """Return one score per completion. Signature of TRL's reward functions."""
        finished = finished_completions(len(prompts), completion_ids, self.policy_eos_token_ids)
        return self.score_token_ids(self.token_ids(prompts, completions, finished))

    def token_ids(self, prompts: list[Prompt], completions: list[Prompt], finished: list[bool]) -> list[list[int]]:
        """Return what the model reads, for each completion."""
        return [self._token_ids(*row) for row in zip(prompts, completions, finished, strict=True)]

    def score_token_ids(self, token_ids: list[list[int]]) -> list[float]:
        """Return the scores of what `token_ids` has returned."""
        # Sorted by length: a batch is then padded little.
        order = sorted(range(len(token_ids)), key=lambda row: len(token_ids[row]))
        scores = torch.empty(len(token_ids))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            scores[rows] = self._forward([token_ids[row] for row in rows])
        return scores.tolist()

    def _token_ids(self, prompt: Prompt, completion: Prompt, finished: bool) -> list[int]:
        if isinstance(prompt, str) and isinstance(completion, str):
            text = prompt + completion + (self.tokenizer.eos_token if finished else "")
            return self.tokenizer(text)["input_ids"]
        text = apply_chat_template({"messages": [*prompt, *completion]}, self.tokenizer)["text"]
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has written them

    @torch.no_grad()
    def _forward(self, token_ids: list[list[int]]) -> Tensor:
        batch = self.tokenizer.pad({"input_ids": token_ids}, padding_side="right", return_tensors="pt")
        return self._score(batch.to(self.model.device)).float().cpu()

    def _score(self, batch: Any) -> Tensor:
        return self.model(**batch).logits[:, 0]


def load_scorer_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load a reward model's tokenizer, which brings no code."""
    with safe_loading(path):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
