"""The recipes that the command runs: for each its script, its options, and those that are used most."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

_RECIPES = "rlhf_recipes.options.recipes:"
_AROUND = ("trl:ModelConfig", f"{_RECIPES}TrackingArguments", f"{_RECIPES}PreflightArguments")
_RUN = "model_name_or_path dataset_name output_dir learning_rate max_steps use_peft load_in_4bit"
_SAFETY = "resume_from_checkpoint preflight_only"


@dataclass(frozen=True)
class Stage:
    """Describe a recipe.

    Args:
        script: Name of its file, without the suffix.
        purpose: One line for the lists of commands.
        kinds: Dataclasses of its options, each as `module:name`. Without any, the recipe explains its few options.
        used: Names of the options that are used most, with spaces between them.
        launched: Whether accelerate starts it, in one or several processes.
    """

    script: str
    purpose: str
    kinds: tuple[str, ...] = ()
    used: str = ""
    launched: bool = False

    def options(self, method: str = "rloo") -> tuple[type, ...]:
        """Import the dataclasses of the options, which takes seconds.

        Args:
            method: Method of `baseline`, which chooses one of its dataclasses.
        """
        import_module("rlhf_recipes.console")  # first: imports below print notes
        found = (_named(kind) for kind in self.kinds)
        return tuple(kind[method] if isinstance(kind, Mapping) else kind for kind in found)


def _named(reference: str) -> Any:
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)


STAGES = {
    "quickstart": Stage("quickstart", "Run all stages in a small world, on two CPU cores, without network."),
    "sft": Stage(
        "sft",
        "Train a policy on demonstrations: the policy that PPO starts from.",
        (
            *("trl:ScriptArguments", "rlhf_recipes.options.sft:SFTConfig", "trl:ModelConfig"),
            *(f"{_RECIPES}BoundaryArguments", *_AROUND[1:]),
        ),
        f"{_RUN} num_train_epochs per_device_train_batch_size {_SAFETY}",
        launched=True,
    ),
    "reward-modeling": Stage(
        "reward_modeling",
        "Train a reward model on preferences.",
        ("trl:ScriptArguments", "rlhf_recipes.options.reward_modeling:RewardModelConfig", *_AROUND),
        f"{_RUN} num_train_epochs per_device_train_batch_size {_SAFETY}",
        launched=True,
    ),
    "process-reward-modeling": Stage(
        "process_reward_modeling",
        "Train a model that judges the steps of an answer.",
        ("trl:ScriptArguments", "rlhf_recipes.options.process_reward_modeling:ProcessRewardModelConfig", *_AROUND),
        f"{_RUN} step_separator num_train_epochs per_device_train_batch_size {_SAFETY}",
        launched=True,
    ),
    "ppo": Stage(
        "ppo",
        "Train a policy with PPO. Without options, it is the stage of the quickstart.",
        (f"{_RECIPES}PPOArguments", "rlhf_recipes.options.ppo:PPOConfig", *_AROUND),
        f"{_RUN} reward_model_path reward_functions reward_adapter judge_models kl_coef target_kl "
        f"per_device_train_batch_size steps_per_generation num_iterations max_completion_length {_SAFETY}",
        launched=True,
    ),
    "baseline": Stage(
        "baseline",
        "Train by TRL's RLOO, GRPO or DPO, to compare with PPO.",
        ("rlhf_recipes.options.baselines:BaselineArguments", "rlhf_recipes.options.baselines:CONFIGS", *_AROUND),
        f"method {_RUN} reward_model_path max_completion_length {_SAFETY}",
        launched=True,
    ),
    "sample-preferences": Stage(
        "sample_preferences",
        "Sample answers of a policy, and label pairs of them.",
        ("rlhf_recipes.options.preferences:PreferenceArguments", *_AROUND[:2]),
        "model_name_or_path dataset_name reward_model_path judge_models judge_functions label_file num_samples "
        "pair_answers earlier_pairs max_completion_length output_dir",
    ),
    "evaluate": Stage(
        "evaluate",
        "Compare two policies on held-out prompts.",
        (f"{_RECIPES}EvaluationArguments", *_AROUND[:2]),
        "model_name_or_path baseline_path reward_model_path judge_models dataset_name best_of num_prompts "
        "max_completion_length output_dir",
    ),
    "evaluate-reward-model": Stage(
        "evaluate_reward_model",
        "Measure how well reward models rank answers, and compare them.",
        ("rlhf_recipes.options.reward_model_evaluation:RewardModelEvaluationArguments", *_AROUND[:2]),
        "reward_models dataset_name dataset_test_split category_column judge_functions best_of_dataset_name "
        "model_name_or_path num_samples max_completion_length output_dir",
    ),
    "compare": Stage(
        "compare",
        "Compare the runs of an experiment on one page.",
        (f"{_RECIPES}ComparisonArguments",),
        "experiment runs tracking_uri output_dir",
    ),
    "export": Stage(
        "export",
        "Write a trained policy as a plain model of transformers.",
        (f"{_RECIPES}ExportArguments", "trl:ModelConfig"),
        "model_name_or_path output_dir",
    ),
    "serve": Stage(
        "serve_reward_model",
        "Serve a reward model over HTTP.",
        (f"{_RECIPES}ServeArguments", "trl:ModelConfig"),
        "model_name_or_path host port",
    ),
}
