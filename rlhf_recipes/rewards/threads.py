"""Run code that may hang, in threads that do not keep a process from ending."""

import contextvars
import functools
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch


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
