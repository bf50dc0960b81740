"""Stages that follow each other, each in a process of its own."""

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from rlhf_recipes.console import duration, print_lines
from rlhf_recipes.durability.checkpoints import checkpoints_by_age
from rlhf_recipes.durability.going_on import remedy
from rlhf_recipes.durability.launch import exit_code
from rlhf_recipes.durability.state import STATE_FILE
from rlhf_recipes.durability.termination import EXIT_CODE, STOPS, TerminatedError, leave_closed_terminal
from rlhf_recipes.options.commands import COMMAND


def start_method() -> str:
    """Return how to start a stage.

    A fork already has all imports, which saves a minute. It cannot use CUDA once its parent has asked for a device.
    """
    return "spawn" if torch.cuda.is_available() else "fork"


def run_stages(stages: Mapping[str, str], run: Callable[..., None], *arguments: Any) -> None:
    """Run stages one after the other, each in one thread, and exit after the first that fails or that a signal stops.

    Print the title and the time of each.

    Args:
        stages: Titles by name.
        run: Function of a name and the arguments, at the top level of its module: a spawned process imports it.
        arguments: Passed on, as pickles if a process is spawned.
    """
    context: Any = multiprocessing.get_context(start_method())
    followers = [*list(stages)[1:], None]
    for (stage, title), following in zip(stages.items(), followers, strict=True):
        print_lines("", title)
        begin = time.monotonic()
        process = context.Process(target=_run_in_one_thread, args=(run, stage, *arguments))
        process.start()
        try:
            with _signals_passed_on(process.pid) as received:
                process.join()
        finally:
            process.terminate()
        left = stage if process.exitcode else following  # a signal may come too late for a stage
        if received and left:
            sys.stderr.write(f"Stopped by a signal in stage `{stage}`.{remedy('--start', left)}\n")
            raise TerminatedError(exit_code([process.exitcode]) or EXIT_CODE)
        took = duration(time.monotonic() - begin)
        if process.exitcode:
            sys.exit(
                f"The stage `{stage}` failed after {took}; its message is above. Remove the cause."
                f"{remedy('--start', stage)}"
            )
        print_lines(f"The stage `{stage}` took {took}.")


def continued(folder: Path, start: str, seed: int, identity_file: str) -> list[str]:
    """Return the options with which a training goes on that a signal has stopped, if it is the first stage of now.

    A training with another seed is another one, and starts anew.

    Args:
        folder: Output directory of the training, with the name of its stage.
        start: Name of the first stage.
        seed: Seed of now.
        identity_file: File in a checkpoint with the options of its run. PPO has them in its state.
    """
    checkpoints = checkpoints_by_age(folder)
    if folder.name != start or not checkpoints or (folder / "model.safetensors").exists():
        return []
    is_same = _seed_of(checkpoints[-1], identity_file) in (None, seed)
    return ["--resume_from_checkpoint", "true"] if is_same else []


def _seed_of(checkpoint: Path, identity_file: str) -> int | None:
    """Return the seed of the run of a checkpoint; `None` if it does not say."""
    files = [path for path in (checkpoint / identity_file, checkpoint / STATE_FILE) if path.is_file()]
    try:
        state = json.loads(files[0].read_text(encoding="utf-8")) if files else {}
    except ValueError:  # a damaged checkpoint, which the resume names
        return None
    seed: int | None = state.get("run", state).get("`seed`")
    return seed


@contextmanager
def _signals_passed_on(pid: int) -> Iterator[list[int]]:
    """Pass signals on to a process inside, and collect them: it has as much time as a checkpoint needs."""
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        leave_closed_terminal(number)
        received.append(number)
        with suppress(ProcessLookupError):  # it has ended in the meantime
            os.kill(pid, number)

    before: dict[int, Any] = {number: signal.signal(number, pass_on) for number in STOPS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run_in_one_thread(run: Callable[..., None], *arguments: Any) -> None:
    # With more, products of small matrices wait for each other. On a busy machine they take several times as long.
    torch.set_num_threads(1)
    os.environ[COMMAND] = ""  # the first process tells how to go on
    try:
        run(*arguments)
    except KeyboardInterrupt:  # multiprocessing would print its traceback
        sys.exit(128 + signal.SIGINT)
