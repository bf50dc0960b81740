"""Check before a run that a reward model can read every prompt, together with the longest completion."""

import logging
from collections.abc import Iterable
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rlhf_recipes.data.messages import answer_to
from rlhf_recipes.data.prompts import AnyDataset, rows_of
from rlhf_recipes.data.rendering import answered_ids
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


def check_answered(dataset: AnyDataset, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the tokenizer of a reward model renders every kind of prompt with an answer.

    Args:
        dataset: Dataset with prompts. Of a stream, only the first row is checked.
        name: Name of the reward model, for the message.
        tokenizer: Its tokenizer.

    Raises:
        ValueError: If it has no EOS for text or no template for messages, or if its template refuses a row.
    """
    seen: set[Any] = set()
    for row, (prompt,) in enumerate(rows_of(dataset, ("prompt",))):
        shape = isinstance(prompt, str) or tuple(message["role"] for message in prompt)
        if shape in seen:
            continue
        seen.add(shape)
        lacks = tokenizer.eos_token if shape is True else tokenizer.chat_template
        if lacks is None:
            token = "EOS token" if shape is True else "chat template"
            raise ValueError(
                f"The tokenizer of the reward model {name} has no {token}, which the prompt in row {row} needs. Save "
                "one beside the model."
            )
        try:
            answered_ids(tokenizer, prompt, answer_to(prompt, "a"), finished=True)
        except Exception as error:  # a template may raise anything
            raise ValueError(f"The chat template of the reward model {name} refuses row {row}: {error}") from error
