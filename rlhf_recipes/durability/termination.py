"""The signals that stop a run, and the exit code of a stopped run.

Imports only the standard library: a launcher must start at once.
"""

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again later


class TerminatedError(SystemExit):
    """A signal that ends the process, as an exception: the run can close its records on the way out."""


def terminate(number: int, frame: FrameType | None) -> None:
    """Handle a signal: end the process with the code that a shell has for it.

    Raises:
        TerminatedError: Always.
    """
    raise TerminatedError(128 + number)
