"""Calls of reward functions and judges, which are other people's code and services: they raise, hang and answer oddly.

A call has a time limit, is tried again after growing pauses, and what comes back is checked. What fails for
good ends the run, on every rank with the same message, or leaves the completions of that call without a score.
"""

import asyncio
import functools
import logging
import math
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

from accelerate import PartialState
from accelerate.utils import gather_object
from tenacity import RetryCallState
from torch import Tensor, nn
from trl.trainer.utils import get_callable_name, is_async_callable, start_event_loop_in_daemon

from rlhf_recipes.rewards.attempts import RewardCallError, checked_rewards, describe_error, retrying
from rlhf_recipes.rewards.threads import DaemonPool

MAX_FAILURES_IN_A_ROW = 5
logger = logging.getLogger(__name__)
event_loop = functools.cache(lambda: start_event_loop_in_daemon("reward-functions")[1])


@dataclass
class Failure:
    """A call that was given up."""

    name: str
    reason: str
    attempts: int
    completions: int
    process: int | None = None  # if there are several

    def __str__(self) -> str:
        times = "at the first attempt" if self.attempts == 1 else f"{self.attempts} times"
        where = "" if self.process is None else f" on process {self.process}"
        return f"`{self.name}` failed {times}{where}: {self.reason}."


class RewardCalls:
    """Calls of the functions that `guard` returns, and what has become of them.

    On several ranks a failure is kept until `settle`, so that no rank leaves the others waiting in a collective; on a
    single one it is raised at once.

    Args:
        timeout: Seconds for one attempt of a call; `None` sets no limit and calls a function in the caller's thread.
        retries: Attempts after the first.
        failed: `raise`, or `mask`: the completions of a failed call get NaN.
    """

    def __init__(self, timeout: float | None = 300.0, retries: int = 4, failed: Literal["raise", "mask"] = "raise"):
        self.timeout, self.retries, self.failed = timeout, retries, failed
        self._guarded: dict[int, RewardCall] = {}
        self._failures: list[Failure] = []
        self._failed_attempts: Counter[str] = Counter()
        self._in_a_row: Counter[str] = Counter()

    def guard(self, function: Callable[..., Any], name: str | None = None) -> Callable[..., Any]:
        """Return `function` with a time limit, retries and checks, sync or async as it is.

        A model that runs in this process is left as it is: its ranks must call it equally often, in the main thread.

        Args:
            function: Called by name, with `prompts` and what else TRL gives.
            name: For messages and metrics. Default: the function's.
        """
        if isinstance(function, nn.Module) or getattr(function, "runs_in_process", False):
            return function
        if id(function) not in self._guarded:
            kind = AsyncRewardCall if is_async_callable(function) else RewardCall
            self._guarded[id(function)] = kind(function, name or get_callable_name(function), self)
        return self._guarded[id(function)]

    def guard_judges(self, judges: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
        """Return judges likewise; their caller does not await, so that async ones become sync."""
        guarded = {name: self.guard(judge, name) for name, judge in judges.items()}
        return {name: getattr(call, "now", call) for name, call in guarded.items()}

    def note_attempt(self, name: str) -> None:
        """Count an attempt that has failed."""
        self._failed_attempts[name] += 1

    def fail(self, failure: Failure, error: BaseException) -> list[float]:
        """Keep a failure and return the rewards of its call, or raise it.

        Raises:
            RewardCallError: If failures are not masked and no other rank waits.
        """
        state = PartialState()
        if state.num_processes > 1:
            failure.process = state.process_index
        elif self.failed == "raise":
            raise RewardCallError(_message([failure])) from error
        self._failures.append(failure)
        if self.failed == "mask":
            logger.warning(f"{failure} Its {failure.completions} completions get no score (`failed_rewards: mask`).")
        return [math.nan] * failure.completions

    def settle(self) -> dict[str, float]:
        """Agree on the failures since the last time; every rank must call it after the same calls.

        Returns:
            By function, the failed attempts and the failed calls of all ranks: metrics.

        Raises:
            RewardCallError: On every rank, if a call has failed on any and failures are not masked, or if a function
                has failed too often in a row.
        """
        if not self._guarded:
            return {}
        own, self._failures = (self._failures, self._failed_attempts), []
        self._failed_attempts = Counter()
        by_rank = gather_object([own])
        failures = [failure for rank, _ in by_rank for failure in rank]
        attempts = sum((counts for _, counts in by_rank), Counter[str]())
        if failures and self.failed == "raise":
            raise RewardCallError(_message(failures))
        calls = Counter(failure.name for failure in failures)
        names = sorted({call.__name__ for call in self._guarded.values()})
        self._in_a_row = Counter({name: self._in_a_row[name] + 1 for name in names if calls[name]})
        for name, times in self._in_a_row.items():
            if times >= MAX_FAILURES_IN_A_ROW:
                last = [failure for failure in failures if failure.name == name]
                raise RewardCallError(f"`{name}` has failed in {times} batches in a row. {_message(last)}")
        metrics = {f"{name}/failed_attempts": float(attempts[name]) for name in names}
        return metrics | {f"{name}/failed_calls": float(calls[name]) for name in names}

    def check_any_scored(self, scores: Tensor) -> None:
        """Refuse to train on a rollout without a score.

        Args:
            scores: Of all ranks, `(B,)`; NaN where there is none.

        Raises:
            RewardCallError: If no score is finite.
        """
        if not scores.isfinite().any():
            raise RewardCallError(
                f"None of the {scores.numel()} completions of this rollout has a score: every reward function "
                "returned `None` or NaN for it, or failed (see the warnings above, `failed_rewards: mask`)."
            )


def _message(failures: list[Failure]) -> str:
    shown = " ".join(str(failure) for failure in failures[:3])
    more = f" And {len(failures) - 3} more." if len(failures) > 3 else ""
    return (
        f"{shown}{more} Correct the function, or its server; raise `reward_timeout` or `reward_retries`; or set "
        "`failed_rewards: mask` to go on without the scores that are missing."
    )


class RewardCall:
    """A reward function or judge of TRL's signature, called as `RewardCalls` says.

    Args:
        function: See `RewardCalls.guard`.
        name: Likewise.
        calls: Limits, and where failures go.
    """

    def __init__(self, function: Callable[..., Any], name: str, calls: RewardCalls) -> None:
        self.function, self.__name__, self._calls = function, name, calls
        self._is_async = is_async_callable(function)
        self._pool: DaemonPool | None = None

    def __call__(self, **kwargs: Any) -> list[float]:
        """Return one reward per completion, NaN where there is none."""
        retry = retrying(self._calls.retries, self._describe)
        try:
            return retry(self._attempt, kwargs)
        except Exception as error:
            self._calls.note_attempt(self.__name__)
            attempts = retry.statistics["attempt_number"]
            failure = Failure(self.__name__, describe_error(error), attempts, len(kwargs["prompts"]))
            return self._calls.fail(failure, error)

    def _describe(self, state: RetryCallState) -> None:
        assert state.outcome is not None
        assert state.next_action is not None
        error = state.outcome.exception()
        assert error is not None
        self._calls.note_attempt(self.__name__)
        logger.warning(
            f"`{self.__name__}`: attempt {state.attempt_number} of {1 + self._calls.retries} failed: "
            f"{describe_error(error)}. The next one in {state.next_action.sleep:g} s."
        )

    def _attempt(self, kwargs: dict[str, Any]) -> list[float]:
        """Call the function once; what it logs counts only if it succeeds."""
        logged: list[Callable[[], None]] = []

        def later(log: Callable[..., None]) -> Callable[..., None]:
            return lambda *args, **named: logged.append(functools.partial(log, *args, **named))

        loggers = {name: later(kwargs[name]) for name in ("log_extra", "log_metric") if name in kwargs}
        rewards = self._in_time(kwargs | loggers)
        for log in logged:
            log()
        return rewards

    def _in_time(self, kwargs: dict[str, Any]) -> list[float]:
        count, timeout = len(kwargs["prompts"]), self._calls.timeout
        if self._is_async:
            answer: Future[Any] = asyncio.run_coroutine_threadsafe(self._awaited(kwargs, count), event_loop())
        elif timeout is None:
            return self._called(kwargs, count)
        else:
            self._pool = self._pool or DaemonPool()
            answer = self._pool.submit(self._called, kwargs, count)
        try:
            return answer.result(timeout)
        except TimeoutError:
            if answer.done():  # the function's own
                raise
            answer.cancel()
            if self._pool is not None:  # its thread cannot be stopped, and is not waited for
                self._pool.close()
                self._pool = None
            raise TimeoutError(f"no answer within {timeout:g} s (`reward_timeout`)") from None

    def _called(self, kwargs: dict[str, Any], count: int) -> list[float]:
        return checked_rewards(self.function(**kwargs), count)

    async def _awaited(self, kwargs: dict[str, Any], count: int) -> list[float]:
        return checked_rewards(await self.function(**kwargs), count)


class AsyncRewardCall(RewardCall):
    """The same for an async function: TRL awaits several of them at once."""

    async def __call__(self, **kwargs: Any) -> list[float]:  # type: ignore[override]
        """Return one reward per completion, NaN where there is none."""
        pool = DaemonPool()
        answer = pool.submit(functools.partial(super().__call__, **kwargs))
        pool.close()
        return await asyncio.wrap_future(answer)

    def now(self, **kwargs: Any) -> list[float]:
        """Return the rewards to a caller that does not await."""
        return super().__call__(**kwargs)
