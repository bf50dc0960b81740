"""Baselines: train by TRL's RLOO, GRPO or DPO with the data, rewards, judges and tracking of PPO.

    accelerate launch recipes/baseline.py --method rloo --config recipes/configs/quickstart/baseline_rloo.yaml
    accelerate launch recipes/baseline.py --method dpo --config recipes/configs/quickstart/baseline_dpo.yaml

The method chooses the options: those of `RLOOConfig`, `GRPOConfig` or `DPOConfig`. Losses and defaults are TRL's,
except that RLOO and GRPO have no dropout. `recipes/compare.py` ranks these runs and PPO's on one page.
"""

from rlhf_recipes.console import quiet_start  # first: imports below print notes

# isort: split
import argparse
import sys
from typing import Any

from transformers import set_seed
from trl import ModelConfig, get_peft_config

from rlhf_recipes.data.loading import load_split
from rlhf_recipes.durability.preemption import PreemptionCallback
from rlhf_recipes.evaluation.stage import begin_stage, end_stage
from rlhf_recipes.evaluation.verdicts import policy_verdict
from rlhf_recipes.models.loading import load_tokenizer, model_init_kwargs
from rlhf_recipes.options.baselines import CONFIGS, BaselineArguments
from rlhf_recipes.options.changes import options_of_trainer
from rlhf_recipes.options.parser import RecipeParser
from rlhf_recipes.options.recipes import PreflightArguments, TrackingArguments
from rlhf_recipes.options.secrets import use_hub_token
from rlhf_recipes.preflight.preflight import preflight
from rlhf_recipes.rewards.functions import import_function
from rlhf_recipes.rewards.judges import load_judges
from rlhf_recipes.tracking.registry import require_model
from rlhf_recipes.tracking.session import log_datasets
from rlhf_recipes.tracking.training import train_and_save, training_run
from rlhf_recipes.trainers.baselines import TRAINERS
from rlhf_recipes.trainers.stock import Scoring


def main(
    script_args: BaselineArguments,
    training_args: Any,
    model_args: ModelConfig,
    tracking_args: TrackingArguments,
    preflight_args: PreflightArguments,
) -> dict[str, float]:
    """Train and save; return the final metrics. `training_args` is of the class that `method` chooses."""
    set_seed(training_args.seed)
    source = model_args.model_name_or_path
    begin_stage(script_args.method, source, script_args.dataset_name, training_args.output_dir)
    use_hub_token(training_args.hub_token)
    trainer_args = options_of_trainer(training_args, model_init_kwargs(model_args))
    with training_run(
        script_args.method, tracking_args, preflight_args, script_args, training_args, model_args
    ) as callbacks:
        trainer_class = TRAINERS[script_args.method]
        path = require_model("model_name_or_path", model_args.model_name_or_path, model_args.model_revision)
        tokenizer = load_tokenizer(path, trust_remote_code=training_args.trust_remote_code, padding_side="left")
        answered = load_split(script_args, script_args.dataset_train_split)
        train, evaluation = trainer_class.rows(answered), None
        if training_args.eval_strategy != "no":
            evaluation = trainer_class.rows(load_split(script_args, script_args.dataset_test_split))
        log_datasets(script_args.dataset_name, training=train, evaluation=evaluation)

        rewards: list[Any] = [import_function(reference) for reference in script_args.reward_functions]
        if script_args.reward_model_path is not None:
            rewards.insert(0, require_model("reward_model_path", script_args.reward_model_path))
        separator = script_args.response_separator
        judges = load_judges(script_args, evaluation or train, response_separator=separator, dtype=model_args.dtype)

        trainer = trainer_class(
            path,
            trainer_args,
            Scoring(rewards, separator, *judges, limits=script_args),
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=tokenizer,
            peft_config=get_peft_config(model_args),
            callbacks=[*callbacks, PreemptionCallback()],
        )

        trainer.describe(script_args, model_args)
        preflight(trainer, train, evaluation, preflight_args, tracking_args, with_answers=answered)
        metrics = train_and_save(trainer, tracking_args)
    needed = {"model_name_or_path": training_args.output_dir, "baseline_path": source}
    verdict = policy_verdict(trainer.state.log_history, best_step=trainer.best_step)
    end_stage(training_args.output_dir, verdict, "evaluate", needed)
    trainer.accelerator.end_training()
    return metrics


if __name__ == "__main__":
    quiet_start()
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--method", choices=CONFIGS, required="--help" not in sys.argv)
    method = parser.parse_known_args()[0].method or "rloo"
    options = (BaselineArguments, CONFIGS[method], ModelConfig, TrackingArguments, PreflightArguments)
    main(*RecipeParser(options).parse_args_and_config())
