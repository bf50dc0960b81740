"""Score completions with a learned reward model.

The reward model reads text and never the policy's token ids, so it may have another tokenizer.
"""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf_recipes.algorithm.heads import centred, combine_heads
from rlhf_recipes.data.messages import answer_to
from rlhf_recipes.data.rendering import answered_ids, appended_end, prompt_ids
from rlhf_recipes.models.critic import causal_lm
from rlhf_recipes.models.fingerprint import fingerprint, is_adapter
from rlhf_recipes.models.loading import position_limit
from rlhf_recipes.models.reward_model import check_score_layer, load_reward_model
from rlhf_recipes.models.rope import cut_by_length
from rlhf_recipes.models.safe_loading import safe_loading
from rlhf_recipes.models.vocabulary import with_end_token
from rlhf_recipes.rewards.alone import row_scores, scores_alone
from rlhf_recipes.rewards.card import CARD_FILE, RewardModelCard, heads_of
from rlhf_recipes.rewards.heads import combined
from rlhf_recipes.rewards.protocol import Scorer, ScoringRun
from rlhf_recipes.rewards.reading import (
    adapter_pad_id,
    check_tokens,
    cut_front,
    padded,
    trained_pad_id,
    unknown_tokens,
    vocabulary_size,
)
from rlhf_recipes.rewards.transport import finished_completions

logger = logging.getLogger(__name__)
Prompt = str | list[dict[str, Any]]
MAX_GAP = 16  # tokens that a chat template may write between prompt and answer, for example an empty chain of thought


