"""Stages that follow each other, each in a process of its own."""

import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from rlhf_recipes.console import duration, print_lines


def start_method() -> str:
    """Return how to start a stage.

    A fork already has all imports, which saves a minute. It cannot use CUDA once its parent has asked for a device.
    """
    return "spawn" if torch.cuda.is_available() else "fork"


def run_stages(
    stages: Mapping[str, str], run: Callable[..., None], *arguments: Any, go_on: Callable[[str], str]
) -> None:
    """Run stages one after the other, each in one thread, and exit after the first that fails.

    Print the title and the time of each.

    Args:
        stages: Titles by name.
        run: Function of a name and the arguments, at the top level of its module: a spawned process imports it.
        arguments: Passed on, as pickles if a process is spawned.
        go_on: Function from the name of a stage that failed to the command that goes on with it.
    """
    context: Any = multiprocessing.get_context(start_method())
    for stage, title in stages.items():
        print_lines("", title)
        begin = time.monotonic()
        process = context.Process(target=_run_in_one_thread, args=(run, stage, *arguments))
        process.start()
        try:
            process.join()
        finally:
            process.terminate()
        took = duration(time.monotonic() - begin)
        if process.exitcode:
            sys.exit(
                f"The stage `{stage}` failed after {took}; its message is above. Remove the cause, and go on with "
                f"`{go_on(stage)}`."
            )
        print_lines(f"The stage `{stage}` took {took}.")


def _run_in_one_thread(run: Callable[..., None], *arguments: Any) -> None:
    # With more, products of small matrices wait for each other. On a busy machine they take several times as long.
    torch.set_num_threads(1)
    run(*arguments)
