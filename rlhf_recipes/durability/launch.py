"""`rlhf-launch`: `accelerate launch` for containers and cluster jobs, which are signalled and read by their exit code.

    rlhf-launch --config_file accelerate_configs/multi_gpu.yaml recipes/ppo.py --config my_ppo.yaml

Its arguments are those of `accelerate launch`, which keeps signals from a single process, gives several 30
seconds before it kills them, and ends with 1 whatever they say. Here SIGTERM and SIGUSR1 reach the recipe's own
processes, which take the time that a checkpoint needs, and the exit code is theirs: 75 is a run that has given way.
"""

import os
import signal
import socket
import sys
from argparse import Namespace
from collections.abc import Iterable
from contextlib import suppress
from subprocess import CalledProcessError
from threading import Thread

import psutil

from rlhf_recipes.durability.termination import EXIT_CODE, SIGNALS


def main() -> None:
    """Launch, and exit as the recipe does."""
    listen()
    # After the handlers: the first process of a container is deaf to what it has no handler for.
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    asked = launch_command_parser().parse_args()
    # With `quiet`, accelerate hides the exit code. torchrun's handler of SIGTERM kills a process after 30 seconds.
    needed = {"quiet": False, "signals_to_handle": "SIGINT,SIGHUP,SIGQUIT"}
    try:
        launch_command(Namespace(**vars(asked) | needed))
    except CalledProcessError as error:  # of one process
        sys.exit(exit_code([error.returncode]))
    except ChildFailedError as error:
        failures = sorted(error.failures.values(), key=lambda failure: failure.timestamp)
        code = exit_code(failure.exitcode for failure in failures)
        if code != EXIT_CODE:
            sys.stderr.write(f"{error}\n")
        sys.exit(code)
    except SignalException as error:
        sys.exit(128 + error.sigval)


def listen() -> None:
    """Pass signals on from now on, in a thread: the main one may wait for another node, deaf to Python's handlers."""
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: None)
    signal.set_wakeup_fd(sender.detach())
    Thread(target=_pass_on, args=(receiver,), daemon=True).start()


def _pass_on(receiver: socket.socket) -> None:
    while True:
        number = receiver.recv(1)[0]
        if number not in SIGNALS:
            continue
        processes = psutil.Process().children()
        if not processes:
            os._exit(EXIT_CODE)  # nothing has begun
        for process in processes:
            with suppress(psutil.NoSuchProcess):  # it has just ended
                process.send_signal(number)


def exit_code(codes: Iterable[int]) -> int:
    """Return one exit code for a run.

    Args:
        codes: Of its processes that have failed, the earliest first; negative if a signal has ended it.

    Returns:
        75 if any gave way, or the first was ended by a signal that asks for it, before it could save or after all was
        saved; else that of the first, 128 + n after another signal n, as a shell has it.
    """
    shown = [code if code >= 0 else 128 - code for code in codes]
    asked = [128 + number for number in SIGNALS]
    return EXIT_CODE if EXIT_CODE in shown or shown[0] in asked else shown[0]
