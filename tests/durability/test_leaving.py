"""A process that has done its work ends with 0, also while threads of its process group hold tensors."""

import time

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from processes import run_in_processes

from rlhf_recipes.durability.ending import GLOO_SECONDS, leave_together

pytestmark = pytest.mark.distributed


class _SlowToGo:
    def __del__(self):
        time.sleep(0.8 * GLOO_SECONDS)


def _leave_a_tensor(rank, world_size):
    """Leave the last reference to a tensor to gloo, whose thread then needs the interpreter to release it."""
    PartialState(cpu=True)
    group = dist.kept = dist.new_group()  # a wrapped model keeps its group; the end of one waits for its threads
    with leave_together():
        tensor = torch.ones(1)
        if rank == 0:
            tensor.slow = _SlowToGo()
        time.sleep(rank)  # so that rank 0 has let go before its work ends
        work = dist.all_reduce(tensor, group=group, async_op=True)
        del tensor, work
    PartialState().destroy_process_group()


def test_a_tensor_that_gloo_still_holds_does_not_abort_the_end():
    assert run_in_processes(_leave_a_tensor, 2) == [None, None]
