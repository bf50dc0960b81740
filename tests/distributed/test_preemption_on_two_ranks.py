"""A signal that reaches one rank alone stops both at the same step."""

import signal
from types import SimpleNamespace

import pytest
from processes import run_in_processes
from transformers import TrainerControl

from rlhf_recipes.preemption import PreemptionCallback

pytestmark = pytest.mark.distributed


def _steps(rank, world_size, signalled):
    """What this rank is told to do at the ends of three steps; the signal comes in the second."""
    callback, told = PreemptionCallback(), []
    for step in range(3):
        if step == 1 and rank == signalled:
            callback._note(signal.SIGUSR1, None)
        control = TrainerControl(should_evaluate=True)
        callback.on_step_end(SimpleNamespace(device="cpu", save_only_model=True), None, control)
        told.append((control.should_save, control.should_training_stop, control.should_evaluate))
    return told, callback.evaluation_due


@pytest.mark.parametrize("signalled", [0, 1])
def test_both_save_and_stop_and_leave_the_evaluation_to_the_resume(signalled):
    goes_on, stops = (False, False, True), (True, True, False)
    expected = [goes_on, stops, stops], True
    assert run_in_processes(_steps, 2, signalled) == [expected, expected]
