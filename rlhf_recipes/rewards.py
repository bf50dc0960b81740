"""Reward functions: a learned reward model in the form that TRL calls.

Layer L2. The reward model reads text, never the policy's token ids, so it may have another tokenizer.
"""

import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import apply_chat_template, is_conversational

from rlhf_recipes.arguments import JudgeArguments
from rlhf_recipes.data import require_path
from rlhf_recipes.remote_reward import RemoteRewardModel, finished_completions, is_address
from rlhf_recipes.reward_card import CARD_FILE, RewardModelCard
from rlhf_recipes.reward_model import load_reward_model, with_score_head
from rlhf_recipes.safe_loading import safe_loading

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


def weighted_scores(rewards_per_func: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum of each completion's rewards, `(B,)`.

    A function that had nothing to say (NaN) is left out; if none had, the completion is unscorable: NaN.

    Args:
        rewards_per_func: `(B, F)`.
        weights: `(F,)`.
    """
    scores = (rewards_per_func * weights).nansum(dim=1)
    return scores.masked_fill(rewards_per_func.isnan().all(dim=1), torch.nan)


def score_statistics(functions: list[Any], weights: Tensor) -> tuple[float, float] | None:
    """Return mean and deviation of the scores to come, if one reward model is all the reward and its card has them."""
    if len(functions) != 1 or not isinstance(functions[0], RewardModelScorer | RemoteRewardModel):
        return None
    card, weight = functions[0].card, weights[0].item()
    if card is None or card.score_mean is None or not card.score_std:
        return None
    return weight * card.score_mean, abs(weight) * card.score_std


def as_scorer(
    model: str | PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase | None = None, **kwargs: Any
) -> RewardModelScorer | RemoteRewardModel:
    """Return a scorer for a reward model given as a path, loaded with `kwargs`, as an address, or as an instance.

    Raises:
        ValueError: If the instance has several outputs, or neither a tokenizer nor a path to load one from.
    """
    if is_address(model):
        return RemoteRewardModel(model)
    if isinstance(model, str):
        scorer = RewardModelScorer.from_pretrained(model, **kwargs)
    else:
        path = model.config._name_or_path
        if model.config.num_labels != 1:
            raise ValueError(f"The reward model has {model.config.num_labels} labels; it must have `num_labels=1`.")
        if tokenizer is None and not path:
            raise ValueError(
                "The reward model was not loaded from a path: pass its tokenizer in `reward_processing_classes`."
            )
        if isinstance(getattr(model, "score", None), nn.Linear):
            with_score_head(model)  # scores in float32 under autocast, as of a model that was loaded here
        card = RewardModelCard.load(path) if path else None
        scorer = RewardModelScorer(model, tokenizer or load_scorer_tokenizer(path), card)
    if tokenizer is not None:
        scorer.tokenizer = tokenizer
    return scorer


def as_reward_functions(reward_funcs: Any, tokenizers: Any = None, **kwargs: Any) -> list[Any]:
    """Turn paths, loaded with `kwargs`, addresses and classifiers into scorers; leave functions as they are."""
    if reward_funcs is None:
        return []
    reward_funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
    tokenizers = tokenizers if isinstance(tokenizers, list) else [tokenizers] * len(reward_funcs)
    return [
        as_scorer(function, tokenizer, **kwargs)
        if isinstance(function, str | PreTrainedModel | PeftModel)
        else function
        for function, tokenizer in zip(reward_funcs, tokenizers, strict=True)
    ]


def check_reward_functions(functions: list[Any], *, dataset: Any, response_separator: str) -> None:
    """Check every reward model's card against the run.

    Raises:
        ValueError: If there is no reward, or a reward model was trained on other text than the run has.
    """
    if not functions:
        raise ValueError("There is no reward: set `reward_model_path`, `reward_adapter` or `reward_functions`.")
    for function in functions:
        if isinstance(function, RewardModelScorer | RemoteRewardModel) and function.card is not None:
            function.card.check(
                function.tokenizer,
                conversational=is_conversational(next(iter(dataset))),
                response_separator=response_separator,
            )


def load_judges(
    judge_args: JudgeArguments,
    dataset: Any,
    *,
    reward_model_path: str | None = None,
    policy_eos_token_ids: list[int] | None = None,
    response_separator: str,
    **kwargs: Any,
) -> tuple[dict[str, Callable[..., Any]], dict[str, Callable[..., Any]]]:
    """Return the judges that score one answer at a time, and those that see both, by name.

    Args:
        judge_args: Which.
        dataset: Held-out prompts.
        reward_model_path: One more, named `reward_model`.
        policy_eos_token_ids: As of `RewardModelScorer`; a trainer sets them itself.
        response_separator: Of the run.
        kwargs: Passed on to `from_pretrained`.

    Raises:
        ValueError: If a reward model was trained on other text than the run has, or a function cannot be imported.
    """
    judges = [as_scorer(require_path("judge_models", path), **kwargs) for path in judge_args.judge_models]
    scorers = {judge.__name__: judge for judge in judges}
    if len(scorers) < len(judges):  # the name of a served one is known only now
        raise ValueError(f"`judge_models` must have different names, got {', '.join(j.__name__ for j in judges)}.")
    if reward_model_path is not None:
        scorers["reward_model"] = as_scorer(reward_model_path, **kwargs)
    for scorer in scorers.values():
        check_reward_functions([scorer], dataset=dataset, response_separator=response_separator)
        scorer.policy_eos_token_ids = policy_eos_token_ids
    functions, pairwise = (
        {reference.split(":")[-1]: import_function(reference) for reference in references}
        for references in (judge_args.judge_functions, judge_args.pairwise_judges)
    )
    return scorers | functions, pairwise


def import_function(reference: str) -> Callable[..., list[float]]:
    """Import a reward function or judge given as `package.module:function`, also from the working directory.

    Raises:
        ValueError: If the reference has another form or does not name a callable.
    """
    module_name, _, name = reference.partition(":")
    if not module_name or not name:
        raise ValueError(f"A function is named as `package.module:function`, got {reference!r}.")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    if importlib.util.find_spec(module_name.partition(".")[0]) is None:
        raise ValueError(f"There is no module {module_name!r} for the function {reference!r}, here or installed.")
    function = getattr(importlib.import_module(module_name), name, None)
    if not callable(function):
        raise ValueError(f"{module_name} has no function {name!r}.")
    return function
