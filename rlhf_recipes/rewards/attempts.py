"""Check the answer of a reward function, decide whether to call it again, and describe its errors."""

import math
import traceback
from collections.abc import Callable, Set
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential
from torch import Tensor

from rlhf_recipes.console import visible
from rlhf_recipes.options.reward_calls import LONGEST_PAUSE_SECONDS
from rlhf_recipes.options.secrets import redact

PACKAGE = Path(__file__).parents[1]
LARGEST_REWARD = torch.finfo(torch.float32).max


class RewardCallError(RuntimeError):
    """Report that the last attempt to call a reward function or a judge failed."""


class PermanentRewardError(ValueError):
    """Report that the same call would fail again. A reward function that raises this is not called again."""


def checked_number(reward: Any, row: int) -> float:
    """Return a reward as a float, NaN for `None`.

    Raises:
        TypeError: If it is something else than a number or `None`.
        ValueError: If it is infinite in float32.
    """
    value = reward.item() if isinstance(reward, Tensor) and reward.numel() == 1 else reward
    if value is None:
        return math.nan
    if not isinstance(value, Real):
        raise TypeError(f"it returned {short(value)} for completion {row}, not a number or `None`")
    try:
        number = float(value)
    except OverflowError:  # of a long integer
        number = math.inf
    if abs(number) > LARGEST_REWARD:
        raise ValueError(f"it returned {short(value)} for completion {row}")
    return number


def checked_rewards(rewards: Any, count: int, read: Callable[[Any, int], float] = checked_number) -> list[float]:
    """Return rewards as floats, with NaN for `None`.

    Args:
        rewards: Answer of a function: numbers in the order of the completions, a tensor or an array, `(B,)`.
        count: Number of completions, B.
        read: Function that reads and checks the reward of a row.

    Raises:
        TypeError: If the answer has no order or has keys, or holds something else than numbers and `None`.
        ValueError: If there are more or fewer rewards than completions, or if one is infinite in float32.
    """
    if hasattr(rewards, "tolist"):
        rewards = rewards.tolist()
    if not hasattr(rewards, "__iter__") or hasattr(rewards, "keys") or isinstance(rewards, Set | bytes):
        raise TypeError(f"it returned {short(rewards)} instead of a list of {count} rewards")
    rewards = list(rewards)
    if len(rewards) != count:
        raise ValueError(f"it returned {len(rewards)} rewards for {count} completions")
    return [read(reward, row) for row, reward in enumerate(rewards)]


def short(value: Any) -> str:
    """Return a value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def retrying(retries: int, describe: Callable[[RetryCallState], None]) -> Retrying:
    """Return an object that repeats a call after 1, 2, 4, .. seconds, unless the call would fail in the same way.

    Args:
        retries: Attempts after the first.
        describe: Function that is called before each pause.
    """
    return Retrying(
        stop=stop_after_attempt(1 + retries),
        wait=wait_exponential(max=LONGEST_PAUSE_SECONDS),
        retry=retry_if_exception(_may_pass),
        before_sleep=describe,
        reraise=True,
    )


def _may_pass(error: BaseException) -> bool:
    """Return whether another attempt may succeed. It cannot after a mistake in the program or a request to exit."""
    program = (PermanentRewardError, NameError, ImportError, SyntaxError, NotImplementedError)
    return isinstance(error, Exception) and not isinstance(error, program)


def describe_error(error: BaseException) -> str:
    """Return an error in one line, with the line that raised it if that is outside of this library."""
    text = visible(redact(f"{type(error).__name__}: {error}"))  # the text may be that of a server
    frame = next(iter(traceback.extract_tb(error.__traceback__)[::-1]), None)
    if frame is not None and not Path(frame.filename).is_relative_to(PACKAGE):
        text += f" ({Path(frame.filename).name}, line {frame.lineno})"
    if "main thread" in str(error):
        text += "; `reward_timeout: null` calls the function in the main thread, without a limit"
    return text
