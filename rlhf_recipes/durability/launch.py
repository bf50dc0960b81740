"""`rlhf launch`: `accelerate launch` for containers and cluster jobs, which use signals and exit codes.

    rlhf launch --config_file accelerate_configs/multi_gpu.yaml recipes/ppo.py --config my_ppo.yaml

It takes the arguments of `accelerate launch`. That command does not pass a signal on to a single process, kills
several processes 30 seconds after it, and always fails with 1. Here SIGTERM, SIGUSR1, SIGHUP and Ctrl-C reach the
processes of the recipe. They have as much time as a checkpoint needs, and their exit code is the launcher's. 75: the
run stopped at a signal and can be resumed.
"""

import os
import signal
import socket
import sys
import traceback
from argparse import Namespace
from collections.abc import Iterable, Sequence
from contextlib import suppress
from subprocess import CalledProcessError
from threading import Thread

import psutil

from rlhf_recipes.durability.termination import EXIT_CODE, SIGNALS, STOPS, leave_closed_terminal

CHECKS = ("accelerate.commands.launch", "accelerate.utils.launch")  # modules that check options and ports


def main(arguments: Sequence[str]) -> None:
    """Launch a script, and exit with its code.

    Args:
        arguments: Those of `accelerate launch`: its options, the script, and the options of the script.
    """
    listen()
    # Only now: the first process of a container ignores signals without a handler, and these imports take seconds.
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    asked = launch_command_parser().parse_args(arguments)
    # With `quiet`, accelerate hides the exit code. torchrun's handler of these kills a process after 30 seconds.
    needed = {"quiet": False, "signals_to_handle": "SIGQUIT"}
    try:
        launch_command(Namespace(**vars(asked) | needed))
    except CalledProcessError as error:  # of one process
        sys.exit(exit_code([error.returncode]))
    except ChildFailedError as error:
        failures = sorted(error.failures.items(), key=lambda failure: failure[1].timestamp)
        code = exit_code(failure.exitcode for _, failure in failures)
        if code != EXIT_CODE:
            rank, first = failures[0]
            sys.stderr.write(f"Process {rank} ended first, with {first.exitcode}. Its message is above.\n")
        sys.exit(code)
    except (ConnectionError, ValueError) as error:  # a port that is taken, or options that contradict each other
        if not _is_refusal(error):
            raise
        sys.exit(f"Error: {' '.join(str(error).split())}")
    except SignalException as error:
        sys.exit(128 + error.sigval)


def _is_refusal(error: Exception) -> bool:
    """Return whether a check of accelerate has raised an error. Another error keeps its traceback."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__") in CHECKS


def listen() -> None:
    """Pass signals on in a thread: while the main thread waits for another node, it runs no handlers of Python."""
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    for number in STOPS:
        signal.signal(number, lambda number, frame: leave_closed_terminal(number))
    signal.set_wakeup_fd(sender.detach())
    Thread(target=_pass_on, args=(receiver,), daemon=True).start()


def _pass_on(receiver: socket.socket) -> None:
    while True:
        number = receiver.recv(1)[0]
        if number not in STOPS:
            continue
        processes = psutil.Process().children()
        if not processes:
            os._exit(exit_code([-number]))  # nothing has started
        for process in processes:
            with suppress(psutil.NoSuchProcess):  # it has ended in the meantime
                process.send_signal(number)


def exit_code(codes: Iterable[int]) -> int:
    """Return one exit code for a run.

    Args:
        codes: Exit codes of the processes that failed, the earliest first; negative after a signal.

    Returns:
        75 if any process stopped for a resume, or if one of `SIGNALS` ended the first one before it listened to
        signals or after it had saved. Else the code of the first; 128 + n after another signal n, as in a shell. So
        130 after Ctrl-C without a checkpoint: no scheduler should start that run again.
    """
    shown = [code if code >= 0 else 128 - code for code in codes]
    asked = [128 + number for number in SIGNALS]
    return EXIT_CODE if EXIT_CODE in shown or shown[0] in asked else shown[0]
