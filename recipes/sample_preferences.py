"""New preferences: a policy answers prompts, and a reward model, a function, a judge or people label the pairs.

    python recipes/sample_preferences.py --config recipes/configs/quickstart/sample_preferences.yaml
    python recipes/sample_preferences.py --config my_preferences.yaml --pair_answers best_and_worst

Writes `train.jsonl` and `test.jsonl` in TRL's format, without a prompt in both, and a data card. `reward_modeling.py`
and `baseline.py --method dpo` read the directory. A run that was stopped goes on with the same command.
"""

from rlhf_recipes.console import print_table, quiet_start  # first: imports below print notes

# isort: split
from accelerate import PartialState
from transformers import set_seed
from trl import ModelConfig, ScriptArguments

from rlhf_recipes.data.loading import load_earlier_pairs, load_prompts, load_split
from rlhf_recipes.data.pairs import divide
from rlhf_recipes.data.prompts import add_separator
from rlhf_recipes.data.rows import check_reward_columns
from rlhf_recipes.durability.occupied import occupied
from rlhf_recipes.evaluation.figures import table_of
from rlhf_recipes.evaluation.preferences import (
    Labellers,
    figures_of,
    labelled_pairs,
    preferences_verdict,
    rows_of_pairs,
    write_preferences,
)
from rlhf_recipes.evaluation.sampled_answers import as_judges_see, sampled_answers
from rlhf_recipes.evaluation.stage import begin_stage, end_stage
from rlhf_recipes.models.loading import model_init_kwargs
from rlhf_recipes.options.parser import RecipeParser
from rlhf_recipes.options.preferences import PreferenceArguments
from rlhf_recipes.options.recipes import TrackingArguments
from rlhf_recipes.rewards.context import check_context
from rlhf_recipes.rewards.judges import load_judges
from rlhf_recipes.tracking.registry import require_model
from rlhf_recipes.tracking.session import log_datasets, log_results, track_run


def main(
    script_args: PreferenceArguments, model_args: ModelConfig, tracking_args: TrackingArguments
) -> dict[str, float]:
    """Sample and label answers, write the pairs, and return figures about them; none while people label."""
    set_seed(script_args.seed)
    output_dir, policy = script_args.output_dir, model_args.model_name_or_path
    begin_stage("sample_preferences", policy, script_args.dataset_name, output_dir)
    with (
        occupied(output_dir),
        track_run(tracking_args, output_dir, "preferences", script_args, model_args),
    ):
        path = require_model("model_name_or_path", policy, model_args.model_revision)
        dataset = load_prompts(script_args, script_args.dataset_train_split)
        dataset = dataset.select(range(min(len(dataset), script_args.num_prompts or len(dataset))))
        check_reward_columns(dataset, "dataset_name", pairs=bool(script_args.pairwise_judges))
        prompts = add_separator(dataset, script_args.response_separator)
        earlier = load_earlier_pairs(script_args)
        log_datasets(script_args.dataset_name, prompts=prompts)

        init_kwargs = {**model_init_kwargs(model_args), "device_map": PartialState().device}
        scorer = script_args.reward_model_path
        judges, pairwise_judges = load_judges(
            script_args,
            prompts,
            reward_model_path=None if scorer is None else require_model("reward_model_path", scorer),
            response_separator=script_args.response_separator,
            of_two_policies=False,
            dtype=init_kwargs["dtype"],
            device_map=PartialState().device,
        )
        length, overflow = script_args.max_completion_length, script_args.reward_overflow
        check_context(judges.values(), {"dataset_name": prompts}, length, overflow)

        answers = sampled_answers(script_args, path, prompts, **init_kwargs)
        asked = as_judges_see(answers, prompts)
        labelled = labelled_pairs(script_args, asked, answers, Labellers(judges, pairwise_judges))
        if labelled is None:  # people have not labelled yet
            return {}

        new = rows_of_pairs(labelled, [*dataset["prompt"]], asked)
        train, test, counts = divide(earlier, new)
        results = figures_of(new, (train, test), labelled.counts + counts, answers) | labelled.figures
        facts = {"policy": policy, "weights of the policy": answers.policy, "labelled by": labelled.by}
        files = write_preferences(script_args, (train, test), results, facts)
        written = ScriptArguments(dataset_name=output_dir)
        training, evaluation = load_split(written, "train"), load_split(written, "test")
        log_datasets(output_dir, training=training, evaluation=evaluation)
        log_results(results, *files)
        print_table("Preferences", table_of(results))
    verdict = preferences_verdict(results, only_agreed=script_args.only_agreed)
    end_stage(output_dir, verdict, "reward_modeling", {"dataset_name": output_dir})
    return results


if __name__ == "__main__":
    quiet_start()
    parser = RecipeParser((PreferenceArguments, ModelConfig, TrackingArguments))
    main(*parser.parse_args_and_config())
