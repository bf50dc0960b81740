"""A signal that reaches one rank alone stops both at the same step."""

import signal
import time
from types import SimpleNamespace

import pytest
from accelerate import PartialState
from processes import run_in_processes
from transformers import TrainerControl

from rlhf_recipes.durability.collectives import limit_collectives
from rlhf_recipes.durability.ending import leave_together
from rlhf_recipes.durability.preemption import PreemptionCallback
from rlhf_recipes.durability.termination import EXIT_CODE, TerminatedError

pytestmark = pytest.mark.distributed


def _steps(rank, world_size, signalled):
    """Return the orders to this rank at the ends of three steps; the signal comes in the second."""
    callback, told = PreemptionCallback(), []
    for step in range(3):
        if step == 1 and rank == signalled:
            callback._note(signal.SIGUSR1, None)
        control = TrainerControl(should_evaluate=True)
        callback.on_step_end(SimpleNamespace(device="cpu"), None, control)
        told.append((control.should_save, control.should_training_stop, control.should_evaluate))
    return told, callback.evaluation_due


@pytest.mark.parametrize("signalled", [0, 1])
def test_both_save_and_stop_and_leave_the_evaluation_to_the_resume(signalled):
    goes_on, stops = (False, False, True), (True, True, False)
    expected = [goes_on, stops, stops], True
    assert run_in_processes(_steps, 2, signalled) == [expected, expected]


def _leave(rank, world_size):
    """Return the times at which this rank could leave and did leave."""
    PartialState(cpu=True)
    times = []
    with pytest.raises(TerminatedError):
        _give_way(rank, times)
    return times[0], time.time()


@leave_together()
def _give_way(rank, times):
    if rank == 0:
        time.sleep(2)  # closes its record
    times.append(time.time())
    raise TerminatedError(EXIT_CODE)


def test_no_rank_leaves_before_the_one_that_has_a_record_to_close():
    """A launcher kills the processes that are left."""
    (done, _), (earlier, left) = run_in_processes(_leave, 2)
    assert earlier < done <= left


def _leave_late(rank, world_size):
    PartialState(cpu=True)
    limit_collectives(2)
    with leave_together():
        pass  # an earlier training of the same script
    with leave_together():
        time.sleep(6 if rank == 0 else 0)  # uploads a model
    return True


def test_an_upload_at_the_end_may_take_longer_than_ddp_timeout():
    assert run_in_processes(_leave_late, 2) == [True, True]
