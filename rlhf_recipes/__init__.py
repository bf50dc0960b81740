"""Reward-model training and PPO for language models, as thin subclasses of current TRL."""

from rlhf_recipes.configs import PPOConfig, RewardModelConfig
from rlhf_recipes.ppo_trainer import PPOTrainer
from rlhf_recipes.reward_trainer import RewardModelTrainer

__all__ = ["PPOConfig", "PPOTrainer", "RewardModelConfig", "RewardModelTrainer"]
__version__ = "0.1.0"
