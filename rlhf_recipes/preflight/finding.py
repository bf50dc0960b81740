"""What a check has found."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """What a check has found.

    An error is what is bound to stop or void the run. All else that can be right in some run is a warning.

    Args:
        level: `error` or `warning`.
        message: What was found, the option, and the way out.
    """

    level: Literal["error", "warning"]
    message: str
