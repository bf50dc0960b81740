"""Options of `ProcessRewardModelTrainer`: TRL's for reward modelling, and those of steps."""

from dataclasses import dataclass, field
from typing import Literal

from trl import RewardConfig

from rlhf_recipes.options.checks import check_options
from rlhf_recipes.options.resume import ResumeConfig
from rlhf_recipes.options.training import check_training


@dataclass
class ProcessRewardModelConfig(ResumeConfig, RewardConfig):
    """Options of `ProcessRewardModelTrainer`: those of `trl.RewardConfig`, and new ones."""

    response_separator: str = field(
        default="\n\n",
        metadata={
            "help": "Boundary between a plain-text prompt and its steps. It is written to the card, and PPO must use "
            "the same. Chat prompts use the assistant header of the chat template instead."
        },
    )
    step_separator: str = field(
        default="\n",
        metadata={
            "help": "Text between two steps. The model judges a step at the last token of the separator after it. It "
            "is written to the card, and PPO splits answers at it."
        },
    )
    step_boundary: Literal["separator", "sentence"] = field(
        default="separator",
        metadata={
            "help": "Where PPO splits an answer into steps: at every `step_separator`, or only at one that follows a "
            "full stop, an exclamation mark or a question mark. It is written to the card."
        },
    )
    step_reward: Literal["signed", "probability", "log_odds", "difference"] = field(
        default="signed",
        metadata={
            "help": "Reward that PPO gets for a step from its probability p of being right: 2p - 1; p; log(p / (1 - "
            "p)); or p minus that of the step before. It is written to the card."
        },
    )
    train_on_last_step_only: bool = field(
        default=False,
        metadata={"help": "Whether only the label of the last step is trained. Evaluations use all labels."},
    )

    def __post_init__(self) -> None:
        check_options(self)
        super().__post_init__()
        check_training(self)
        if self.step_separator == "":
            raise ValueError(
                "`step_separator` is empty, so nothing tells where a step ends. Write a text, e.g. '\\n'."
            )
        if self.center_rewards_coefficient is not None:
            raise ValueError(
                "`center_rewards_coefficient` is about scores of pairs. The probability of a step needs none: leave "
                "it out."
            )
