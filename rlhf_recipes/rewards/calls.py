"""Call reward functions and judges safely: their code may raise errors, hang, or return something invalid.

A call has a time limit, and its answer is checked. A failed call is repeated after growing pauses. If the last attempt
fails, the run ends on every rank with the same message, or the completions of that call get no score.
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
from torch import Tensor
from trl.trainer.utils import get_callable_name, is_async_callable, start_event_loop_in_daemon

from rlhf_recipes.rewards.attempts import RewardCallError, describe_error, retrying
from rlhf_recipes.rewards.dense import read_answers, with_kept_answer
from rlhf_recipes.rewards.protocol import scorer_of
from rlhf_recipes.rewards.threads import DaemonPool

MAX_FAILURES_IN_A_ROW = 5
logger = logging.getLogger(__name__)
event_loop = functools.cache(lambda: start_event_loop_in_daemon("reward-functions")[1])


@dataclass
class Failure:
    """Describe a call whose last attempt failed."""

    name: str
    reason: str
    attempts: int
    completions: int
    process: int | None = None  # known if there are several

    def __str__(self) -> str:
        times = "at the first attempt" if self.attempts == 1 else f"{self.attempts} times"
        where = "" if self.process is None else f" on process {self.process}"
        return f"`{self.name}` failed {times}{where}: {self.reason}."


class RewardCalls:
    """Guard calls of functions, and count their failures.

    A single rank raises a failure at once. Several ranks keep it until `settle`, because no rank may leave the others
    waiting in a collective.

    Args:
        timeout: Seconds for one attempt of a call; `None` sets no limit, and the function runs in the caller's thread.
        retries: Attempts after the first.
        failed: `raise` to end the run, or `mask` to give NaN to the completions of a failed call.
    """

    def __init__(self, timeout: float | None = 300.0, retries: int = 4, failed: Literal["raise", "mask"] = "raise"):
        self.timeout, self.retries, self.failed = timeout, retries, failed
        self._guarded: dict[int, RewardCall] = {}
        self._failures: list[Failure] = []
        self._failed_attempts: Counter[str] = Counter()
        self._in_a_row: Counter[str] = Counter()

    def guard(self, function: Callable[..., Any], name: str | None = None) -> Callable[..., Any]:
        """Return `function` with a time limit, retries and checks. An async function stays async.

        A function with a model in this process is returned unchanged: under ZeRO-3 all ranks must call it equally
        often, in the main thread.

        Args:
            function: Function that takes `prompts` and TRL's other arguments by name.
            name: Name in messages and metrics. Default: the name of the function.
        """
        if scorer_of(function).model is not None:
            return function
        if id(function) not in self._guarded:
            kind = AsyncRewardCall if is_async_callable(function) else RewardCall
            self._guarded[id(function)] = kind(function, name or get_callable_name(function), self)
        return self._guarded[id(function)]

    def guard_judges(self, judges: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
        """Return judges with the same guards. Their caller does not await, so async judges become sync."""
        guarded = {name: self.guard(judge, name) for name, judge in judges.items()}
        return {name: self.readable(call) for name, call in guarded.items()}

    def readable(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a result of `guard` that a caller can use who does not await, and that sums lists of rewards."""
        return getattr(call, "now", None) or with_kept_answer(call, fail=self.fail_to_read)

    def fail_to_read(self, name: str, completions: int, error: Exception) -> list[float]:
        """Keep the failure of a call whose answer cannot be read, like `fail`. It is not repeated."""
        return self.fail(Failure(name, describe_error(error), 1, completions), error)

    def note_attempt(self, name: str) -> None:
        """Count a failed attempt."""
        self._failed_attempts[name] += 1

    def fail(self, failure: Failure, error: BaseException) -> list[float]:
        """Keep a failure and return NaN for its completions, or raise it.

        Raises:
            RewardCallError: If failures are not masked, and there is no other rank.
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
        """Collect the failures of all ranks since the last time. Every rank must call this after the same calls.

        Returns:
            Metrics: the failed attempts and failed calls of each function on all ranks, and figures of a scorer's own.

        Raises:
            RewardCallError: On every rank, if a call failed on one of them and failures are not masked, or if a
                function failed too often in a row.
        """
        if not self._guarded and not self._failures and PartialState().num_processes == 1:
            self._in_a_row.clear()
            return {}
        scorers = {call.__name__: scorer_of(call.function) for call in self._guarded.values()}
        counted = {name: scorer.take_counts() for name, scorer in scorers.items()}
        own, self._failures = (self._failures, self._failed_attempts, counted), []
        self._failed_attempts = Counter()
        by_rank = gather_object([own])
        failures = [failure for rank, *_ in by_rank for failure in rank]
        attempts = sum((counts for _, counts, _ in by_rank), Counter[str]())
        if failures and self.failed == "raise":
            raise RewardCallError(_message(failures))
        calls = Counter(failure.name for failure in failures)
        names = sorted({call.__name__ for call in self._guarded.values()} | calls.keys())
        self._in_a_row = Counter({name: self._in_a_row[name] + 1 for name in names if calls[name]})
        for name, times in self._in_a_row.items():
            if times >= MAX_FAILURES_IN_A_ROW:
                last = [failure for failure in failures if failure.name == name]
                raise RewardCallError(f"`{name}` has failed in {times} batches in a row. {_message(last)}")
        metrics = {f"{name}/failed_attempts": float(attempts[name]) for name in names}
        for name, scorer in scorers.items():
            total = sum((counts[name] for *_, counts in by_rank), Counter[str]())
            metrics |= {f"{name}/{figure}": value for figure, value in scorer.figures(total).items()}
        return metrics | {f"{name}/failed_calls": float(calls[name]) for name in names}

    def check_any_scored(self, scores: Tensor) -> None:
        """Refuse to train on a rollout without any score.

        Args:
            scores: Scores of all ranks, `(B,)`; NaN where there is none.

        Raises:
            RewardCallError: If no score is finite.
        """
        if not scores.isfinite().any():
            names = ", ".join(f"`{call.__name__}`" for call in self._guarded.values())
            raise RewardCallError(
                f"None of the {scores.numel()} completions of this rollout has a score: every reward function "
                f"{f'({names}) ' if names else ''}returned `None` or NaN for it, or failed (see the warnings above, "
                "`failed_rewards: mask`)."
            )


def _message(failures: list[Failure]) -> str:
    shown = " ".join(str(failure) for failure in failures[:3])
    more = f" And {len(failures) - 3} more." if len(failures) > 3 else ""
    return (
        f"{shown}{more} Correct the function, or its server; raise `reward_timeout` or `reward_retries`; or set "
        "`failed_rewards: mask` to continue without the missing scores."
    )


class RewardCall:
    """Call a reward function or judge within the limits of `RewardCalls`, which collects its failures."""

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
        """Call the function once, and pass on what it logs only if the call succeeds."""
        logged: list[Callable[[], None]] = []

        def later(log: Callable[..., None]) -> Callable[..., None]:
            return lambda *args, **named: logged.append(functools.partial(log, *args, **named))

        loggers = {name: later(kwargs[name]) for name in ("log_extra", "log_metric") if name in kwargs}
        rewards = self._in_time(kwargs | loggers)
        for log in logged:
            log()
        return rewards

    def _in_time(self, kwargs: dict[str, Any]) -> list[float]:
        timeout = self._calls.timeout
        if self._is_async:
            answer: Future[Any] = asyncio.run_coroutine_threadsafe(self._awaited(kwargs), event_loop())
        elif timeout is None:
            return self._called(kwargs)
        else:
            self._pool = self._pool or DaemonPool()
            answer = self._pool.submit(self._called, kwargs)
        try:
            return answer.result(timeout)
        except TimeoutError:
            if answer.done():  # the function raised it, or was ready a moment later
                return answer.result()
            answer.cancel()
            if self._pool is not None:  # nobody can stop its thread, and nobody waits for it
                self._pool.close()
                self._pool = None
            raise TimeoutError(f"no answer within {timeout:g} s (`reward_timeout`)") from None

    def _called(self, kwargs: dict[str, Any]) -> list[float]:
        return read_answers(self.function(**kwargs), kwargs)

    async def _awaited(self, kwargs: dict[str, Any]) -> list[float]:
        return read_answers(await self.function(**kwargs), kwargs)


class AsyncRewardCall(RewardCall):
    """Call an async function. TRL awaits several of them at once."""

    async def __call__(self, **kwargs: Any) -> list[float]:  # type: ignore[override]
        """Return one reward per completion, NaN where there is none."""
        pool = DaemonPool()
        answer = pool.submit(functools.partial(super().__call__, **kwargs))
        pool.close()
        return await asyncio.wrap_future(answer)

    def now(self, **kwargs: Any) -> list[float]:
        """Return the rewards to a caller that does not await."""
        return super().__call__(**kwargs)
