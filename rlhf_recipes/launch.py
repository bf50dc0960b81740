"""`rlhf-launch`: `accelerate launch` for containers and cluster jobs, which are signalled and read by their exit code.

    rlhf-launch --config_file accelerate_configs/multi_gpu.yaml recipes/ppo.py --config my_ppo.yaml

Layer L1. Its arguments are those of `accelerate launch`, which keeps signals from a single process, gives several 30
seconds before it kills them, and ends with 1 whatever they say. Here SIGTERM and SIGUSR1 reach the recipe's own
processes, which take the time that a checkpoint needs, and the exit code is theirs: 75 is a run that has given way.
"""

import signal
import sys
from collections.abc import Iterable
from contextlib import suppress
from subprocess import CalledProcessError
from types import FrameType

import psutil
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from rlhf_recipes.termination import EXIT_CODE, SIGNALS, terminate


def main() -> None:
    """Launch, and exit as the recipe does."""
    args = launch_command_parser().parse_args()
    args.signals_to_handle = "SIGINT"  # torchrun's own answer to SIGTERM would kill what takes longer
    for number in SIGNALS:
        signal.signal(number, _pass_on)
    try:
        launch_command(args)
    except CalledProcessError as error:  # of one process
        sys.exit(exit_code([error.returncode]))
    except ChildFailedError as error:
        failures = sorted(error.failures.values(), key=lambda failure: failure.timestamp)
        sys.exit(exit_code(failure.exitcode for failure in failures))


def _pass_on(number: int, frame: FrameType | None) -> None:
    processes = psutil.Process().children()
    if not processes:
        terminate(number, frame)
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # it has just ended
            process.send_signal(number)


def exit_code(codes: Iterable[int]) -> int:
    """Return one exit code for a run.

    Args:
        codes: Of its processes that have failed, the earliest first; negative if a signal has ended it.

    Returns:
        75 if any gave way, else that of the first; 128 + n after signal n, as a shell has it.
    """
    codes = list(codes)
    code = EXIT_CODE if EXIT_CODE in codes else codes[0]
    return code if code >= 0 else 128 - code
