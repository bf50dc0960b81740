"""The result of a check."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """Report one result of a check.

    An error is certain to stop the run or to make it worthless. A warning may be right in some run.

    Args:
        level: `error` or `warning`.
        message: Text with the fact, the option and the remedy.
    """

    level: Literal["error", "warning"]
    message: str
