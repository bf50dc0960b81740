"""The common end of several processes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from accelerate import PartialState

from rlhf_recipes.durability.termination import EXIT_CODE, TerminatedError

GLOO_SECONDS = 0.5  # a thread that can run needs milliseconds, even with many times more threads than cores


def wait_to_end() -> None:
    """Wait until every process is here and this one may end: the last collective of a program.

    A thread of gloo may still be letting go of the last tensors. It needs the interpreter for that, and aborts a
    process whose interpreter is closing (https://github.com/pytorch/pytorch/issues/190489).
    """
    PartialState().wait_for_everyone()
    if dist.is_available() and dist.is_initialized() and dist.get_backend() == dist.Backend.GLOO:
        time.sleep(GLOO_SECONDS)


@contextmanager
def leave_together() -> Iterator[None]:
    """Let processes that have ended their work, or give way, wait for the one that has a record to close.

    A launcher that sees one of them fail, or give way, gives the others 30 seconds.
    """
    try:
        yield
    except TerminatedError as error:
        if error.code == EXIT_CODE:  # of all, at the same step; another code may be of this process alone
            wait_to_end()
            PartialState().destroy_process_group()
        raise
    else:
        wait_to_end()
