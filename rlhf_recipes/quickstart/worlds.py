"""The worlds that `recipes/quickstart.py` can build."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlhf_recipes.quickstart.report_world import REPORT_WORLD, report_score
from rlhf_recipes.quickstart.world import DEFAULT_WORLD, TextWorld, gold_score


@dataclass(frozen=True)
class World:
    """Hold what a pipeline needs to know about its world.

    Args:
        text: Source of prompts and demonstrations.
        gold_score: True score, with the signature of a TRL reward function.
        num_demonstrations: Rows for SFT.
        num_pairs: Preference pairs for training the reward model.
        max_completion_length: Tokens that the answers of a pair may have, the same as in `ppo.yaml`.
        label_noise: Temperature of the Bradley-Terry labels, in gold score.
    """

    text: TextWorld
    gold_score: Callable[..., Sequence[float]]
    num_demonstrations: int
    num_pairs: int
    max_completion_length: int
    label_noise: float


# The name is also that of the folders `recipes/configs/<name>` and `runs/<name>`.
WORLDS = {
    "quickstart": World(DEFAULT_WORLD, gold_score, 10_000, 4_800, max_completion_length=48, label_noise=1.0),
    "report": World(REPORT_WORLD, report_score, 9_600, 3_200, max_completion_length=112, label_noise=2.0),
}
