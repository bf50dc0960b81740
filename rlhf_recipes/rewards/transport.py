"""Requests to a server that scores completions: limits of time and size, the token, errors.

A failed request is sent only once. `rlhf_recipes.rewards.calls.RewardCalls`, through which the trainer and
`recipes/evaluate.py` call a reward model, repeats the call.
"""

import json
import logging
import os
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import requests
from tenacity import RetryCallState

from rlhf_recipes.console import visible
from rlhf_recipes.options.secrets import holds_credentials, redact
from rlhf_recipes.rewards.attempts import PermanentRewardError, RewardCallError, checked_rewards
from rlhf_recipes.rewards.threads import DaemonPool, in_time

TOKEN_VARIABLE = "REWARD_MODEL_TOKEN"
CONNECT_SECONDS = 10.0
# The largest description of a model, in bytes after decompression: its card has a chat template.
INFO_BYTES = 2**22
REFUSAL_BYTES = 2**12  # of a refusal, only the beginning is shown
# A later request may succeed after these refusals: timeout, too many requests.
PASSING_REFUSALS = (408, 429)
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
        self.batch_size, self.concurrency, self.timeout = batch_size, concurrency, timeout

    def describe(self, path: str) -> dict[str, Any]:
        """Return what the server says about itself at a path.

        Raises:
            RewardCallError: If the server does not answer, or not in JSON.
            PermanentRewardError: If it refuses, for example because it has no such path.
        """
        described = self._request("GET", path, INFO_BYTES, CONNECT_SECONDS)
        if not isinstance(described, dict):
            raise RewardCallError(f"{self.url} answered with something else than a description")
        return described

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

    def _post(self, path: str, content: dict[str, Any], limit: int) -> Any:
        """Return the answer to JSON, of at most `limit` bytes."""
        try:
            body = json.dumps(content, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise PermanentRewardError(f"prompts for a served reward model must be text: {error}") from error
        return self._request("POST", path, limit, self.timeout, body)

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

    def _request(self, method: str, path: str, limit: int, timeout: float | None, body: str | None = None) -> Any:
        try:
            return in_time(partial(self._exchange, method, path, limit, timeout, body), timeout)
        except TimeoutError as error:
            raise RewardCallError(f"{self.url} does not answer (ReadTimeout: {error})") from None

    def _exchange(
        self,
        method: str,
        path: str,
        limit: int,
        timeout: float | None,
        body: str | None,
        opened: list[requests.Response],
    ) -> Any:
        try:
            with requests.request(
                method,
                self.url + path,
                data=body,
                headers={"Content-Type": "application/json"},
                auth=_authorize,
                timeout=(CONNECT_SECONDS, timeout),
                allow_redirects=False,
                stream=True,
            ) as response:
                opened.append(response)
                return self._answered(response, limit)
        except requests.RequestException as error:
            raise RewardCallError(f"{self.url} does not answer ({type(error).__name__})") from error

    def _answered(self, response: requests.Response, limit: int) -> Any:
        if not response.ok or response.is_redirect:
            kind = PermanentRewardError if _is_final(response.status_code) else RewardCallError
            text = next(response.iter_content(REFUSAL_BYTES), b"").decode(errors="replace")
            raise kind(f"{self.url} answered {response.status_code}: {visible(redact(text))[:300]}")
        body = bytearray()
        for chunk in response.iter_content(2**14):
            body += chunk
            if len(body) > limit:
                raise RewardCallError(f"{self.url} answered with more than {limit} bytes: this is no list of scores")
        try:
            return json.loads(body, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            reason = "too deep" if isinstance(error, RecursionError) else visible(str(error))
            raise RewardCallError(f"{self.url} answered with no valid JSON ({reason})") from error

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


def _is_final(status: int) -> bool:
    return 300 <= status < 500 and status not in PASSING_REFUSALS


def _refuse_constant(name: str) -> float:
    raise ValueError(f"it holds {name}")


def _cancel(answers: "list[Future[Any]]") -> None:
    for answer in answers:
        answer.cancel()