class RewardModelScorer(Scorer):
    """Score completions with a reward model, on text in the form that the model was trained on.

    The model reads plain text as `prompt + completion + EOS`, where the prompt ends with the separator. A completion
    that was cut off has no EOS. The model reads chats through its own chat template. Its score is read at the last
    token that is not its padding token (`rewards/reading.py`).

    Args:
        model: Sequence classifier with one output per score head; `None` if a subclass attaches it later.
        tokenizer: Tokenizer of the reward model.
        card: Card of the reward model, if it has one.

    Raises:
        ValueError: If the model has no `score` layer or no embedding for EOS, or if nothing says at which token its
            score is read.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    gives_states = gives_log_odds = True
    source: Any = None  # the path or the model that became this scorer
    batch_size: int = 8  # completions per forward pass of equal rows; more of the short ones share one
    pad_token_id: int | None = None  # the score is read at the last token that is not this
    policy_eos_token_ids: list[int] | None = None  # end a completion; without them, every completion has ended
    take_states: Callable[[list[Tensor]], None] | None = None  # gets the hidden states of every call, if there is one
    combine: Callable[[Tensor], Tensor] = staticmethod(combine_heads)  # `(B, K)` of several heads to `(B,)`

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, card: RewardModelCard | None = None) -> None:
        self.model, self.tokenizer, self.card = model, tokenizer, card
        if model is not None:
            self.tokenizer = tokenizer = with_end_token(tokenizer, model)
            check_score_layer(model)
            self.__name__ = Path(model.config._name_or_path or "reward_model").name
            self.unknown_tokens = unknown_tokens(tokenizer, vocabulary_size(model), self.__name__)
            self.pad_token_id, self.position_limit = trained_pad_id(model, tokenizer, card), position_limit(model)
            model.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls, path: str, *, tokenizer: PreTrainedTokenizerBase | None = None, **kwargs: Any
    ) -> "RewardModelScorer":
        """Load a reward model and its tokenizer from a directory or the Hub, and its card from a directory."""
        card = RewardModelCard.load(path)
        model = load_reward_model(path, heads=heads_of(card), **kwargs)
        tokenizer = load_scorer_tokenizer(path) if tokenizer is None else tokenizer
        if is_adapter(path):  # the configuration is its base's, which no score head was trained with
            model.config.get_text_config().pad_token_id = adapter_pad_id(model.config, tokenizer, card, path)
        scorer = cls(model, tokenizer, card)
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
        self.combine = run.combine
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
        """Return one score per completion, and give the hidden states around its tokens to `take_states`."""
        finished = finished_completions(len(prompts), completion_ids, self.policy_eos_token_ids)
        token_ids, kept = self.token_ids(prompts, completions, finished), []
        if self.take_states is not None and completion_ids is not None:
            rows = zip(token_ids, completion_ids, prompts, strict=True)
            kept = [state_positions(read, sampled, self._prompt_ids(prompt)) for read, sampled, prompt in rows]
        scores, states = self._score_rows(token_ids, kept)
        if self.take_states is not None and completion_ids is not None:
            self.take_states(states)
        return combined(scores, self.combine, self.__name__, self.card, kwargs.get("log_metric"))

    def score_with_states(self, prompts: list[Prompt], completions: list[Prompt]) -> tuple[list[float], list[Tensor]]:
        """Return the scores of finished completions, and the hidden states around the tokens of each, `(t + 1, H)`."""
        token_ids = self.token_ids(prompts, completions, [True] * len(prompts))
        starts = [shared_length(read, self._prompt_ids(x)) for read, x in zip(token_ids, prompts, strict=True)]
        kept = [list(range(max(start, 1) - 1, len(read))) for start, read in zip(starts, token_ids, strict=True)]
        scores, states = self._score_rows(token_ids, kept)
        return self.combine(scores).tolist(), states

    def token_ids(self, prompts: list[Prompt], completions: list[Prompt], finished: list[bool]) -> list[list[int]]:
        """Return the token ids that the model reads, one list per completion.

        Raises:
            ValueError: If the model has no embedding for one of them.
        """
        end = len(appended_end(self.tokenizer))
        given = zip(prompts, completions, finished, strict=True)
        rows = [answered_ids(self.tokenizer, *row, appended=end) for row in given]
        if self.unknown_tokens:
            check_tokens(rows, self.unknown_tokens, vocabulary_size(self._classifier()), self.__name__)
        return rows

    def scores_alone(self, prompts: list[Prompt], completions: list[Prompt]) -> tuple[list[float], list[float]] | None:
        """Return the scores of finished completions, and those of plain transformers, row by row.

        A reward model that was given by its path is loaded a second time, if it is small.
        """
        token_ids = self.token_ids(prompts, completions, [True] * len(prompts))
        if self.position_limit is not None:
            token_ids = [row for row in token_ids if len(row) <= self.position_limit]
        if not token_ids:
            return None
        if isinstance(self.source, str):
            pad, heads = self.pad_token_id, heads_of(self.card)
            alone = scores_alone(self.source, token_ids, pad_token_id=pad, heads=heads, like=self.model)
        else:
            alone = row_scores(self.model, token_ids)
        return (
            None if alone is None else (self.score_token_ids(token_ids), self.combine(self._centred(alone)).tolist())
        )

    def prompt_lengths(self, prompts: list[Prompt]) -> list[int]:
        """Return the number of tokens that the model reads beside those of an answer, one per prompt."""
        answers = [answer_to(prompt, "a") for prompt in prompts]
        return [len(row) - 1 for row in self.token_ids(prompts, answers, [False] * len(prompts))]

    def score_token_ids(self, token_ids: list[list[int]]) -> list[float]:
        """Return the scores of the rows that `token_ids` returned."""
        return self.combine(self.head_scores(token_ids)).tolist()

    def head_scores(self, token_ids: list[list[int]]) -> Tensor:
        """Return the scores of the same rows by each head from a common origin, `(B, K)`."""
        return self._score_rows(token_ids, [])[0]

    def _score_rows(self, token_ids: list[list[int]], kept: list[list[int]]) -> tuple[Tensor, list[Tensor]]:
        """Return the scores of rows by each head from a common origin, `(B, K)`, and hidden states of each row.

        Args:
            token_ids: Rows.
            kept: Positions in each row whose last hidden states are returned, `(.., H)`; nothing for none.
        """
        token_ids, kept = self._within_limit(token_ids, kept)
        scores, states = torch.empty(len(token_ids), heads_of(self.card)), [torch.empty(0)] * len(kept)
        outputs: list[Any] = []
        hook = self._backbone().register_forward_hook(lambda *call: outputs.append(call[2])) if kept else None
        try:
            size = 1 if self._filler is None else self.batch_size
            for rows in cut_by_length(self._classifier(), [len(row) for row in token_ids], size):
                scores[rows] = self._forward([token_ids[row] for row in rows])
                for output in outputs:
                    for row, of_row in zip(rows, output.last_hidden_state, strict=True):
                        states[row] = of_row[kept[row]]
                outputs.clear()
        finally:
            if hook is not None:
                hook.remove()
        return self._centred(scores), states

    def _centred(self, scores: Tensor) -> Tensor:
        means = None if self.card is None else self.card.head_means
        return scores if means is None else centred(scores, torch.tensor(means))

    def _within_limit(
        self, token_ids: list[list[int]], kept: list[list[int]]
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Return rows without the beginning that the model has no positions for, and the positions in them."""
        limit = self.position_limit
        if limit is None or max(map(len, token_ids), default=0) <= limit:
            return token_ids, kept
        _say_cut(self.__name__, limit)
        cuts = [max(len(row) - limit, 0) for row in token_ids]
        shifted = [[max(place - cut, 0) for place in row] for row, cut in zip(kept, cuts, strict=bool(kept))]
        return [cut_front(row, limit, self.tokenizer.bos_token_id) for row in token_ids], shifted

    @property
    def _filler(self) -> int | None:
        """Return the token that fills a batch: the one that the head skips. Without one, a batch has one row."""
        known = self.pad_token_id is not None and 0 <= self.pad_token_id < vocabulary_size(self._classifier())
        return self.pad_token_id if known else None

    @property
    def hidden_size(self) -> int:
        """Return the width of the hidden states, H."""
        return int(self._classifier().config.get_text_config().hidden_size)

    def _without_cache(self) -> dict[str, bool]:
        """Return the input that keeps a model from storing keys and values of all layers. Some encoders take none."""
        stores = getattr(self._classifier().config.get_text_config(), "use_cache", False)
        return {"use_cache": False} if stores else {}

    def _classifier(self) -> Any:
        """Return the model without DeepSpeed's engine and without PEFT around it."""
        return causal_lm(getattr(self.model, "module", self.model))

    def _backbone(self) -> Any:
        return self._classifier().base_model

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        return prompt_ids(self.tokenizer, [prompt])[0]

    @torch.no_grad()
    def _forward(self, token_ids: list[list[int]]) -> Tensor:
        batch = padded(token_ids, self._filler or 0)
        return self._score({name: x.to(self.model.device) for name, x in batch.items()}, token_ids).float().cpu()

    def _score(self, batch: dict[str, Tensor], token_ids: list[list[int]]) -> Tensor:
        logits: Tensor = self.model(**batch, **self._without_cache()).logits
        if logits.shape != (len(token_ids), heads_of(self.card)):
            raise ValueError(
                f"The reward model {self.__name__} gives numbers of shape {tuple(logits.shape)} for {len(token_ids)} "
                "completions, not one score each. Write a reward function that calls it."
            )
        return logits


