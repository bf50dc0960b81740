"""The signals that stop a run, and the exit code of a stopped run.

Imports only the standard library: a launcher must start at once.
"""

import os
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# `nohup` starts a process that ignores SIGHUP, the signal of a closed terminal. It must go on ignoring it.
_HANGUP = () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, *_HANGUP)
# A shell does the same with SIGINT, the signal of Ctrl-C, for a command in the background.
_INTERRUPT = () if signal.getsignal(signal.SIGINT) == signal.SIG_IGN else (signal.SIGINT,)
STOPS = (*SIGNALS, *_INTERRUPT)  # the signals after which a training writes a checkpoint and ends
# A scheduler signals all processes, and then the launcher passes its own signal on to them. Ctrl-C does the same.
ECHO_SECONDS = 2.0
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again later
answered = threading.Event()  # Python has run one of our handlers


class TerminatedError(SystemExit):
    """A signal that ends the process, as an exception: the run can close its records on the way out."""


def is_first_process() -> bool:
    """Return whether this is the process of a run that speaks for all. It asks no library, so it never waits."""
    return os.environ.get("RANK", "0") == "0"


def terminate(number: int, frame: FrameType | None) -> None:
    """Handle a signal: end the process with the code that a shell has for it.

    Raises:
        TerminatedError: Always.
    """
    leave_closed_terminal(number)
    raise TerminatedError(128 + number)


def leave_closed_terminal(number: int) -> None:
    """Note that a handler runs. After SIGHUP, write no more to a closed terminal: a failed write would end the run."""
    answered.set()
    for descriptor in (1, 2) if number == signal.SIGHUP else ():
        if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, descriptor)
            os.close(nothing)


def terminate_on_hangup() -> None:
    """Treat SIGHUP as SIGTERM in a program that handles only that."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        leave_closed_terminal(number)
        signal.raise_signal(signal.SIGTERM)

    for number in _HANGUP:
        signal.signal(number, pass_on)


@contextmanager
def signals_held() -> Iterator[list[int]]:
    """Collect signals and Ctrl-C inside in the list that is yielded. The caller answers or ignores them."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread only
        yield received
        return

    def hold(number: int, frame: FrameType | None) -> None:
        leave_closed_terminal(number)
        received.append(number)

    before: dict[int, Any] = {number: signal.signal(number, hold) for number in (*SIGNALS, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
