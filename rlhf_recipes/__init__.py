"""Reward-model training and PPO for language models, as thin subclasses of current TRL."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_recipes.configs import PPOConfig, RewardModelConfig
    from rlhf_recipes.ppo_trainer import PPOTrainer
    from rlhf_recipes.reward_trainer import RewardModelTrainer

__all__ = ["PPOConfig", "PPOTrainer", "RewardModelConfig", "RewardModelTrainer"]
__version__ = "0.1.0"
HOMES = {"PPOTrainer": "ppo_trainer", "RewardModelTrainer": "reward_trainer"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: the launcher needs no trainer, and they take seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOMES.get(name, 'configs')}"), name)
