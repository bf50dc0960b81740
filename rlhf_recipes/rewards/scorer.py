"""Score completions with a learned reward model.

The reward model reads text and never the policy's token ids, so it may have another tokenizer.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import apply_chat_template

from rlhf_recipes.models.fingerprint import fingerprint
from rlhf_recipes.models.reward_model import load_reward_model
from rlhf_recipes.models.safe_loading import safe_loading
from rlhf_recipes.rewards.card import CARD_FILE, RewardModelCard
from rlhf_recipes.rewards.client import finished_completions
from rlhf_recipes.rewards.protocol import Scorer, ScoringRun

logger = logging.getLogger(__name__)
Prompt = str | list[dict[str, Any]]


class RewardModelScorer(Scorer):
    """Score completions with a reward model, on text in the form that the model was trained on.

    The model reads plain text as `prompt + completion + EOS`, where the prompt ends with the separator. A completion
    that was cut off has no EOS. The model reads chats through its own chat template.

    Args:
        model: Sequence classifier with one output; `None` if a subclass attaches it later.
        tokenizer: Tokenizer of the reward model.
        card: Card of the reward model, if it has one.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    source: Any = None  # the path or the model that became this scorer
    batch_size: int = 8  # completions per forward pass
    policy_eos_token_ids: list[int] | None = None  # end a completion; without them, every completion has ended

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, card: RewardModelCard | None = None) -> None:
        self.model, self.tokenizer, self.card = model, tokenizer, card
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
        scorer.__name__ = Path(path).name  # the configuration of an adapter's model names its base
        if card is None:
            logger.warning(f"{path} has no {CARD_FILE}, so its separator and its chat template cannot be checked.")
        return scorer

    def identity(self) -> str:
        """Return the fingerprint of the path or model that became this scorer; without one, its name."""
        return fingerprint(self if self.source is None else self.source)

    def prepare(self, run: ScoringRun) -> None:
        """Take the limits of a run, and put the model on its devices."""
        self.batch_size, self.policy_eos_token_ids = run.batch_size, run.policy_eos_token_ids
        self.model = self._placed_model(run)

    def _placed_model(self, run: ScoringRun) -> Any:
        return run.prepare_frozen(self.model)

    def __call__(
        self,
        prompts: list[Prompt],
        completions: list[Prompt],
        completion_ids: list[list[int]] | None = None,
        **kwargs: Any,
    ) -> list[float]:
        """Return one score per completion."""
        finished = finished_completions(len(prompts), completion_ids, self.policy_eos_token_ids)
        return self.score_token_ids(self.token_ids(prompts, completions, finished))

    def token_ids(self, prompts: list[Prompt], completions: list[Prompt], finished: list[bool]) -> list[list[int]]:
        """Return the token ids that the model reads, one list per completion."""
        return [self._token_ids(*row) for row in zip(prompts, completions, finished, strict=True)]

    def score_token_ids(self, token_ids: list[list[int]]) -> list[float]:
        """Return the scores of the rows that `token_ids` returned."""
        # Rows of similar length share a batch, so it has little padding.
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
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]  # the template holds them

    @torch.no_grad()
    def _forward(self, token_ids: list[list[int]]) -> Tensor:
        batch = self.tokenizer.pad({"input_ids": token_ids}, padding_side="right", return_tensors="pt")
        return self._score(batch.to(self.model.device)).float().cpu()

    def _score(self, batch: Any) -> Tensor:
        return self.model(**batch).logits[:, 0]


def load_scorer_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load a reward model's tokenizer without running code that comes with it."""
    with safe_loading(path):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
