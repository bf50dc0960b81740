"""Run code that may hang, in threads that do not keep a process from ending."""

import contextvars
import functools
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

import torch

Answer = TypeVar("Answer")


class DaemonPool:
    """Run calls in threads that never keep a process from ending. The next free thread takes the next call."""

    def __init__(self, size: int = 1) -> None:
        self._size = size
        self._tasks: SimpleQueue[Any] = SimpleQueue()
        # Each thread has its own current device.
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        for _ in range(size):
            Thread(target=_work, args=(self._tasks, device), name="reward-call", daemon=True).start()

    def submit(self, function: Callable[..., Any], *args: Any) -> "Future[Any]":
        """Run `function(*args)` in a thread, with the caller's context variables."""
        future: Future[Any] = Future()
        self._tasks.put((future, functools.partial(contextvars.copy_context().run, function, *args)))
        return future

    def close(self) -> None:
        """Let the threads end after the calls that they already have."""
        for _ in range(self._size):
            self._tasks.put(None)


def in_time(exchange: Callable[[list[Any]], Answer], seconds: float | None) -> Answer:
    """Return the answer to a request within a time limit for the whole request.

    The time limits of requests and urllib3 are those of one read. So the request runs in a thread. At the end of the
    time, the thread is left and its connection is closed.

    Args:
        exchange: Function that sends the request. It adds the response of requests to a list, before it reads it.
        seconds: Time limit; `None` sets none.

    Raises:
        TimeoutError: If there is no whole answer in time.
    """
    pool, opened = DaemonPool(), list[Any]()
    answer = pool.submit(exchange, opened)
    pool.close()
    try:
        return answer.result(seconds)
    except TimeoutError:
        if answer.done():  # the function raised it, or was ready a moment later
            return answer.result()
        for response in opened:
            with suppress(OSError, RuntimeError, ValueError):  # the answer is whole by now
                response.raw.shutdown()  # its thread wakes up
        raise TimeoutError(f"no whole answer in {seconds:g} s") from None


def _work(tasks: "SimpleQueue[Any]", device: int | None) -> None:
    if device is not None:
        torch.cuda.set_device(device)
    while (task := tasks.get()) is not None:
        future, function = task
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(function())
        except BaseException as error:  # the reader of the result gets it
            future.set_exception(error)
