"""Compare the PPO, RLOO, GRPO and DPO runs of an experiment: which scores most for its KL, and how do they differ?

    python recipes/compare.py --experiment rlhf_recipes
    python recipes/compare.py --experiment my_experiment --runs 3f2a91c0 8b17e5d4 --tracking_uri http://mlflow:5000

Writes `report.html`, one file that needs no network. Runs that differ only in their seed are one group. Evaluations
(`recipes/evaluate.py`) add win rates and completions. Without them no group is named the winner.
"""

from rlhf_recipes.console import print_lines, print_table, quiet_start  # first: imports below print notes

# isort: split
from pathlib import Path

from rlhf_recipes.comparison.groups import final_kl, group_runs
from rlhf_recipes.comparison.report import write_report
from rlhf_recipes.comparison.runs import read_experiment
from rlhf_recipes.comparison.verdict import decide
from rlhf_recipes.durability.occupied import check_writable
from rlhf_recipes.options.parser import RecipeParser
from rlhf_recipes.options.recipes import ComparisonArguments, TrackingArguments, tracking_uri


def main(script_args: ComparisonArguments) -> dict[str, float]:
    """Read the runs, compare them and write the report. Return the best score of each group."""
    check_writable(script_args.output_dir)
    store = tracking_uri(TrackingArguments(tracking_uri=script_args.tracking_uri))
    runs = read_experiment(script_args.experiment, script_args.runs, store)

    groups, differing = group_runs(runs)
    verdict = decide(groups)

    report = write_report(
        script_args.experiment, groups, differing, verdict, Path(script_args.output_dir), script_args.num_shown
    )

    best = verdict.frontier.best if verdict.frontier else {}
    rows = {f"{g.name} ({g.label})": [best[g.name].mean, final_kl(g)] for g in groups if g.name in best}
    print_table("Groups", rows, ("group", "best score", "last KL"))
    print_lines(verdict.headline, *verdict.findings, *verdict.caveats)
    print_lines(*(f"Missing: {text}" for text in verdict.missing), f"Report: {report.resolve()}")
    return {title: score for title, (score, _) in rows.items()}


if __name__ == "__main__":
    quiet_start()
    parser = RecipeParser((ComparisonArguments,))
    main(*parser.parse_args_and_config())
