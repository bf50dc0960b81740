"""Check before a run that a reward model can read every prompt with the longest completion."""

import logging
from collections.abc import Iterable
from typing import Any

from datasets import Dataset

from rlhf_recipes.rewards.protocol import scorer_of

logger = logging.getLogger(__name__)


def check_context(
    functions: Iterable[Any], datasets: dict[str, Any], max_completion_length: int, reward_overflow: str
) -> None:
    """Check the prompts against the positions of each reward model whose architecture limits them.

    A completion has about as many tokens for the reward model as for the policy.

    Args:
        functions: Reward functions, scorers and judges.
        datasets: Data by the name of its argument. Streams, and data without prompts, are not checked.
        max_completion_length: Largest number of tokens of a completion.
        reward_overflow: `raise` to refuse long prompts, or `cut` to say how many the reward model cannot read whole.

    Raises:
        ValueError: If a prompt is too long, and it may not be cut.
    """
    scorers: list[Any] = [scorer_of(function) for function in functions]
    for scorer in scorers:
        limit = getattr(scorer, "position_limit", None)  # a scorer without our base class may lack it
        if limit is None:
            continue
        for name, dataset in datasets.items():
            if isinstance(dataset, Dataset) and "prompt" in dataset.column_names:
                lengths = scorer.prompt_lengths(list(dataset["prompt"]))
                _check_lengths(lengths, limit - max_completion_length, f"`{name}`", scorer, reward_overflow)


def _check_lengths(lengths: list[int], room: int, where: str, scorer: Any, reward_overflow: str) -> None:
    longest = max(lengths, default=0)
    if longest <= room:
        return
    too_long = (
        f"{sum(length > room for length in lengths)} of {len(lengths)} prompts of {where} (row "
        f"{lengths.index(longest)} has {longest} tokens) do not fit with `max_completion_length` into the "
        f"{scorer.position_limit} positions of the reward model {scorer.__name__}"
    )
    if reward_overflow == "raise":
        raise ValueError(
            f"{too_long}. Drop or shorten them, lower `max_completion_length`, or set `reward_overflow: cut` to let "
            "it read only the last tokens of prompt and completion."
        )
    logger.warning(f"{too_long}, so it reads only the last tokens of prompt and completion (`reward_overflow: cut`).")
