"""The critic of `PPOTrainer`: what it reads, its shape, and how it is trained."""

from dataclasses import dataclass, field
from typing import Literal

FITTED = ("reward", "adapter")  # critics that are no part of the policy, and are fitted between rollouts
ONLY_WITH = {"vf_coef": ("policy",), "cliprange_value": ("policy",), "critic_epochs": FITTED}  # option and its critics


@dataclass
class CriticConfig:
    """Options of the critic."""

    critic: Literal["policy", "reward", "adapter"] = field(
        default="policy",
        metadata={
            "help": "Hidden states that the value head reads. `policy`: the policy's own; the head trains with the "
            "policy. `reward`: the reward model's, from the forward that scores; the head is fitted between rollouts. "
            "`adapter`: those of a LoRA of its own on the backbone of a LoRA policy, which starts from "
            "`reward_adapter`; both are fitted between rollouts."
        },
    )
    critic_epochs: int = field(
        default=4,
        metadata={
            "help": "With `critic: reward` or `adapter`, passes over a rollout after its advantages are known. With "
            "`adapter` each one costs a forward and a backward of the backbone."
        },
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
            "move; 1e-3 with the other critics. The LoRA of `critic: adapter` has a tenth of it."
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
        if self.critic in FITTED and self.value_gradient_to_backbone:
            network = {"reward": "reward model", "adapter": "backbone"}[self.critic]
            raise ValueError(f"`value_gradient_to_backbone` needs `critic: policy`: the {network} must not change.")
        if self.critic in FITTED and self.critic_warmup_steps:
            raise ValueError(
                f"`critic_warmup_steps` needs `critic: policy`. `critic: {self.critic}` is fitted before the first "
                "rollout by `critic_dataset_name`."
            )
        for name, critics in ONLY_WITH.items():
            value, default = getattr(self, name), CriticConfig.__dataclass_fields__[name].default
            if self.critic not in critics and value != default:
                raise ValueError(f"`{name}` {value} has no effect with `critic: {self.critic}`. Leave it out.")
