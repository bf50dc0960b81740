"""Reward-model training and PPO for language models, as thin subclasses of current TRL."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_recipes.options.ppo import PPOConfig
    from rlhf_recipes.options.process_reward_modeling import ProcessRewardModelConfig
    from rlhf_recipes.options.reward_modeling import RewardModelConfig
    from rlhf_recipes.tracking.training import train
    from rlhf_recipes.trainers.ppo import PPOTrainer
    from rlhf_recipes.trainers.process_reward_modeling import ProcessRewardModelTrainer
    from rlhf_recipes.trainers.reward_modeling import RewardModelTrainer

__all__ = [
    "PPOConfig",
    "PPOTrainer",
    "ProcessRewardModelConfig",
    "ProcessRewardModelTrainer",
    "RewardModelConfig",
    "RewardModelTrainer",
    "train",
]
__version__ = "0.1.0"
HOMES = {
    "PPOConfig": "options.ppo",
    "PPOTrainer": "trainers.ppo",
    "ProcessRewardModelConfig": "options.process_reward_modeling",
    "ProcessRewardModelTrainer": "trainers.process_reward_modeling",
    "RewardModelConfig": "options.reward_modeling",
    "RewardModelTrainer": "trainers.reward_modeling",
    "train": "tracking.training",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: the launcher needs no trainer, and they take seconds."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
