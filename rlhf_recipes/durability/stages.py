"""Stages that follow each other, each in a process of its own."""

import multiprocessing
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch


def start_method() -> str:
    """Return how to start a stage.

    A fork already has all imports, which saves a minute. It cannot use CUDA once its parent has asked for a device.
    """
    return "spawn" if torch.cuda.is_available() else "fork"


def run_stages(stages: Iterable[str], run: Callable[..., None], *arguments: Any) -> None:
    """Run stages one after the other, each in one thread, and exit after the first that fails.

    Args:
        stages: Names.
        run: Function of a name and the arguments, at the top level of its module: a spawned process imports it.
        arguments: Passed on, as pickles if a process is spawned.
    """
    context: Any = multiprocessing.get_context(start_method())
    for stage in stages:
        process = context.Process(target=_run_in_one_thread, args=(run, stage, *arguments))
        process.start()
        try:
            process.join()
        finally:
            process.terminate()
        if process.exitcode:
            sys.exit(f"The stage `{stage}` failed; its message is above.")


def _run_in_one_thread(run: Callable[..., None], *arguments: Any) -> None:
    # With more, products of small matrices wait for each other. On a busy machine they take several times as long.
    torch.set_num_threads(1)
    run(*arguments)
