"""Options of `recipes/baseline.py`, beside those of TRL's trainers."""

from dataclasses import dataclass, field
from typing import Any, Literal

import trl

from rlhf_recipes.options.dropout import DropoutConfig
from rlhf_recipes.options.followed_rewards import FollowedRewardConfig
from rlhf_recipes.options.recipes import RewardArguments
from rlhf_recipes.options.resume import ResumeConfig


@dataclass
class BaselineArguments(FollowedRewardConfig, RewardArguments):
    """Method, rewards and judges of `recipes/baseline.py`."""

    method: Literal["rloo", "grpo", "dpo"] = field(
        default="rloo", metadata={"help": "Trainer of TRL: RLOOTrainer, GRPOTrainer or DPOTrainer."}
    )
    response_separator: str = field(
        default="\n\n", metadata={"help": "The same as in SFT and reward modelling; for plain text only."}
    )


@dataclass
class RLOOConfig(DropoutConfig, ResumeConfig, trl.RLOOConfig):
    """Options of TRL's RLOO."""


@dataclass
class GRPOConfig(DropoutConfig, ResumeConfig, trl.GRPOConfig):
    """Options of TRL's GRPO."""


@dataclass
class DPOConfig(ResumeConfig, trl.DPOConfig):
    """Options of TRL's DPO, and the length of the answers in an evaluation: DPO itself samples nothing."""

    max_completion_length: int = field(
        default=512, metadata={"help": "Tokens per answer in an evaluation, as in RLOO and GRPO."}
    )


# The class of options of each method.
CONFIGS: dict[str, type[Any]] = {"rloo": RLOOConfig, "grpo": GRPOConfig, "dpo": DPOConfig}


def samples_rollouts(args: Any) -> bool:
    """Return whether a trainer with these options samples its training data from the policy."""
    return hasattr(args, "steps_per_generation")


def rollout_steps(args: Any) -> int:
    """Return the number of optimiser steps on one rollout, at least 1."""
    return max(int(args.num_iterations * args.steps_per_generation // args.gradient_accumulation_steps), 1)
