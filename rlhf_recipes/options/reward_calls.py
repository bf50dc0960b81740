"""Limits of calls of reward functions, reward models and judges."""

import math
from dataclasses import dataclass, field
from typing import Literal

LONGEST_PAUSE_SECONDS = 60.0  # between two attempts of a call


@dataclass
class RewardCallConfig:
    """Limits of the calls of reward functions, reward models and judges."""

    reward_timeout: float | None = field(
        default=300.0,
        metadata={
            "help": "Time limit in seconds for a call of a reward function, a served reward model or a judge. `null`: "
            "no limit, and functions run in the main thread."
        },
    )
    reward_retries: int = field(
        default=4, metadata={"help": "Further attempts after a call fails, after pauses of 1, 2, 4, .. seconds."}
    )
    failed_rewards: Literal["raise", "mask"] = field(
        default="raise",
        metadata={
            "help": "After the last attempt: `raise` ends the run. `mask` lets the completions of the call have no "
            "such reward; without any reward, they are not in the loss."
        },
    )

    reward_overflow: Literal["raise", "cut"] = field(
        default="raise",
        metadata={
            "help": "If a prompt and `max_completion_length` have more tokens than a reward model with learned "
            "positions (GPT-2, OPT, ..) can read: `raise` refuses the run before it starts. `cut` lets the reward "
            "model read only the last tokens of prompt and completion."
        },
    )

    def longest_call(self) -> float:
        """Return the seconds until the last attempt of a call has failed."""
        pauses = sum(min(2.0**attempt, LONGEST_PAUSE_SECONDS) for attempt in range(self.reward_retries))
        return math.inf if self.reward_timeout is None else (1 + self.reward_retries) * self.reward_timeout + pauses
