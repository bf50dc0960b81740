"""What asks a run to give way, and how it says that it did.

, without imports beyond the standard library: a launcher must start at once.
"""

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again later


class TerminatedError(SystemExit):
    """A signal that ends the process, as an exception that unwinds the run."""


def terminate(number: int, frame: FrameType | None) -> None:
    """End the process with the shell's code for a signal; a handler.

    Raises:
        TerminatedError: Always.
    """
    raise TerminatedError(128 + number)