def state_positions(read: list[int], sampled: list[int], prompt: list[int]) -> list[int]:
    """Return where the reward model has read all before each sampled token, and all of the last one.

    The reward model reads text, so its tokens can differ from the sampled ones. A chat template can write something
    between prompt and answer, and other tokens can spell the same answer. The prompt ends where the two texts differ
    first. The answer begins where the longest part of it is found, at most `MAX_GAP` tokens later. From the first
    difference on, the position stays at the last token that both share: a value must not know the tokens to come.

    Args:
        read: Tokens that the reward model reads.
        sampled: Tokens of the completion, T of them.
        prompt: Tokens of the prompt.

    Returns:
        T + 1 positions in `read`.
    """
    end = max(shared_length(read, prompt), 1)
    start = max(range(end, end + MAX_GAP + 1), key=lambda place: (shared_length(read[place:], sampled), -place))
    shared = shared_length(read[start:], sampled)
    return [(start if shared else end) - 1 + min(t, shared) for t in range(len(sampled) + 1)]


def shared_length(first: list[int], second: list[int]) -> int:
    """Return the number of equal elements at the start of two lists."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (ours, theirs) in pairs if ours != theirs), min(len(first), len(second)))


@functools.cache
def _say_cut(name: str, limit: int) -> None:
    logger.warning(
        f"A prompt and its completion have more tokens than the {limit} that the reward model {name} can read. It "
        "reads the last ones, so the beginning of the prompt is left out. This is said once."
    )


def load_scorer_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load a reward model's tokenizer without running code that comes with it."""
    with safe_loading(path):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
