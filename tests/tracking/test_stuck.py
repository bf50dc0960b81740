"""A run is closed early only if its own process cannot react to a signal, and its end waits for no child."""

import hashlib
import multiprocessing
import os
import signal
import time

import pytest

from rlhf_recipes.durability.preemption import PreemptionCallback
from rlhf_recipes.durability.termination import signals_held
from rlhf_recipes.tracking import stuck
from rlhf_recipes.tracking.session import signals_as_exceptions
from rlhf_recipes.tracking.stuck import closed_when_stuck

FORK = multiprocessing.get_context("fork")
PATIENCE = 0.2  # seconds, in place of 20


class _Delivery:
    def __init__(self):
        self.kills = 0

    def set_killed(self):
        self.kills += 1


@pytest.fixture
def delivery(monkeypatch):
    monkeypatch.setattr(stuck, "STUCK_SECONDS", PATIENCE)
    return _Delivery()


def _run_with_child(ready):
    with closed_when_stuck(_Delivery()):
        if (child := os.fork()) == 0:  # as the workers of a data loader
            time.sleep(20)
    ready.send(child)


def test_the_end_does_not_wait_for_a_child_that_lives_on():
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_run_with_child, args=(sender,))
    process.start()
    try:
        assert receiver.poll(10), "the run has ended"
        os.kill(child := receiver.recv(), 0)
        os.kill(child, signal.SIGKILL)
    finally:
        process.kill()
        process.join()


def test_a_signal_to_a_child_is_none_to_the_run(delivery):
    with signals_as_exceptions(), closed_when_stuck(delivery):
        child = FORK.Process(target=time.sleep, args=(20,))
        child.start()
        time.sleep(PATIENCE)  # until it has left the start of a process
        child.terminate()  # as a pool ends its workers
        child.join()
        time.sleep(5 * PATIENCE)
    assert delivery.kills == 0


@pytest.mark.parametrize("hear", ["training", "delivery"])
def test_a_long_step_after_a_signal_is_not_stuck(delivery, hear):
    """Python has run the handler: the process works on until it can end."""
    with signals_as_exceptions(), closed_when_stuck(delivery), signals_held():
        if hear == "training":
            signal.signal(signal.SIGTERM, PreemptionCallback()._note)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5 * PATIENCE)
    assert delivery.kills == 0


def test_a_second_run_of_a_process_may_be_stuck_too(delivery):
    """The handler of the first one says nothing about the second."""
    with signals_held(), closed_when_stuck(_Delivery()):
        os.kill(os.getpid(), signal.SIGTERM)
    with signals_held(), closed_when_stuck(delivery):
        FORK.Process(target=_send_late, args=(os.getpid(),)).start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**22)  # about two seconds without a handler
    assert delivery.kills == 1


def _send_late(pid):
    time.sleep(0.1)
    os.kill(pid, signal.SIGTERM)
