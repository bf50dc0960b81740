"""Requests to a server that scores completions: limits of time and size, the token, errors.

A failed request is sent only once. `rlhf_recipes.rewards.calls.RewardCalls`, through which the trainer and
`recipes/evaluate.py` call a reward model, repeats the call.
"""

import json
import logging
import os
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import requests
from tenacity import RetryCallState

from rlhf_recipes.console import visible
from rlhf_recipes.options.secrets import holds_credentials
from rlhf_recipes.rewards.attempts import PermanentRewardError, RewardCallError, checked_rewards
from rlhf_recipes.rewards.exchange import CONNECT_SECONDS, Exchange
from rlhf_recipes.rewards.threads import DaemonPool

TOKEN_VARIABLE = "REWARD_MODEL_TOKEN"
# The largest description of a model, in bytes after decompression: its card has a chat template.
INFO_BYTES = 2**22
NUMBER_BYTES = 64  # of one number in an answer, at most
logger = logging.getLogger(__name__)


class Server:
    """Send requests to a server.

    The environment variable `REWARD_MODEL_TOKEN`, if it is set, is sent as a bearer token. It is never logged.

    Args:
        url: Address of the server, for example `http://127.0.0.1:8000`.
        batch_size: Completions per request.
        concurrency: Number of requests at the same time.
        timeout: Seconds for a whole request, however slowly its answer arrives; `None` sets no limit.

    Raises:
        ValueError: If the address holds a password.
    """

    def __init__(self, url: str, batch_size: int, concurrency: int, timeout: float | None) -> None:
        if holds_credentials(url):
            raise ValueError(f"The address of a reward model holds a password: set {TOKEN_VARIABLE} instead.")
        self.url = url.rstrip("/")
        self._request = Exchange(self.url, _authorize, "scores")
        self.batch_size, self.concurrency, self.timeout = batch_size, concurrency, timeout

    def describe(self, path: str) -> dict[str, Any]:
        """Return what the server says about itself at a path.

        Raises:
            RewardCallError: If the server does not answer, or not in JSON.
            PermanentRewardError: If it refuses, for example because it has no such path.
        """
        return self._request("GET", path, INFO_BYTES, CONNECT_SECONDS)

    def _require_same(self, same: bool) -> None:
        """Check that the server still has its first model. It may have been restarted.

        Raises:
            PermanentRewardError: If it has another one.
        """
        if not same:
            raise PermanentRewardError(
                f"{self.url} serves another model than when this run began. Serve the first one again, and resume."
            )

    def _sent(self, send: Callable[[dict[str, list[Any]]], list[Any]], **columns: list[Any]) -> list[Any]:
        """Send the rows in batches, several at the same time, and return the answers in their order."""
        starts = range(0, len(next(iter(columns.values()))), self.batch_size)
        batches = [
            {name: column[start : start + self.batch_size] for name, column in columns.items()} for start in starts
        ]
        pool = DaemonPool(min(self.concurrency, len(batches)))
        answers = [pool.submit(send, batch) for batch in batches]
        pool.close()
        try:
            return [number for answer in answers for number in answer.result()]
        finally:
            _cancel(answers)

    def _post(self, path: str, content: dict[str, Any], limit: int, kind: type = dict) -> Any:
        """Return the answer to JSON: an object or, with `kind=list`, a list, of at most `limit` bytes."""
        try:
            body = json.dumps(content, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise PermanentRewardError(f"prompts for a served reward model must be text: {error}") from error
        return self._request("POST", path, limit, self.timeout, body, kind)

    def _numbers(self, numbers: Any, kind: str, count: int, each: int = 1) -> list[Any]:
        """Return an answer if it has `each` numbers, or `None`, for each of `count` completions."""
        if not isinstance(numbers, list) or len(numbers) != each * count:
            found = len(numbers) if isinstance(numbers, list) else "no"
            raise RewardCallError(f"{self.url} answered with {found} {kind} for {count} completions")
        try:
            checked_rewards(numbers, each * count)
        except (TypeError, ValueError) as error:
            raise RewardCallError(f"{self.url} answered with wrong {kind}: {visible(str(error))}") from error
        return numbers

    def _note_waiting(self, state: RetryCallState) -> None:
        logger.warning(f"No reward model answers at {self.url} yet (attempt {state.attempt_number}).")


def _authorize(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Add the token. With an `auth` function, requests ignores the password that a `.netrc` has for the host."""
    if token := os.environ.get(TOKEN_VARIABLE):
        request.headers["Authorization"] = f"Bearer {token}"
    return request


def finished_completions(count: int, completion_ids: list[list[int]] | None, end_ids: list[int] | None) -> list[bool]:
    """Return for each completion whether it has ended and was not cut off.

    Args:
        count: Number of completions.
        completion_ids: Token ids of each completion; `None` counts all as finished.
        end_ids: Ids that end a completion; `None` counts all as finished.
    """
    if completion_ids is None or end_ids is None:
        return [True] * count
    return [ids[-1] in end_ids for ids in completion_ids]


def _cancel(answers: "list[Future[Any]]") -> None:
    for answer in answers:
        answer.cancel()
