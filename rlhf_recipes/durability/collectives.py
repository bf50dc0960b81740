"""Let no process wait for the others longer than `ddp_timeout`, and say so when the time is over."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

# Gloo raises no class of its own.
_OVER = re.compile(r"Timed out waiting (\d+)ms")


def limit_collectives(seconds: float) -> None:
    """Set the time limit of collectives on CPUs. With `use_cpu`, transformers ignores `ddp_timeout`.

    Args:
        seconds: Limit, `ddp_timeout`.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_backend() == dist.Backend.GLOO:
        _set_pg_timeout(timedelta(seconds=seconds))


@contextmanager
def hangs_named() -> Iterator[None]:
    """Name the option and the remedy if another process does not come to a collective in time.

    Raises:
        TimeoutError: If the time limit of a collective is over.
    """
    try:
        yield
    except RuntimeError as error:
        if (over := _OVER.search(str(error))) is None:
            raise
        raise TimeoutError(
            f"Another process has not answered for {int(over[1]) / 1000:g} s (`ddp_timeout`): it hangs, or its work "
            "takes longer. Look at its last messages. A training can raise `ddp_timeout`, and its last checkpoint is "
            "whole: resume it with `resume_from_checkpoint: true`."
        ) from error
