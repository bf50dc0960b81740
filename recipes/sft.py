"""Supervised fine-tuning: the policy that PPO starts from, and its reference.

accelerate launch recipes/sft.py --config recipes/configs/quickstart/sft.yaml
accelerate launch --config_file accelerate_configs/multi_gpu.yaml recipes/sft.py --config my_sft.yaml
"""

from rlhf_recipes.console import quiet_start  # first: imports below print notes

# isort: split
from transformers import set_seed
from trl import ModelConfig, ScriptArguments, get_peft_config

from rlhf_recipes.data.loading import load_demonstrations
from rlhf_recipes.durability.earlier_run import check_output_dir
from rlhf_recipes.durability.preemption import PreemptionCallback
from rlhf_recipes.evaluation.stage import begin_stage, end_stage
from rlhf_recipes.evaluation.verdicts import sft_verdict
from rlhf_recipes.models.loading import load_tokenizer, model_init_kwargs
from rlhf_recipes.options.changes import options_of_trainer
from rlhf_recipes.options.parser import RecipeParser
from rlhf_recipes.options.recipes import BoundaryArguments, PreflightArguments, TrackingArguments
from rlhf_recipes.options.secrets import use_hub_token
from rlhf_recipes.options.sft import SFTConfig
from rlhf_recipes.preflight.preflight import preflight
from rlhf_recipes.tracking.registry import require_model
from rlhf_recipes.tracking.session import log_datasets
from rlhf_recipes.tracking.training import train_and_save, training_run
from rlhf_recipes.trainers.sft import SFTTrainer


def main(
    script_args: ScriptArguments,
    training_args: SFTConfig,
    model_args: ModelConfig,
    boundary_args: BoundaryArguments,
    tracking_args: TrackingArguments,
    preflight_args: PreflightArguments,
) -> dict[str, float]:
    """Train, save and evaluate; return the final metrics."""
    set_seed(training_args.seed)
    begin_stage("sft", model_args.model_name_or_path, script_args.dataset_name, training_args.output_dir)
    use_hub_token(training_args.hub_token)
    trainer_args = options_of_trainer(training_args, model_init_kwargs(model_args))
    with training_run(
        "sft", tracking_args, preflight_args, script_args, training_args, model_args, boundary_args
    ) as callbacks:
        path = require_model("model_name_or_path", model_args.model_name_or_path, model_args.model_revision)
        tokenizer = load_tokenizer(path, trust_remote_code=training_args.trust_remote_code)
        separator = boundary_args.response_separator
        train, evaluation = load_demonstrations(script_args, script_args.dataset_train_split, separator), None
        if training_args.eval_strategy != "no":
            evaluation = load_demonstrations(script_args, script_args.dataset_test_split, separator)
        log_datasets(script_args.dataset_name, training=train, evaluation=evaluation)

        check_output_dir(training_args.output_dir, adapter=model_args.use_peft)
        trainer = SFTTrainer(
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
    verdict = sft_verdict(trainer.state.log_history)
    end_stage(training_args.output_dir, verdict, "reward_modeling", {"model_name_or_path": training_args.output_dir})
    trainer.accelerator.end_training()
    return metrics


if __name__ == "__main__":
    quiet_start()
    parser = RecipeParser(
        (ScriptArguments, SFTConfig, ModelConfig, BoundaryArguments, TrackingArguments, PreflightArguments)
    )
    main(*parser.parse_args_and_config())
