"""Close the run of a process that was told to end and cannot: its main thread waits in a library for another rank.

Python runs no handler of a signal before that wait is over. A launcher kills such a process after 30 seconds.
"""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rlhf_recipes.durability.termination import SIGNALS, answered
from rlhf_recipes.tracking.delivery import Delivery

STUCK_SECONDS = 20.0  # shorter than the patience of a launcher
_watched: set[int] = set()  # descriptors that get the numbers of signals


def _stop_listening() -> None:
    if _watched:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_stop_listening)  # a signal to the child would count as one to this process


@contextmanager
def closed_when_stuck(delivery: Delivery) -> Iterator[None]:
    """Record a run as KILLED inside, if no handler of a signal runs for a while. Its real end replaces this status."""
    if threading.current_thread() is not threading.main_thread():  # only this one hears of signals
        yield
        return
    answered.clear()
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    _watched.add(sender.fileno())
    before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    watch = threading.Thread(target=_watch, args=(receiver, delivery), daemon=True)
    watch.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        _watched.discard(sender.fileno())
        with suppress(OSError):
            sender.shutdown(socket.SHUT_RDWR)  # a child that lives on has a copy, which `close` leaves open
        sender.close()
        watch.join()
        receiver.close()


def _watch(receiver: socket.socket, delivery: Delivery) -> None:
    timer = None
    while number := receiver.recv(1):  # nothing: the sender is closed
        if number[0] in SIGNALS and timer is None:
            timer = threading.Timer(STUCK_SECONDS, _close, args=(delivery,))
            timer.daemon = True
            timer.start()
    if timer is not None:
        timer.cancel()
        timer.join()


def _close(delivery: Delivery) -> None:
    if not answered.is_set():
        delivery.set_killed()
