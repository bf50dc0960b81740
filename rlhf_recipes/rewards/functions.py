"""Reward functions: a learned reward model in the form that TRL calls.

The reward model reads text, never the policy's token ids, so it may have another tokenizer.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import is_conversational

from rlhf_recipes.models.reward_model import with_score_head
from rlhf_recipes.rewards.card import RewardModelCard
from rlhf_recipes.rewards.client import RemoteRewardModel, is_address
from rlhf_recipes.rewards.scorer import RewardModelScorer, load_scorer_tokenizer


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
