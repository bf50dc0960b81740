"""Give each request to an MLflow server an end in time.

The time limits of urllib3 are those of one read: a server that sends a byte now and then would hold a run for ever.
"""

import functools
import os
from typing import Any

import requests
from mlflow.utils import rest_utils

from rlhf_recipes.rewards.threads import in_time

LONGEST_BACKOFF = 120.0  # seconds, urllib3's own
SLOWEST_BYTES = 1e5  # per second, of a file that is sent
_request = rest_utils._get_http_response_with_retries


def limit_requests() -> None:
    """Let every request of MLflow to its server end in time. Each way there passes through one function.

    Files that MLflow sends straight to a cloud storage take another way, which has no limit.
    """
    rest_utils._get_http_response_with_retries = request_in_time


@functools.wraps(_request)
def request_in_time(
    method: str, url: str, max_retries: int, backoff_factor: float, *args: Any, timeout: float, **options: Any
) -> requests.Response:
    """Send a request as MLflow does, and return its answer with its content.

    Args:
        method: `GET`, `POST`, ..
        url: Address.
        max_retries: Attempts after the first.
        backoff_factor: Seconds of the first pause; each further one is twice as long.
        args: Further arguments of MLflow's function.
        timeout: Seconds of one attempt, `MLFLOW_HTTP_REQUEST_TIMEOUT`.
        options: Further arguments of MLflow's function.

    Raises:
        requests.Timeout: If there is no whole answer when all attempts and the pauses between them are over.
    """
    pauses = sum(1 + min(backoff_factor * 2**attempt, LONGEST_BACKOFF) for attempt in range(max_retries))
    seconds = (1 + max_retries) * timeout + pauses + _size(options.get("data")) / SLOWEST_BYTES

    def exchange(opened: list[requests.Response]) -> requests.Response:
        streamed = options | {"timeout": timeout, "stream": True}
        opened.append(_request(method, url, max_retries, backoff_factor, *args, **streamed))
        if not options.get("stream"):
            opened[0].content  # noqa: B018 (it is read here)
        return opened[0]

    try:
        return in_time(exchange, seconds)
    except TimeoutError as error:
        raise requests.Timeout(str(error)) from None


def _size(data: Any) -> int:
    return os.fstat(data.fileno()).st_size if hasattr(data, "fileno") else len(data or b"")
