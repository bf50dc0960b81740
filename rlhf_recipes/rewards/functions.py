"""Turn the reward models and functions that a user names into objects that TRL can call."""

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from itertools import count
from types import ModuleType
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import is_conversational

from rlhf_recipes.models.fingerprint import fingerprint
from rlhf_recipes.models.reward_model import with_score_head
from rlhf_recipes.options.paths import is_address, is_function, is_judge_file
from rlhf_recipes.rewards.card import RewardModelCard, heads_of
from rlhf_recipes.rewards.client import RemoteRewardModel
from rlhf_recipes.rewards.context import check_answered
from rlhf_recipes.rewards.language_model_judge import load_judge
from rlhf_recipes.rewards.pooled import PooledRewardModel
from rlhf_recipes.rewards.process import ProcessRewardModelScorer, as_process_scorer
from rlhf_recipes.rewards.protocol import scorer_of
from rlhf_recipes.rewards.scorer import RewardModelScorer, load_scorer_tokenizer
from rlhf_recipes.rewards.served import served_reward_model


def weighted_scores(rewards_per_func: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum of each completion's rewards, `(B,)`.

    A sum leaves out the functions that gave no reward (NaN). If no function gave one, the sum is NaN.

    Args:
        rewards_per_func: Rewards of F functions, `(B, F)`.
        weights: Weights of the functions, `(F,)`.
    """
    scores = (rewards_per_func * weights).nansum(dim=1)
    return scores.masked_fill(rewards_per_func.isnan().all(dim=1), torch.nan)


def score_statistics(functions: list[Any], weights: Tensor, rule: str = "mean") -> tuple[float, float] | None:
    """Return the expected mean and deviation of the scores, if there is one reward and its card has both numbers.

    A card with several heads has the numbers of their mean. Another rule gives scores of another level.

    Args:
        functions: Reward functions and scorers.
        weights: Their weights.
        rule: `reward_heads` of the run.
    """
    if len(functions) != 1:
        return None
    card, weight = scorer_of(functions[0]).card, weights[0].item()
    if card is None or card.score_mean is None or not card.score_std or (rule != "mean" and heads_of(card) > 1):
        return None
    return weight * card.score_mean, abs(weight) * card.score_std


def as_scorer(
    model: str | PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase | None = None, **kwargs: Any
) -> RewardModelScorer | ProcessRewardModelScorer | RemoteRewardModel | PooledRewardModel:
    """Return a scorer for a path, which is loaded with `kwargs`, for the address of a server, or for a loaded model.

    Raises:
        ValueError: If a loaded model has several outputs, or has no tokenizer and no path to load one from.
    """
    return served_reward_model(model) if is_address(model) else local_scorer(model, tokenizer, **kwargs)


def local_scorer(
    model: str | PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase | None = None, **kwargs: Any
) -> RewardModelScorer | ProcessRewardModelScorer:
    """Return a scorer whose model runs in this process. See `as_scorer`."""
    if (judge_of_steps := as_process_scorer(model, tokenizer, **kwargs)) is not None:
        return judge_of_steps
    if isinstance(model, str):
        scorer = RewardModelScorer.from_pretrained(model, tokenizer=tokenizer, **kwargs)
    else:
        path = model.config._name_or_path
        card = RewardModelCard.load(path) if path else None
        if model.config.num_labels != heads_of(card):
            raise ValueError(
                f"The reward model has {model.config.num_labels} labels; it must have `num_labels={heads_of(card)}`."
            )
        if tokenizer is None and not path:
            raise ValueError(
                "The reward model was not loaded from a path: pass its tokenizer in `reward_processing_classes`."
            )
        if isinstance(getattr(model, "score", None), nn.Linear):
            with_score_head(model)  # gives scores in float32 under autocast, like a model that was loaded here
        scorer = RewardModelScorer(model, tokenizer or load_scorer_tokenizer(path), card)
    scorer.source = model
    return scorer


def as_reward_functions(reward_funcs: Any, tokenizers: Any = None, **kwargs: Any) -> list[Any]:
    """Return functions that TRL can call: each reward model as a scorer (`as_scorer`), each function unchanged."""
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
    """Check that the card of every reward model fits the run.

    Raises:
        ValueError: If there is no reward, or if a reward model was trained on another kind of text or cannot read it.
    """
    if not functions:
        raise ValueError("There is no reward: set `reward_model_path`, `reward_adapter` or `reward_functions`.")
    for scorer in map(scorer_of, functions):
        if scorer.tokenizer is not None:
            check_answered(dataset, scorer.__name__, scorer.tokenizer)
        if scorer.card is not None:
            scorer.card.check(
                scorer.tokenizer,
                conversational=is_conversational(next(iter(dataset))),
                response_separator=response_separator,
            )


def check_used_once(reward_funcs: Any, reward_adapter: str | None) -> None:
    """Refuse a reward model that is given by its path and as the reward adapter: its score would count twice.

    Raises:
        ValueError: If there is one.
    """
    if reward_adapter is None:
        return
    for reward in reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]:
        if isinstance(reward, str) and fingerprint(reward) == fingerprint(reward_adapter):
            raise ValueError(
                f"`reward_model_path` {reward} and `reward_adapter` {reward_adapter} are the same reward model, whose "
                "score would count twice. Leave out `reward_model_path`."
            )


def distinct_names(names: Iterable[str]) -> list[str]:
    """Return the names of rewards with a number behind each one that was there before: `score`, `score_2`."""
    given: list[str] = []
    for name in names:
        numbered = (f"{name}_{number}" for number in count(2))
        given.append(name if name not in given else next(other for other in numbered if other not in given))
    return given


def import_function(reference: str, output_dir: str | None = None) -> Callable[..., list[float]]:
    """Import a function named `package.module:function`, from the environment or the working directory.

    Args:
        reference: Name of the function, or YAML file of a judge.
        output_dir: Directory for the answers of a judge.

    Raises:
        ValueError: If the reference has another form, or names nothing that can be called.
    """
    if is_judge_file(reference):
        return load_judge(reference, output_dir)
    if not is_function(reference):
        raise ValueError(f"A function is named as `package.module:function`, got {reference!r}.")
    module_name, _, name = reference.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    if importlib.util.find_spec(module_name.partition(".")[0]) is None:
        raise ValueError(f"There is no module {module_name!r} for the function {reference!r}, here or installed.")
    function = getattr(_import_module(module_name, reference), name, None)
    if not callable(function):
        raise ValueError(f"{module_name} has no function {name!r}.")
    return function


def _import_module(name: str, reference: str) -> ModuleType:
    """Import a module of the user. Other errors than these are faults of its code, and keep their traceback."""
    try:
        return importlib.import_module(name)
    except SyntaxError as error:
        reason = f"{error.msg} ({error.filename}, line {error.lineno})"
    except ImportError as error:
        calls = [call for call in traceback.extract_tb(error.__traceback__) if "importlib" not in call.filename]
        of_user = [f" ({call.filename}, line {call.lineno})" for call in calls if call.filename != __file__]
        reason = f"{error}{(of_user or [''])[-1]}"
    raise ValueError(f"The function {reference!r} cannot be imported: {reason}. Correct or install it.")
