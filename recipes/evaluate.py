"""Evaluate a policy: is it better than its baseline on prompts that it has not seen?

    python recipes/evaluate.py --config recipes/configs/quickstart/evaluate.yaml
    python recipes/evaluate.py --config my_evaluation.yaml --model_name_or_path runs/my_model/ppo --best_of 4 16

Writes `results.json` (mean scores, win rates with 95 % bootstrap intervals, KL, length) and `completions.jsonl`
(every prompt with both answers and their scores).
"""

from rlhf_recipes.console import completions_table, print_table, quiet_start  # first: imports below print notes

# isort: split
import json
from pathlib import Path
from typing import Any

import pandas as pd
from accelerate import PartialState
from transformers import set_seed
from trl import ModelConfig

from rlhf_recipes.data.loading import load_prompts
from rlhf_recipes.data.prompts import add_separator, check_prompts_fit
from rlhf_recipes.data.rows import check_rendering
from rlhf_recipes.durability.earlier_run import keep_earlier_files
from rlhf_recipes.durability.occupied import occupied
from rlhf_recipes.evaluation.figures import table_of
from rlhf_recipes.evaluation.policies import answers_table, best_of_n, compare_policies, eos_token_ids
from rlhf_recipes.evaluation.stage import begin_stage, end_stage
from rlhf_recipes.evaluation.tokenizers import check_baseline
from rlhf_recipes.evaluation.verdicts import evaluation_verdict
from rlhf_recipes.models.loading import load_policy, load_tokenizer, model_init_kwargs
from rlhf_recipes.models.quantization import saved_quantization
from rlhf_recipes.models.vocabulary import with_end_token
from rlhf_recipes.options.parser import RecipeParser
from rlhf_recipes.options.recipes import EvaluationArguments, TrackingArguments, experiment_of, is_recorded
from rlhf_recipes.rewards.calls import RewardCalls
from rlhf_recipes.rewards.context import check_context
from rlhf_recipes.rewards.judges import load_judges
from rlhf_recipes.tracking.registry import require_model
from rlhf_recipes.tracking.session import log_answers, log_datasets, log_results, track_run


def main(
    script_args: EvaluationArguments, model_args: ModelConfig, tracking_args: TrackingArguments
) -> dict[str, float]:
    """Compare two policies, and return the results."""
    set_seed(script_args.seed)
    begin_stage("evaluate", model_args.model_name_or_path, script_args.dataset_name, script_args.output_dir)
    with (
        occupied(script_args.output_dir),
        track_run(tracking_args, script_args.output_dir, "evaluation", script_args, model_args),
    ):
        path = require_model("model_name_or_path", model_args.model_name_or_path, model_args.model_revision)
        tokenizer = load_tokenizer(path, padding_side="left")
        dataset = load_prompts(script_args, script_args.dataset_test_split)
        dataset = add_separator(dataset, script_args.response_separator)
        dataset = dataset.select(range(min(len(dataset), script_args.num_prompts or len(dataset))))
        log_datasets(script_args.dataset_name, evaluation=dataset)

        init_kwargs = {**model_init_kwargs(model_args), "device_map": PartialState().device}
        policy = load_policy(path, **init_kwargs)
        tokenizer = with_end_token(tokenizer, policy)
        # A policy on a 4-bit base started from rounded weights, so its baseline needs the same rounding.
        baseline_path = require_model("baseline_path", script_args.baseline_path, model_args.model_revision)
        baseline = load_policy(baseline_path, base_quantization=saved_quantization(path), **init_kwargs)
        check_rendering(dataset, ("prompt",), "dataset_name", tokenizer)
        check_baseline(tokenizer, baseline_path, baseline.config, dataset)
        check_prompts_fit(dataset, tokenizer, policy.config, script_args.max_completion_length, "dataset_name")
        scorer = script_args.reward_model_path
        judges, pairwise_judges = load_judges(
            script_args,
            dataset,
            reward_model_path=None if scorer is None else require_model("reward_model_path", scorer),
            policy_eos_token_ids=eos_token_ids(policy, tokenizer),
            response_separator=script_args.response_separator,
            dtype=init_kwargs["dtype"],
            device_map=PartialState().device,
        )

        length, overflow = script_args.max_completion_length, script_args.reward_overflow
        check_context(judges.values(), {"dataset_name": dataset}, length, overflow)
        calls = RewardCalls(script_args.reward_timeout, script_args.reward_retries, script_args.failed_rewards)
        guarded = calls.guard_judges(judges)
        sampling: dict[str, Any] = {
            "max_completion_length": script_args.max_completion_length,
            "temperature": script_args.temperature,
            "batch_size": script_args.batch_size,
            "seed": script_args.seed,
        }
        given = (baseline, tokenizer, dataset, guarded)
        pairwise = calls.guard_judges(pairwise_judges)
        results, completions = compare_policies(
            policy, *given, pairwise_judges=pairwise, num_samples=script_args.num_samples, **sampling
        )
        results |= best_of_n(*given, script_args.best_of, chooser="reward_model", **sampling)
        results |= calls.settle()

        output_dir = Path(script_args.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        files = output_dir / "results.json", output_dir / "completions.jsonl"
        keep_earlier_files(*files)  # they may be of another policy
        files[0].write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        pd.DataFrame(completions).to_json(files[1], orient="records", lines=True)
        log_results(results, *files)
        log_answers(answers_table(completions), output_dir)
        completions_table(completions, script_args.num_shown)
        print_table("Evaluation", table_of(results))
    recorded = {"experiment": experiment_of(tracking_args), "tracking_uri": tracking_args.tracking_uri}
    needed = recorded if is_recorded(tracking_args) else {}
    end_stage(script_args.output_dir, evaluation_verdict(results), "compare", needed)
    return results


if __name__ == "__main__":
    quiet_start()
    parser = RecipeParser((EvaluationArguments, ModelConfig, TrackingArguments))
    main(*parser.parse_args_and_config())
