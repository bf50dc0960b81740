"""Check before a run that a reward model can read every prompt, together with the longest completion."""

import logging
from collections.abc import Iterable
from typing import Any

from datasets import Dataset

from rlhf_recipes.rewards.protocol import scorer_of

logger = logging.getLogger(__name__)


def check_context(
    functions: Iterable[Any], datasets: dict[str, Any], max_completion_length: int, reward_overflow: str
) -> None:
    """Check the prompts against the vocabulary and the positions of each reward model that limits them.

    A completion has about as many tokens for the reward model as for the policy.

    Args:
        functions: Reward functions, scorers and judges.
        datasets: Data by the name of its argument. Streams, and data without prompts, are not checked.
        max_completion_length: Largest number of tokens of a completion.
        reward_overflow: `raise` to refuse long prompts, or `cut` to say how many the reward model cannot read whole.

    Raises:
        ValueError: If a prompt has a token that a reward model does not know, or is too long and may not be cut.
    """
    scorers: list[Any] = [scorer_of(function) for function in functions]
    for scorer in scorers:
        limit = getattr(scorer, "position_limit", None)  # a scorer without our base class may lack it
        if limit is None and not getattr(scorer, "unknown_tokens", None):
            continue
        for name, dataset in datasets.items():
            if isinstance(dataset, Dataset) and "prompt" in dataset.column_names:
                lengths = _prompt_lengths(scorer, dataset, name)
                room = max(lengths, default=0) if limit is None else limit - max_completion_length
                _check_lengths(lengths, room, name, scorer, reward_overflow)


def _prompt_lengths(scorer: Any, dataset: Dataset, name: str) -> list[int]:
    try:
        return list(scorer.prompt_lengths(list(dataset["prompt"])))
    except ValueError as error:
        raise ValueError(f"`{name}` does not suit the reward model {scorer.__name__}. {error}") from error


def _check_lengths(lengths: list[int], room: int, name: str, scorer: Any, reward_overflow: str) -> None:
    longest = max(lengths, default=0)
    if longest <= room:
        return
    too_long = (
        f"{sum(length > room for length in lengths)} of {len(lengths)} prompts of `{name}` (row "
        f"{lengths.index(longest)} has {longest} tokens) do not fit with `max_completion_length` into the "
        f"{scorer.position_limit} positions of the reward model {scorer.__name__}"
    )
    if reward_overflow == "raise":
        raise ValueError(
            f"{too_long}. Drop or shorten them, lower `max_completion_length`, or set `reward_overflow: cut` to let "
            "it read only the last tokens of prompt and completion."
        )
    logger.warning(f"{too_long}, so it reads only the last tokens of prompt and completion (`reward_overflow: cut`).")
