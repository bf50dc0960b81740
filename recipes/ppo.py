"""PPO: train a policy against a learned reward model. Without arguments, the quickstart's stage.

    accelerate launch recipes/ppo.py
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml recipes/ppo.py --config my_ppo.yaml

Differs from Schulman et al. 2017: the critic is a head on the policy's own hidden states, trained alone by default;
the score is normalised by its moving mean and deviation; the reward holds a per-token KL penalty to the SFT policy.
"""

from rlhf_recipes.console import quiet_start  # first: imports below print notes

# isort: split
import sys
from pathlib import Path
from typing import Any

from transformers import set_seed
from trl import ModelConfig, get_peft_config

from rlhf_recipes import PPOConfig, PPOTrainer
from rlhf_recipes.data.loading import load_critic_pairs, load_prompts, load_split, without_answers
from rlhf_recipes.durability.preemption import PreemptionCallback
from rlhf_recipes.evaluation.stage import begin_stage, end_stage
from rlhf_recipes.evaluation.verdicts import policy_verdict
from rlhf_recipes.models.loading import load_tokenizer, model_init_kwargs
from rlhf_recipes.options.changes import options_of_trainer, with_changes
from rlhf_recipes.options.parser import RecipeParser
from rlhf_recipes.options.recipes import PPOArguments, PreflightArguments, TrackingArguments
from rlhf_recipes.options.secrets import use_hub_token
from rlhf_recipes.preflight.preflight import preflight
from rlhf_recipes.rewards.functions import import_function
from rlhf_recipes.rewards.judges import load_judges
from rlhf_recipes.tracking.registry import require_model
from rlhf_recipes.tracking.session import log_datasets
from rlhf_recipes.tracking.training import train_and_save, training_run

QUICKSTART = str(Path(__file__).parent / "configs" / "quickstart" / "ppo.yaml")


def main(
    script_args: PPOArguments,
    training_args: PPOConfig,
    model_args: ModelConfig,
    tracking_args: TrackingArguments,
    preflight_args: PreflightArguments,
) -> dict[str, float]:
    """Train and save; return the final metrics."""
    set_seed(training_args.seed)
    begin_stage("ppo", model_args.model_name_or_path, script_args.dataset_name, training_args.output_dir)
    use_hub_token(training_args.hub_token)
    trainer_args = options_of_trainer(training_args, model_init_kwargs(model_args))
    with training_run("ppo", tracking_args, preflight_args, script_args, training_args, model_args) as callbacks:
        path = require_model("model_name_or_path", model_args.model_name_or_path, model_args.model_revision)
        tokenizer = load_tokenizer(path, trust_remote_code=training_args.trust_remote_code, padding_side="left")
        answered = load_split(script_args, script_args.dataset_train_split)
        train, evaluation = without_answers(answered), None
        if training_args.eval_strategy != "no":
            evaluation = load_prompts(script_args, script_args.dataset_test_split)
        log_datasets(script_args.dataset_name, training=train, evaluation=evaluation)

        rewards: list[Any] = [import_function(reference) for reference in script_args.reward_functions]
        if script_args.reward_model_path is not None:
            rewards.insert(0, require_model("reward_model_path", script_args.reward_model_path))
        if training_args.reward_adapter is not None:
            adapter = require_model("reward_adapter", training_args.reward_adapter)
            trainer_args = with_changes(trainer_args, reward_adapter=adapter)

        separator, dtype = training_args.response_separator, model_args.dtype
        judges, pairwise_judges = load_judges(
            script_args, evaluation or train, response_separator=separator, dtype=dtype
        )

        trainer = PPOTrainer(
            path,
            rewards,
            trainer_args,
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=tokenizer,
            peft_config=get_peft_config(model_args),
            critic_dataset=load_critic_pairs(script_args),
            judges=judges,
            pairwise_judges=pairwise_judges,
            callbacks=[*callbacks, PreemptionCallback()],
        )

        trainer.describe(script_args, model_args)
        preflight(trainer, train, evaluation, preflight_args, tracking_args, with_answers=answered)
        metrics = train_and_save(trainer, tracking_args)
    verdict = policy_verdict(trainer.state.log_history, training_args.held_kl, trainer.best_step)
    needed = {"model_name_or_path": training_args.output_dir, "baseline_path": model_args.model_name_or_path}
    end_stage(training_args.output_dir, verdict, "evaluate", needed)
    trainer.accelerator.end_training()
    return metrics


if __name__ == "__main__":
    quiet_start()
    # A run that names neither a configuration nor a policy is the quickstart's; its options override that YAML.
    if not any(argument.startswith(("--config", "--model_name_or_path")) for argument in sys.argv):
        sys.argv[1:1] = ["--config", QUICKSTART]
    parser = RecipeParser((PPOArguments, PPOConfig, ModelConfig, TrackingArguments, PreflightArguments))
    main(*parser.parse_args_and_config())
