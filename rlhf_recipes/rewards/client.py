"""Score completions with a reward model on another machine, which `recipes/serve_reward_model.py` serves.

The client sends a failed request only once. `rlhf_recipes.rewards.calls.RewardCalls`, through which the trainer and
`recipes/evaluate.py` call it, repeats the call.
"""

import json
import logging
import math
import os
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import requests
import torch
from tenacity import RetryCallState
from torch import Tensor

from rlhf_recipes.algorithm.heads import combine_heads
from rlhf_recipes.console import visible
from rlhf_recipes.options.secrets import holds_credentials, redact
from rlhf_recipes.rewards.attempts import PermanentRewardError, RewardCallError, checked_rewards, retrying
from rlhf_recipes.rewards.card import CARD_FILE, RewardModelCard, heads_of
from rlhf_recipes.rewards.heads import combined
from rlhf_recipes.rewards.protocol import Scorer, ScoringRun
from rlhf_recipes.rewards.threads import DaemonPool, in_time

TOKEN_VARIABLE = "REWARD_MODEL_TOKEN"
CONNECT_SECONDS = 10.0
# The largest answers, in bytes after decompression: the card with its chat template, and one number per row.
INFO_BYTES = 2**22
NUMBER_BYTES = 64
REFUSAL_BYTES = 2**12  # of a refusal, only the beginning is shown
# A later request may succeed after these refusals: timeout, too many requests.
PASSING_REFUSALS = (408, 429)
logger = logging.getLogger(__name__)


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


