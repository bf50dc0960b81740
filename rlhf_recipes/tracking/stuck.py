"""Close the run of a process that was told to end and cannot: its main thread waits in a library for another rank.

Python runs no handler of a signal before that wait is over. A launcher kills such a process after 30 seconds.
"""

import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rlhf_recipes.durability.termination import SIGNALS
from rlhf_recipes.tracking.delivery import Delivery

STUCK_SECONDS = 20.0  # shorter than the patience of a launcher


@contextmanager
def closed_when_stuck(delivery: Delivery) -> Iterator[None]:
    """Record a run as KILLED inside, if it still runs a while after a signal. Its real end replaces this status."""
    if threading.current_thread() is not threading.main_thread():  # only this one hears of signals
        yield
        return
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    watch = threading.Thread(target=_watch, args=(receiver, delivery), daemon=True)
    watch.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        sender.close()
        watch.join()
        receiver.close()


def _watch(receiver: socket.socket, delivery: Delivery) -> None:
    timer = None
    while number := receiver.recv(1):  # nothing: the sender is closed
        if number[0] in SIGNALS and timer is None:
            timer = threading.Timer(STUCK_SECONDS, delivery.set_killed)
            timer.daemon = True
            timer.start()
    if timer is not None:
        timer.cancel()
        timer.join()
