"""Evaluate reward models: how well do they rank answers that people ranked, and which one ranks better?

    python recipes/evaluate_reward_model.py --config recipes/configs/quickstart/evaluate_reward_model.yaml
    python recipes/evaluate_reward_model.py --reward_models runs/one runs/other --dataset_name my_preferences

Writes `results.json` (accuracy, calibration, length, best of n, differences, all with 95 % intervals), `scores.jsonl`
(every row with its scores), and `report.md` and `report.html` with plots.
"""

from rlhf_recipes.console import print_table, quiet_start  # first: imports below print notes

# isort: split
import json
from pathlib import Path

import pandas as pd
from accelerate import PartialState
from transformers import set_seed
from trl import ModelConfig

from rlhf_recipes.comparison.reward_model_report import summary_of, write_reward_model_report
from rlhf_recipes.data.loading import load_split
from rlhf_recipes.data.preferences import preference_set
from rlhf_recipes.durability.earlier_run import keep_earlier_files
from rlhf_recipes.durability.occupied import occupied
from rlhf_recipes.evaluation.evaluated_models import evaluate_reward_models, reward_models_verdict, score_rows
from rlhf_recipes.evaluation.stage import begin_stage, end_stage
from rlhf_recipes.models.loading import model_init_kwargs
from rlhf_recipes.options.parser import RecipeParser
from rlhf_recipes.options.recipes import TrackingArguments
from rlhf_recipes.options.reward_model_evaluation import RewardModelEvaluationArguments
from rlhf_recipes.rewards.calls import RewardCalls
from rlhf_recipes.tracking.registry import require_model, require_models
from rlhf_recipes.tracking.session import log_datasets, log_results, track_run
from rlhf_recipes.trainers.evaluated_cards import note_evaluation


def main(
    script_args: RewardModelEvaluationArguments, model_args: ModelConfig, tracking_args: TrackingArguments
) -> dict[str, float]:
    """Measure reward models on the same rows, and return the results."""
    set_seed(script_args.seed)
    models, dataset, split = script_args.reward_models, script_args.dataset_name, script_args.dataset_test_split
    begin_stage("evaluate_reward_model", ", ".join(models), dataset, script_args.output_dir)
    with (
        occupied(script_args.output_dir),
        track_run(tracking_args, script_args.output_dir, "reward_model_evaluation", script_args, model_args),
    ):
        paths = require_models("reward_models", models, model_args.model_revision)
        policy = model_args.model_name_or_path
        if policy is not None:
            policy = require_model("model_name_or_path", policy, model_args.model_revision)

        rows = load_split(script_args, split)
        preferences = preference_set(rows, script_args.category_column)
        log_datasets(dataset, evaluation=rows)
        init_kwargs = {**model_init_kwargs(model_args), "device_map": PartialState().device}

        calls = RewardCalls(script_args.reward_timeout, script_args.reward_retries, script_args.failed_rewards)
        evaluation = evaluate_reward_models(script_args, paths, preferences, policy, calls, **init_kwargs)
        results = evaluation.results | calls.settle()
        verdict = reward_models_verdict(evaluation)

        output_dir = Path(script_args.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        files = output_dir / "results.json", output_dir / "scores.jsonl"
        keep_earlier_files(*files, output_dir / "report.md", output_dir / "report.html")
        files[0].write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        pd.DataFrame(score_rows(preferences, evaluation)).to_json(files[1], orient="records", lines=True)
        pages = write_reward_model_report(evaluation, f"{dataset}, split {split}", verdict, output_dir)
        log_results(results, *files, *pages)
        note_evaluation(evaluation, str(dataset), split)
        print_table("Reward models", summary_of(evaluation), ("figure", *evaluation.models))
    end_stage(script_args.output_dir, verdict, "ppo", {"reward_model_path": evaluation.winner_path})
    return results


if __name__ == "__main__":
    quiet_start()
    parser = RecipeParser((RewardModelEvaluationArguments, ModelConfig, TrackingArguments))
    main(*parser.parse_args_and_config())