class RemoteRewardModel(Scorer):
    """Score completions with a reward model that `recipes/serve_reward_model.py` serves.

    The client sends the environment variable `REWARD_MODEL_TOKEN`, if it is set, as a bearer token. It never logs it.
    A reward model with several heads sends the scores of each. They are combined here, by the rule of the run.

    Args:
        url: Address of the server, for example `http://127.0.0.1:8000`.
        batch_size: Completions per request.
        concurrency: Number of requests at the same time.
        timeout: Seconds for a whole request, however slowly its answer arrives; `None` sets no limit.
        retries: Further attempts to reach a server that is still starting.
        policy_eos_token_ids: Ids that end a completion of the policy; `None` counts every completion as finished.

    Raises:
        ValueError: If the address holds a password, or if no reward model answers there.
    """

    combine: Callable[[Tensor], Tensor] = staticmethod(combine_heads)  # `(B, K)` of several heads to `(B,)`

    def __init__(
        self,
        url: str,
        *,
        batch_size: int = 32,
        concurrency: int = 4,
        timeout: float | None = 300.0,
        retries: int = 4,
        policy_eos_token_ids: list[int] | None = None,
    ) -> None:
        if holds_credentials(url):
            raise ValueError(f"The address of a reward model holds a password: set {TOKEN_VARIABLE} instead.")
        self.url = url.rstrip("/")
        self.batch_size, self.concurrency, self.timeout = batch_size, concurrency, timeout
        self.policy_eos_token_ids = policy_eos_token_ids
        try:
            info = retrying(retries, self._note_waiting)(self._request, "GET", "/", INFO_BYTES, CONNECT_SECONDS)
            self.__name__ = str(info["name"])
            self.card = None if info["card"] is None else RewardModelCard(**info["card"])
            self.weights: str | None = info.get("weights")  # a fingerprint
            self.position_limit: int | None = info.get("position_limit")
        except (KeyError, TypeError, RewardCallError, PermanentRewardError) as error:
            raise ValueError(
                f"No reward model is served at {self.url} ({error}). Start it there: "
                "`rlhf serve --model_name_or_path DIRECTORY`."
            ) from error
        if self.card is None:
            logger.warning(
                f"The reward model at {self.url} has no {CARD_FILE}, so its separator and its chat template cannot be "
                "checked."
            )

    def identity(self) -> str:
        """Return the fingerprint of the weights; the address if the server does not know it."""
        return self.weights or self.url

    def prepare(self, run: ScoringRun) -> None:
        """Take the limits of a run, and its rule for several heads."""
        self.timeout, self.policy_eos_token_ids = run.timeout, run.policy_eos_token_ids
        self.combine = run.combine

    def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]] | None = None, **kwargs: Any
    ) -> list[float | None]:
        """Return one score per completion; `None` where the score is NaN.

        Raises:
            RewardCallError: If a request fails, but a later one may succeed.
            PermanentRewardError: If the server refuses a request for good.
        """
        finished = finished_completions(len(prompts), completion_ids, self.policy_eos_token_ids)
        columns = {"prompts": prompts, "completions": completions, "finished": finished}
        if heads_of(self.card) == 1:
            return self._sent(self._score, **columns)
        scores = torch.tensor(self._sent(self._head_scores, **columns))
        return [*combined(scores, self.combine, self.__name__, self.card, kwargs.get("log_metric"))]

    def prompt_lengths(self, prompts: list[Any]) -> list[int]:
        """Return the number of tokens that the model reads beside those of an answer, one per prompt."""
        return self._sent(self._lengths, prompts=prompts)

    def _sent(self, send: Callable[[dict[str, list[Any]]], list[Any]], **columns: list[Any]) -> list[Any]:
        """Send the rows in batches, several at the same time, and return the answers in their order."""
        starts = range(0, len(columns["prompts"]), self.batch_size)
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

    def _score(self, batch: dict[str, list[Any]]) -> list[float | None]:
        return self._answer("scores", "/score", batch)

    def _lengths(self, batch: dict[str, list[Any]]) -> list[int]:
        return self._answer("lengths", "/lengths", batch)

    def _head_scores(self, batch: dict[str, list[Any]]) -> list[list[float]]:
        """Return the scores of each completion by each head."""
        heads = heads_of(self.card)
        flat = self._answer("head_scores", "/head_scores", batch, each=heads)
        numbers = [math.nan if x is None else float(x) for x in flat]
        return [numbers[start : start + heads] for start in range(0, len(numbers), heads)]

    def _answer(self, kind: str, path: str, batch: dict[str, list[Any]], each: int = 1) -> list[Any]:
        try:
            body = json.dumps(batch, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise PermanentRewardError(f"prompts for a served reward model must be text: {error}") from error
        count = each * len(batch["prompts"])
        numbers = self._request("POST", path, NUMBER_BYTES * (count + 16), self.timeout, body).get(kind)
        if not isinstance(numbers, list) or len(numbers) != count:
            found = len(numbers) if isinstance(numbers, list) else "no"
            raise RewardCallError(f"{self.url} answered with {found} {kind} for {count // each} completions")
        try:
            checked_rewards(numbers, count)
        except (TypeError, ValueError) as error:
            raise RewardCallError(f"{self.url} answered with wrong {kind}: {visible(str(error))}") from error
        return numbers

    def _request(
        self, method: str, path: str, limit: int, timeout: float | None, body: str | None = None
    ) -> dict[str, Any]:
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
    ) -> dict[str, Any]:
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

    def _answered(self, response: requests.Response, limit: int) -> dict[str, Any]:
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
            answer = json.loads(body, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            reason = "too deep" if isinstance(error, RecursionError) else visible(str(error))
            raise RewardCallError(f"{self.url} answered with no valid JSON ({reason})") from error
        if not isinstance(answer, dict):
            raise RewardCallError(f"{self.url} answered with something else than scores")
        return answer

    def _note_waiting(self, state: RetryCallState) -> None:
        logger.warning(f"No reward model answers at {self.url} yet (attempt {state.attempt_number}).")


def _authorize(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Add the token. With an `auth` function, requests ignores the password that a `.netrc` has for the host."""
    if token := os.environ.get(TOKEN_VARIABLE):
        request.headers["Authorization"] = f"Bearer {token}"
    return request


def _is_final(status: int) -> bool:
    return 300 <= status < 500 and status not in PASSING_REFUSALS


def _refuse_constant(name: str) -> float:
    raise ValueError(f"it holds {name}")


def _cancel(answers: "list[Future[Any]]") -> None:
    for answer in answers:
        answer.cancel()
