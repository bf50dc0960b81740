"""Threads for code that may never come back: they do not keep a process from ending."""

import contextvars
import functools
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch


class DaemonPool:
    """Threads that never keep a process from ending; each call of `submit` is run by the next that is free.

    Args:
        size: Threads.
    """

    def __init__(self, size: int = 1) -> None:
        self._size = size
        self._tasks: SimpleQueue[Any] = SimpleQueue()
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None  # each thread has its own
        for _ in range(size):
            Thread(target=_work, args=(self._tasks, device), name="reward-call", daemon=True).start()

    def submit(self, function: Callable[..., Any], *args: Any) -> "Future[Any]":
        """Run `function(*args)` in a thread, in the context of the caller."""
        future: Future[Any] = Future()
        self._tasks.put((future, functools.partial(contextvars.copy_context().run, function, *args)))
        return future

    def close(self) -> None:
        """Let the threads end after what they have been given."""
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
        except BaseException as error:  # raised again where the result is read
            future.set_exception(error)
