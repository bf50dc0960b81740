"""Process reward modelling: learn to judge the steps of an answer, and write down how to use the model.

accelerate launch recipes/process_reward_modeling.py --config recipes/configs/report/process_reward_modeling.yaml
accelerate launch --config_file accelerate_configs/multi_gpu.yaml recipes/process_reward_modeling.py --config prm.yaml
"""

from rlhf_recipes.console import print_table, quiet_start  # first: imports below print notes

# isort: split
from transformers import set_seed
from trl import ModelConfig, ScriptArguments, get_peft_config

from rlhf_recipes import ProcessRewardModelConfig, ProcessRewardModelTrainer
from rlhf_recipes.data.loading import load_split
from rlhf_recipes.durability.preemption import PreemptionCallback
from rlhf_recipes.evaluation.figures import table_of
from rlhf_recipes.evaluation.stage import begin_stage, end_stage
from rlhf_recipes.evaluation.steps import process_reward_model_verdict
from rlhf_recipes.models.loading import load_tokenizer, model_init_kwargs
from rlhf_recipes.options.changes import options_of_trainer
from rlhf_recipes.options.parser import RecipeParser
from rlhf_recipes.options.recipes import PreflightArguments, TrackingArguments
from rlhf_recipes.options.secrets import use_hub_token
from rlhf_recipes.preflight.preflight import preflight
from rlhf_recipes.tracking.registry import require_model
from rlhf_recipes.tracking.session import log_datasets
from rlhf_recipes.tracking.training import train_and_save, training_run


def main(
    script_args: ScriptArguments,
    training_args: ProcessRewardModelConfig,
    model_args: ModelConfig,
    tracking_args: TrackingArguments,
    preflight_args: PreflightArguments,
) -> dict[str, float]:
    """Train, save and evaluate; return the final metrics."""
    set_seed(training_args.seed)
    source, stage = model_args.model_name_or_path, "process_reward_modeling"
    begin_stage(stage, source, script_args.dataset_name, training_args.output_dir)
    use_hub_token(training_args.hub_token)
    trainer_args = options_of_trainer(training_args, model_init_kwargs(model_args))
    with training_run(stage, tracking_args, preflight_args, script_args, training_args, model_args) as callbacks:
        path = require_model("model_name_or_path", model_args.model_name_or_path, model_args.model_revision)
        tokenizer = load_tokenizer(path, trust_remote_code=training_args.trust_remote_code)
        train = load_split(script_args, script_args.dataset_train_split)
        evaluation = load_split(script_args, script_args.dataset_test_split)
        log_datasets(script_args.dataset_name, training=train, evaluation=evaluation)

        trainer = ProcessRewardModelTrainer(
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
        metrics = train_and_save(trainer, tracking_args)
        if trainer.is_world_process_zero():
            print_table("Process reward model", table_of(metrics))
    needed = {"model_name_or_path": source, "reward_model_path": training_args.output_dir}
    end_stage(training_args.output_dir, process_reward_model_verdict(metrics), "ppo", needed)
    trainer.accelerator.end_training()
    return metrics


if __name__ == "__main__":
    quiet_start()
    parser = RecipeParser(
        (ScriptArguments, ProcessRewardModelConfig, ModelConfig, TrackingArguments, PreflightArguments)
    )
    main(*parser.parse_args_and_config())
