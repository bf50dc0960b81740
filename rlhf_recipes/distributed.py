"""Statistics over all ranks, and their common end.

Layer L1. Every rank must make each call. On one process these are the local statistics.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from rlhf_recipes.termination import EXIT_CODE, TerminatedError

GLOO_SECONDS = 0.5  # a thread that can run needs milliseconds, even with many times more threads than cores


def global_sum(values: Tensor) -> Tensor:
    """Return the elementwise sum of `values` over all ranks of the default process group, if there is one."""
    total = values.clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
    return total


def global_max(values: Tensor) -> Tensor:
    """Return the elementwise maximum of `values` over all ranks of the default process group, if there is one."""
    largest = values.clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def global_moments(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return `(count, mean, var)` of the masked cells of all ranks, as scalars.

    Two passes: the squared deviations are taken from the global mean, so nothing cancels. A rank may be empty; if all
    are, the answer is `(0, 0, 0)`. The variance is the population's.

    Args:
        values: Any shape.
        mask: Same shape, 1 = counts.
    """
    mask = mask.bool()
    # A device without float64 (Apple's MPS) keeps float32.
    dtype = torch.float32 if values.device.type == "mps" else torch.float64
    filled = torch.where(mask, values.detach(), 0).to(dtype)
    count, total = global_sum(torch.stack([mask.sum().to(dtype), filled.sum()])).unbind()
    mean = total / count.clamp(min=1)
    squared = torch.where(mask, (filled - mean) ** 2, 0).sum()
    return count, mean, global_sum(squared) / count.clamp(min=1)


def global_var(values: Tensor, mask: Tensor) -> Tensor:
    """Return the population variance of the masked cells of all ranks."""
    return global_moments(values, mask)[2]


def global_means(mask: Tensor, *values: Tensor) -> tuple[float, list[float]]:
    """Return the number of masked cells of all ranks, and the mean of each tensor over them.

    One reduction and one wait for the device, however many tensors: meant for metrics.

    Args:
        mask: 1 = counts.
        values: Each of the mask's shape.
    """
    totals = [torch.where(mask.bool(), value, 0).float().sum() for value in values]
    count, *sums = global_sum(torch.stack([mask.sum().float(), *totals])).tolist()
    return count, [total / max(count, 1.0) for total in sums]


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
