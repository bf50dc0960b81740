"""The critic of `PPOTrainer`: what it reads, its shape, and how it is trained."""

from dataclasses import dataclass, field
from typing import Literal

ONLY_WITH = {"vf_coef": "policy", "cliprange_value": "policy", "critic_epochs": "reward"}  # option and its critic


@dataclass
class CriticConfig:
    """Options of the critic."""

    critic: Literal["policy", "reward"] = field(
        default="policy",
        metadata={
            "help": "Hidden states that the value head reads. `policy`: the policy's own; the head trains with the "
            "policy. `reward`: the reward model's, from the forward that scores; the head is fitted between rollouts."
        },
    )
    critic_epochs: int = field(
        default=4, metadata={"help": "With `critic: reward`, passes over a rollout after its advantages are known."}
    )
    value_head_size: int | None = field(
        default=None,
        metadata={"help": "Width of the value head's hidden layer. Default: that of the states that it reads."},
    )
    value_head_activation: Literal["silu", "gelu"] = field(
        default="silu", metadata={"help": "Activation of the value head: `silu` or `gelu`. ReLU is refused."}
    )
    value_gradient_to_backbone: bool = field(
        default=False,
        metadata={
            "help": "Let the value loss train the backbone too. This is known to make the policy worse than SFT."
        },
    )
    value_head_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the value head. With `critic: policy` it has the policy's schedule. Default: "
            "ten times `learning_rate`, because a new head must follow the scores faster than a trained backbone may "
            "move; 1e-3 with `critic: reward`."
        },
    )
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    cliprange_value: float = field(
        default=0.2, metadata={"help": "Trust region of the value function, in units of the normalised score."}
    )
    critic_warmup_steps: int = field(
        default=0, metadata={"help": "Optimiser steps at the start that train only the value head."}
    )

    def set_critic_learning_rate(self, learning_rate: float) -> None:
        """Choose the learning rate of the value head, if the user has not."""
        if self.value_head_learning_rate is None:
            self.value_head_learning_rate = 10 * learning_rate if self.critic == "policy" else 1e-3

    def check_critic(self) -> None:
        """Refuse options that have no effect or no place with the chosen critic."""
        if self.critic == "reward" and self.value_gradient_to_backbone:
            raise ValueError("`value_gradient_to_backbone` needs `critic: policy`: the reward model must not change.")
        if self.critic == "reward" and self.critic_warmup_steps:
            raise ValueError(
                "`critic_warmup_steps` needs `critic: policy`. `critic: reward` is fitted before the first rollout by "
                "`critic_dataset_name`."
            )
        for name, critic in ONLY_WITH.items():
            value, default = getattr(self, name), CriticConfig.__dataclass_fields__[name].default
            if critic != self.critic and value != default:
                raise ValueError(f"`{name}` {value} has no effect with `critic: {self.critic}`. Leave it out.")
