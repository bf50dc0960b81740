"""Options of `RewardModelTrainer`: TRL's, and those that TRL lacks."""

from dataclasses import dataclass, field

from trl import RewardConfig

from rlhf_recipes.options.checks import check_options
from rlhf_recipes.options.resume import ResumeConfig
from rlhf_recipes.options.training import check_training


@dataclass
class RewardModelConfig(ResumeConfig, RewardConfig):
    """Options of `RewardModelTrainer`: those of `trl.RewardConfig`, and new ones."""

    weight_decay: float = field(
        default=0.01,
        metadata={"help": "Weight decay. It keeps the scores bounded, which training does not normalise."},
    )
    l2_coefficient: float = field(
        default=0.0, metadata={"help": "Weight of the mean squared score, added to the Bradley-Terry loss."}
    )
    score_heads: int = field(
        default=1,
        metadata={
            "help": "Score heads on the backbone. With several, each learns from half of the pairs. Where they "
            "disagree, the reward model is unsure: see `reward_heads` of PPO."
        },
    )
    response_separator: str = field(
        default="\n\n",
        metadata={
            "help": "Boundary between a plain-text prompt and its response. It is written to the reward model card, "
            "and PPO must use the same. Chat prompts use the assistant header of the chat template instead."
        },
    )

    def __post_init__(self) -> None:
        check_options(self)
        super().__post_init__()
        check_training(self)
