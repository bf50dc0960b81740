"""One attempt to call a reward function: what it may return, which errors pass, and how they are named."""

import math
import traceback
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential
from torch import Tensor

from rlhf_recipes.options.reward_calls import LONGEST_PAUSE_SECONDS

PACKAGE = Path(__file__).parents[1]
LARGEST_REWARD = torch.finfo(torch.float32).max


class RewardCallError(RuntimeError):
    """A reward function or a judge has failed for good."""


class PermanentRewardError(ValueError):
    """Raised by a reward function: the same call would fail again, so that it is not tried again."""


def checked_rewards(rewards: Any, count: int) -> list[float]:
    """Return rewards as floats, NaN where a function has nothing to say (`None` or NaN).

    Args:
        rewards: What a function has returned: an iterable of numbers, a tensor or an array, `(B,)`.
        count: B.

    Raises:
        TypeError: If something is not a number.
        ValueError: If there are more or fewer than `count`, or one is infinite, also in float32.
    """
    if hasattr(rewards, "tolist"):
        rewards = rewards.tolist()
    if not hasattr(rewards, "__iter__"):
        raise TypeError(f"it returned {_short(rewards)} instead of a list of {count} rewards")
    rewards = list(rewards)
    if len(rewards) != count:
        raise ValueError(f"it returned {len(rewards)} rewards for {count} completions")
    return [_checked(reward, row) for row, reward in enumerate(rewards)]


def _checked(reward: Any, row: int) -> float:
    value = reward.item() if isinstance(reward, Tensor) and reward.numel() == 1 else reward
    if value is None:
        return math.nan
    if not isinstance(value, Real):
        raise TypeError(f"it returned {_short(value)} for completion {row}, not a number or `None`")
    if abs(float(value)) > LARGEST_REWARD:
        raise ValueError(f"it returned {value} for completion {row}")
    return float(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def retrying(retries: int, describe: Callable[[RetryCallState], None]) -> Retrying:
    """Return what tries a call again, after 1, 2, 4, .. seconds, unless it would fail in the same way.

    Args:
        retries: Further attempts.
        describe: Called before each pause.
    """
    return Retrying(
        stop=stop_after_attempt(1 + retries),
        wait=wait_exponential(max=LONGEST_PAUSE_SECONDS),
        retry=retry_if_exception(_may_pass),
        before_sleep=describe,
        reraise=True,
    )


def _may_pass(error: BaseException) -> bool:
    """Whether another attempt may succeed: not after a mistake in the program, nor after what is meant to end it."""
    program = (PermanentRewardError, NameError, ImportError, SyntaxError, NotImplementedError)
    return isinstance(error, Exception) and not isinstance(error, program)


def describe_error(error: BaseException) -> str:
    """Return an error in one line, with the line of other people's code that has raised it."""
    text = f"{type(error).__name__}: {error}"
    frame = next(iter(traceback.extract_tb(error.__traceback__)[::-1]), None)
    if frame is not None and not Path(frame.filename).is_relative_to(PACKAGE):
        text += f" ({Path(frame.filename).name}, line {frame.lineno})"
    if "main thread" in str(error):
        text += "; `reward_timeout: null` calls the function in the main thread, without a limit"
    return text
