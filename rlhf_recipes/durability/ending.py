"""The common end of all processes of a run."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

import torch.distributed as dist
from accelerate import PartialState
from torch.distributed.distributed_c10d import _get_default_store

from rlhf_recipes.durability.collectives import hangs_named
from rlhf_recipes.durability.going_on import remedy
from rlhf_recipes.durability.termination import EXIT_CODE, TerminatedError, is_first_process

CLOSED_KEY = "rlhf_recipes/closed"  # in the store of the processes: the first one has closed the record of the run
_ends = count()  # of this process: a script may train several times, and the store keeps its keys
GLOO_SECONDS = 0.5  # a thread needs milliseconds for it, even with many more threads than cores


def wait_to_end() -> None:
    """Wait for every process, as the last collective of a training or a program. Every process calls it equally often.

    The first process may still upload a model, for longer than `ddp_timeout`. The others wait for its word, and not in
    a collective.

    A thread of gloo may still have to release the last tensors. For that it needs the interpreter, and it aborts a
    process whose interpreter is closing (https://github.com/pytorch/pytorch/issues/190489).
    """
    _wait_for_first_process()
    with hangs_named():
        PartialState().wait_for_everyone()
    if dist.is_available() and dist.is_initialized() and dist.get_backend() == dist.Backend.GLOO:
        time.sleep(GLOO_SECONDS)


def _wait_for_first_process() -> None:
    if not (dist.is_available() and dist.is_initialized()):
        return
    store = _get_default_store()
    key = f"{CLOSED_KEY}/{next(_ends)}"
    if PartialState().is_main_process:
        store.set(key, "")
    while not store.check([key]):
        time.sleep(GLOO_SECONDS)


@contextmanager
def leave_together(*resumed_by: str) -> Iterator[None]:
    """Let each process wait for the others at its end, also after a signal: one of them must close the run's record.

    As soon as one process has ended with an error or after a signal, a launcher kills the others after 30 seconds.

    Args:
        resumed_by: Option and value with which the same command goes on with the run.
    """
    go_on = remedy(*resumed_by)
    try:
        with hangs_named():
            yield
    except (TerminatedError, KeyboardInterrupt) as error:
        # With this code, all processes stop at the same step. Another code may be of this one alone.
        if isinstance(error, TerminatedError) and error.code == EXIT_CODE:
            wait_to_end()
            PartialState().destroy_process_group()
        elif is_first_process():
            sys.stderr.write(f"Stopped by a signal before the end, without a new checkpoint.{go_on}\n")
        raise
    else:
        wait_to_end()
