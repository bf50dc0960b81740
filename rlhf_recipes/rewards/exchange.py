"""Exchange JSON with a server that may be slow, refuse, or answer with something else."""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import requests
from urllib3.exceptions import InvalidHeader
from urllib3.util import Retry

from rlhf_recipes.console import visible
from rlhf_recipes.options.secrets import redact
from rlhf_recipes.rewards.attempts import PermanentRewardError, RewardCallError
from rlhf_recipes.rewards.threads import in_time

CONNECT_SECONDS = 10.0
REFUSAL_BYTES = 2**14  # of a refusal, only the beginning is read
# A later request may succeed after these refusals: timeout, too many requests.
PASSING_REFUSALS = (408, 429)
Authorize = Callable[[requests.PreparedRequest], requests.PreparedRequest]


class RefusedRequestError(RewardCallError):
    """Report that a server has refused a request that may succeed later.

    Args:
        message: Message.
        after: Seconds that the server asks to wait; 0 if it does not say.
    """

    def __init__(self, message: str, after: float) -> None:
        super().__init__(message)
        self.after = after


class RefusedForGoodError(PermanentRewardError):
    """Report that a server has refused a request, and would do so again.

    Args:
        message: Message.
        body: Beginning of the server's answer. It may hold secrets and any text: do not show it.
    """

    def __init__(self, message: str, body: bytes) -> None:
        super().__init__(message)
        self.body = body


class Exchange:
    """Send requests to one server, and read its answers.

    Args:
        url: Address, for requests and messages.
        authorize: Function that adds a secret to a request. With such a function, requests ignores the password that a
            `.netrc` has for the host.
        expected: Name of the right answers, for messages: `scores`.
        hide: Function that removes a secret from text of the server.
    """

    def __init__(self, url: str, authorize: Authorize, expected: str, hide: Callable[[str], str] = redact) -> None:
        self.url, self._authorize, self._expected, self._hide = url, authorize, expected, hide

    def __call__(
        self, method: str, path: str, limit: int, timeout: float | None, body: str | None = None, kind: type = dict
    ) -> Any:
        """Return the JSON that the server answers with.

        Args:
            method: `GET` or `POST`.
            path: Path behind the address.
            limit: Size of the largest answer, in bytes after decompression.
            timeout: Seconds for the whole request, however slowly its answer arrives; `None` sets no limit.
            body: JSON to send.
            kind: Class of the answer: an object (`dict`) or a list.

        Raises:
            RewardCallError: If there is no valid answer, but a later request may succeed.
            PermanentRewardError: If the server refuses the request for good.
        """
        try:
            answer = in_time(partial(self._exchange, method, path, limit, timeout, body), timeout)
        except TimeoutError as error:
            raise RewardCallError(f"{self.url} does not answer (ReadTimeout: {error})") from None
        if not isinstance(answer, kind):
            raise RewardCallError(f"{self.url} answered with something else than {self._expected}")
        return answer

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
                auth=self._authorize,
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
            refusal = _beginning(response)
            text = refusal.decode(errors="replace")
            message = f"{self.url} answered {response.status_code}: {visible(self._hide(text))[:300]}"
            if _is_final(response.status_code):
                raise RefusedForGoodError(message, refusal)
            raise RefusedRequestError(message, _seconds_asked(response))
        body = bytearray()
        for chunk in response.iter_content(2**14):
            body += chunk
            if len(body) > limit:
                raise RewardCallError(
                    f"{self.url} answered with more than {limit} bytes: this is no list of {self._expected}"
                )
        try:
            return json.loads(body, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            reason = "too deep" if isinstance(error, RecursionError) else visible(str(error))
            raise RewardCallError(f"{self.url} answered with no valid JSON ({reason})") from error


def _beginning(response: requests.Response) -> bytes:
    body = b""
    for chunk in response.iter_content(REFUSAL_BYTES):
        body += chunk
        if len(body) >= REFUSAL_BYTES:
            break
    return body[:REFUSAL_BYTES]


def _is_final(status: int) -> bool:
    return 300 <= status < 500 and status not in PASSING_REFUSALS


def _seconds_asked(response: requests.Response) -> float:
    """Return the seconds of the header `Retry-After`, a number or a date; 0 without a readable one."""
    try:
        return Retry().parse_retry_after(response.headers.get("Retry-After", "0"))
    except InvalidHeader:
        return 0.0


def _refuse_constant(name: str) -> float:
    raise ValueError(f"it holds {name}")
