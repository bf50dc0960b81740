"""Limits of calls of reward functions, served reward models and judges."""

import math
from dataclasses import dataclass, field
from typing import Literal

from rlhf_recipes.options.checks import check_choice, check_range

LONGEST_PAUSE_SECONDS = 60.0  # between two attempts of a call


@dataclass
class RewardCallConfig:
    """Limits of the calls of reward functions, served reward models and judges."""

    reward_timeout: float | None = field(
        default=300.0,
        metadata={
            "help": "Seconds that a call of a reward function, a served reward model or a judge may take. `null`: no "
            "limit, and functions run in the main thread."
        },
    )
    reward_retries: int = field(
        default=4, metadata={"help": "Further attempts of such a call that fails, after 1, 2, 4, .. seconds."}
    )
    failed_rewards: Literal["raise", "mask"] = field(
        default="raise",
        metadata={
            "help": "After the last attempt: `raise` ends the run; `mask` leaves the completions of the call without "
            "this reward, and out of the loss if they have no other."
        },
    )

    def check_reward_calls(self) -> None:
        """Refuse limits that are none."""
        check_choice(self, "failed_rewards", ("raise", "mask"))
        check_range(self, "reward_timeout", lambda x: x > 0, "be positive (`null` for no limit)")
        check_range(self, "reward_retries", lambda x: x >= 0, "not be negative")

    def longest_call(self) -> float:
        """Return after how many seconds a call has failed for good."""
        pauses = sum(min(2.0**attempt, LONGEST_PAUSE_SECONDS) for attempt in range(self.reward_retries))
        return math.inf if self.reward_timeout is None else (1 + self.reward_retries) * self.reward_timeout + pauses
