"""Reward modelling: learn a score from preferences, and write down how to use it.

accelerate launch recipes/reward_modeling.py --config recipes/configs/quickstart/reward_modeling.yaml
accelerate launch --config_file accelerate_configs/multi_gpu.yaml recipes/reward_modeling.py --config my_rm.yaml
"""

from pathlib import Path

from transformers import set_seed
from trl import ModelConfig, ScriptArguments, get_peft_config

from rlhf_recipes import RewardModelConfig, RewardModelTrainer
from rlhf_recipes.console import print_table, quiet_start
from rlhf_recipes.data.loading import load_split
from rlhf_recipes.durability.occupied import occupied
from rlhf_recipes.durability.preemption import PreemptionCallback
from rlhf_recipes.models.loading import load_tokenizer, model_init_kwargs
from rlhf_recipes.options.changes import options_of_trainer
from rlhf_recipes.options.parser import RecipeParser
from rlhf_recipes.options.recipes import PreflightArguments, TrackingArguments
from rlhf_recipes.options.secrets import use_hub_token
from rlhf_recipes.preflight.preflight import preflight
from rlhf_recipes.rewards.card import CARD_FILE
from rlhf_recipes.tracking.registry import require_model
from rlhf_recipes.tracking.session import log_datasets, log_model, log_results, track_run


def main(
    script_args: ScriptArguments,
    training_args: RewardModelConfig,
    model_args: ModelConfig,
    tracking_args: TrackingArguments,
    preflight_args: PreflightArguments,
) -> dict[str, float]:
    """Train, save and evaluate; return the final metrics."""
    set_seed(training_args.seed)
    use_hub_token(training_args.hub_token)
    trainer_args = options_of_trainer(training_args, model_init_kwargs(model_args))
    run_name = training_args.run_name or training_args.output_dir
    recorded = preflight_args.recorded(tracking_args)
    with (
        occupied(training_args.output_dir),
        track_run(recorded, run_name, "reward_modeling", script_args, training_args, model_args) as callbacks,
    ):
        path = require_model("model_name_or_path", model_args.model_name_or_path, model_args.model_revision)
        tokenizer = load_tokenizer(path, trust_remote_code=training_args.trust_remote_code)
        train = load_split(script_args, script_args.dataset_train_split)
        evaluation = load_split(script_args, script_args.dataset_test_split)
        log_datasets(script_args.dataset_name, training=train, evaluation=evaluation)

        trainer = RewardModelTrainer(
            path,
            args=trainer_args,
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=tokenizer,
            peft_config=get_peft_config(model_args),
            callbacks=[*callbacks, PreemptionCallback()],
        )

        trainer.describe(script_args, model_args)
        preflight(trainer, train, evaluation, preflight_args, tracking_args)
        metrics = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint).metrics

        # An evaluation that fails must not cost the model. The card of the saved model gets its result afterwards.
        trainer.save_model(training_args.output_dir)
        metrics |= trainer.evaluate()
        trainer.save_card()
        if trainer.is_world_process_zero():
            log_results(metrics, Path(training_args.output_dir, CARD_FILE))
            log_model(tracking_args, training_args.output_dir, "reward_model", model_args.model_revision)
            print_table("Reward model", metrics)
    trainer.accelerator.end_training()
    return metrics


if __name__ == "__main__":
    quiet_start()
    parser = RecipeParser((ScriptArguments, RewardModelConfig, ModelConfig, TrackingArguments, PreflightArguments))
    main(*parser.parse_args_and_config())
