"""Compare the PPO, RLOO, GRPO and DPO runs of an experiment: which is best at equal KL, and how do they differ?

    python recipes/compare.py --experiment rlhf_recipes
    python recipes/compare.py --experiment my_experiment --runs 3f2a91c0 8b17e5d4 --tracking_uri http://mlflow:5000

Writes `report.html`, one file that needs no network, and its figures as PNG. Runs that differ only in their seed are
one group. Evaluations (`recipes/evaluate.py`) add win rates and completions.
"""

from rlhf_recipes.console import print_lines, print_table, quiet_start  # first: imports below print notes

# isort: split
from pathlib import Path

from rlhf_recipes.comparison.ranking import group_runs, rank_groups
from rlhf_recipes.comparison.report import write_report
from rlhf_recipes.comparison.runs import read_experiment
from rlhf_recipes.durability.occupied import check_writable
from rlhf_recipes.options.parser import RecipeParser
from rlhf_recipes.options.recipes import ComparisonArguments, TrackingArguments, tracking_uri


def main(script_args: ComparisonArguments) -> dict[str, float]:
    """Read the runs, rank them and write the report. Return the score of each group at equal KL."""
    check_writable(script_args.output_dir)
    store = tracking_uri(TrackingArguments(tracking_uri=script_args.tracking_uri))
    runs = read_experiment(script_args.experiment, script_args.runs, store)

    groups, differing = group_runs(runs)
    verdict = rank_groups(groups)

    report = write_report(
        script_args.experiment, groups, differing, verdict, Path(script_args.output_dir), script_args.num_shown
    )

    scores = {f"{ranked.group.name} ({ranked.group.label})": ranked.score for ranked in verdict.ranking}
    print_table("Score at equal KL", scores, ("group", "score"))
    print_lines(verdict.headline, *verdict.caveats, f"Report: {report.resolve()}")
    return scores


if __name__ == "__main__":
    quiet_start()
    parser = RecipeParser((ComparisonArguments,))
    main(*parser.parse_args_and_config())
