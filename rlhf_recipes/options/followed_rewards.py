"""What a training makes of the scores of its reward model, beside the limits of the calls."""

from dataclasses import dataclass, field
from typing import Literal

from rlhf_recipes.options.reward_calls import RewardCallConfig


@dataclass
class FollowedRewardConfig(RewardCallConfig):
    """Options of a training that follows a reward model."""

    reward_heads: Literal["mean", "pessimistic", "soft_min"] = field(
        default="mean",
        metadata={
            "help": "Score of a reward model with several heads (`score_heads`). `mean`: their mean. `pessimistic`: "
            "the mean minus `reward_heads_coef` standard deviations. `soft_min`: less where they disagree, and near "
            "their minimum for a small `reward_heads_coef`, which has the unit of the score. A served reward model "
            "gives the mean."
        },
    )
    reward_heads_coef: float = field(
        default=1.0, metadata={"help": "Coefficient of `reward_heads: pessimistic` and `reward_heads: soft_min`."}
    )


@dataclass
class ShapedRewardConfig(FollowedRewardConfig):
    """Options of PPO, which can also bound the score."""

    reward_shaping: Literal["none", "par"] = field(
        default="none",
        metadata={
            "help": "`par`: instead of its score, an answer gets the probability that it is better than a reference "
            "answer, by the reward model; the mean over the prompt's `reference_answers`, a column of the data. This "
            "is bounded, so it needs `reward_norm: false`, and `kl_coef` is the price of a nat in probability."
        },
    )

    def check_shaping(self, *, reward_norm: bool) -> None:
        """Refuse a normaliser that would undo the bound.

        Raises:
            ValueError: If both are asked for.
        """
        if self.reward_shaping != "none" and reward_norm:
            raise ValueError(
                f"`reward_shaping: {self.reward_shaping}` needs `reward_norm: false`: a reward near its bound has a "
                "small deviation, and divided by it the reward would not be bounded. Multiply `kl_coef` by the "
                "deviation of the new reward, which is about 0.2."
            )
