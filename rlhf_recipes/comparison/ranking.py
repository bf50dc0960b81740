"""Group runs by their options, and find the best group at equal KL.

`rlhf_recipes/options/relevance.py` says which options may differ inside a group.
"""

import json
import math
from dataclasses import dataclass
from string import ascii_uppercase

import numpy as np
import pandas as pd

from rlhf_recipes.comparison.curves import best_score_within, frontier_path, over_samples
from rlhf_recipes.comparison.runs import Evaluation, TrackedRun
from rlhf_recipes.evaluation.alarms import find_alarms
from rlhf_recipes.options.relevance import compared_options

# Share of the median reach. A smaller common KL says little about the end of most runs.
FAIR_REACH = 0.5


@dataclass(frozen=True)
class Group:
    """Runs of one configuration: `name` is a letter, `label` names the options that separate it from the others."""

    name: str
    label: str
    runs: list[TrackedRun]

    def run_name(self, run: TrackedRun) -> str:
        """Return a short name of one of the runs: the letter of the group, and the seed if there are several runs."""
        seeds = [other.seed for other in self.runs]
        number = run.seed if run.seed.isdigit() and len(set(seeds)) == len(seeds) else str(self.runs.index(run) + 1)
        return f"{self.name}{number}" if len(self.runs) > 1 else self.name


@dataclass(frozen=True)
class Ranked:
    """A group at the common KL: mean, smallest and largest score of its runs, and the mean KL at their end."""

    group: Group
    score: float
    low: float
    high: float
    final_kl: float


@dataclass(frozen=True)
class Verdict:
    """The answer: one sentence, the caveats, the groups from best to worst, and the KL of the comparison."""

    headline: str
    caveats: list[str]
    ranking: list[Ranked]
    common_kl: float | None


def group_runs(runs: list[TrackedRun]) -> tuple[list[Group], dict[str, list[str]]]:
    """Group runs by configuration. A run that recorded no configuration is a group of its own.

    Returns:
        The groups in the order of their first run; the options that differ, each with one value per group.
    """
    members: dict[str, list[TrackedRun]] = {}
    for run in runs:
        key = json.dumps(compared_options(run.options), sort_keys=True) if run.options else run.run_id
        members.setdefault(key, []).append(run)
    options_of = [compared_options(group[0].options) for group in members.values()]
    names = sorted({name for options in options_of for name in options})
    table = {name: [options.get(name, "not recorded") for options in options_of] for name in names}
    differing = {name: values for name, values in table.items() if len(set(values) - {"not recorded"}) > 1}
    telling = _telling_options(differing)
    groups = []
    for number, group in enumerate(members.values()):
        label = ", ".join(f"{name} {differing[name][number]}" for name in telling)
        letter = ascii_uppercase[number % 26] * (number // 26 + 1)
        groups.append(Group(letter, label if options_of[number] and label else group[0].name, group))
    return groups, differing


def _telling_options(differing: dict[str, list[str]]) -> list[str]:
    """Return few options that separate the groups: the method, then those that separate most of them."""
    chosen = ["method"] if "method" in differing else []

    def separated(names: list[str]) -> int:
        return len(set(zip(*(differing[name] for name in names), strict=True)))

    while differing:
        best = max(differing, key=lambda name: separated([*chosen, name]))
        if chosen and separated([*chosen, best]) == separated(chosen):
            break
        chosen.append(best)
    return sorted(chosen)


def run_path(run: TrackedRun) -> pd.DataFrame:
    """Return the smoothed path of KL and score of a run. It is empty if one of them was not logged."""
    empty = pd.Series(dtype=float)
    return frontier_path(run.curves.get("objective/kl", empty), run.curves.get("objective/scores", empty))


def curve_over(run: TrackedRun, metric: str, *, samples: bool) -> pd.Series:
    """Return a metric of a run over the completions sampled so far, or over the optimiser steps."""
    curve = run.curves.get(metric, pd.Series(dtype=float))
    return over_samples(curve, run.curves["episode"]) if samples and len(curve) else curve


def all_count_samples(runs: list[TrackedRun]) -> bool:
    """Return whether every run has logged its number of sampled completions."""
    return all(np.isfinite(run.curves.get("episode", pd.Series(dtype=float))).any() for run in runs)


def rank_groups(groups: list[Group]) -> Verdict:
    """Return which group is best at equal KL.

    The KL is the largest that every ranked run reaches. The score of a run is the best one on its smoothed path within
    that KL. Runs that failed or logged no numbers are not ranked; the caveats name them.
    """
    paths = {run.run_id: run_path(run) for group in groups for run in group.runs if not run.failed}
    paths = {run_id: path for run_id, path in paths.items() if len(path)}
    caveats = [*_left_out(groups, paths), *_running(groups)]
    ranked_groups = [group for group in groups if any(run.run_id in paths for run in group.runs)]
    if not ranked_groups:
        return Verdict("No finished run has finite scores and KL: nothing to rank.", caveats, [], None)
    limit = min(path["kl"].max() for path in paths.values())
    ranking = [
        _rank(group, [paths[run.run_id] for run in group.runs if run.run_id in paths], limit)
        for group in ranked_groups
    ]
    above = [ranked.group.name for ranked in ranking if math.isnan(ranked.score)]
    caveats += [f"Not ranked, because the whole path is above the common KL: {', '.join(above)}."] if above else []
    ranking = sorted((r for r in ranking if not math.isnan(r.score)), key=lambda ranked: -ranked.score)
    if len(ranking) > 1 and not _one_reward(ranking):
        headline = (
            "The runs were trained on different rewards. Their scores have different units, so there is no ranking."
        )
        return Verdict(headline, caveats, [], None)
    caveats += _fairness(ranking, paths, limit)
    return Verdict(_headline(ranking, limit), caveats, ranking, float(limit))


def _rank(group: Group, paths: list[pd.DataFrame], limit: float) -> Ranked:
    scores = np.array([best_score_within(path, limit) for path in paths])
    scores = scores[np.isfinite(scores)] if np.isfinite(scores).any() else np.array([math.nan])
    final_kl = float(np.mean([path["kl"].iloc[-1] for path in paths]))
    return Ranked(group, float(scores.mean()), float(scores.min()), float(scores.max()), final_kl)


def _headline(ranking: list[Ranked], limit: float) -> str:
    best = ranking[0]
    title = f"{best.group.name} ({best.group.label})"
    where = f"within a KL of {limit:.2f} nats"
    if len(ranking) == 1:
        return f"One configuration, {title}: its best score is {best.score:.2f} {where}."
    second = ranking[1]
    against = f"{best.score:.2f} against {second.score:.2f} of {second.group.name} ({second.group.label})"
    if best.low <= second.high:
        return f"No clear winner at equal KL: {title} scores {against} {where}, but their ranges over seeds overlap."
    if any(run_alarms(run) for run in best.group.runs):
        return f"{title} scores highest at equal KL, {against} {where}, but raises alarms: read them first."
    return f"Best at equal KL: {title} scores {against} {where}."


def _one_reward(ranking: list[Ranked]) -> bool:
    return len({run.reward for ranked in ranking for run in ranked.group.runs}) == 1


def _left_out(groups: list[Group], paths: dict[str, pd.DataFrame]) -> list[str]:
    reasons = [
        f"{group.run_name(run)} ({run.status.lower() if run.failed else 'no numbers for score and KL'})"
        for group in groups
        for run in group.runs
        if run.run_id not in paths
    ]
    return [f"Not ranked: {', '.join(reasons)}."] if reasons else []


def _running(groups: list[Group]) -> list[str]:
    names = [group.run_name(run) for group in groups for run in group.runs if run.status == "RUNNING"]
    return [f"Still running, or MLflow did not record the end: {', '.join(names)}."] if names else []


def _fairness(ranking: list[Ranked], paths: dict[str, pd.DataFrame], limit: float) -> list[str]:
    caveats = []
    if len(ranking) > 1 and any(ranked.low == ranked.high for ranked in ranking[:2]):
        caveats.append("One seed cannot show the effect of chance: repeat the first two groups with other seeds.")
    held_out = [r.group.run_name(run) for r in ranking for run in r.group.runs if run.held_out]
    if held_out and len(ranking) > 1:
        caveats.append(
            f"The training of {', '.join(held_out)} logs no score and KL of its own answers: these are from the "
            "evaluations, on held-out prompts."
        )
    reach = {run_id: path["kl"].max() for run_id, path in paths.items()}
    if limit < FAIR_REACH * np.median(list(reach.values())):
        run_id = min(reach, key=lambda key: reach[key])
        name = next(r.group.run_name(run) for r in ranking for run in r.group.runs if run.run_id == run_id)
        caveats.append(
            f"{name} has the smallest KL, which limits the comparison: leave it out with `--runs` to compare "
            "the others at a larger KL."
        )
    if len(ranking) == 1 and not _one_reward(ranking):
        caveats.append("The runs were trained on different rewards. Their scores have different units.")
    return caveats


def held_out_winner(groups: list[Group]) -> str:
    """Return in one sentence which group beats its baseline most often on held-out prompts; empty without a judge.

    The judge is the first one that no run was trained on. Without such a judge, it is the reward model.
    """
    rates = {
        (judge, group.name): float(np.mean(won))
        for group in groups
        for judge in _judges(groups)[:1]
        if (won := [e.metrics[f"{judge}/win_rate"] for e in _evaluations(group) if f"{judge}/win_rate" in e.metrics])
    }
    if not rates:
        return ""
    judge, best = max(rates, key=lambda key: rates[key])
    others = ", ".join(f"{name} {rate:.2f}" for (_, name), rate in rates.items() if name != best)
    trained = judge in {name for group in groups for run in group.runs for name in reward_names(run)}
    judged_by = f"{judge}, {'which trains the policies' if trained else 'which trains no policy'}"
    return (
        f"On held-out prompts, each at its own KL and judged by {judged_by}, {best} beats its baseline most often: "
        f"win rate {rates[judge, best]:.2f}{f' ({others})' if others else ''}."
    )


def _judges(groups: list[Group]) -> list[str]:
    metrics = {name for group in groups for evaluation in _evaluations(group) for name in evaluation.metrics}
    trained = {name for group in groups for run in group.runs for name in reward_names(run)}
    judges = {name.removesuffix("/win_rate") for name in metrics if name.endswith("/win_rate")}
    return sorted(judges, key=lambda judge: (judge in trained, judge))


def _evaluations(group: Group) -> list[Evaluation]:
    return [run.evaluation for run in group.runs if run.evaluation is not None]


def reward_names(run: TrackedRun) -> list[str]:
    """Return the names of the judges that the run was trained on."""
    return ["reward_model", *(str(name).split(":")[-1] for name in run.options.get("reward_functions") or ())]


def run_alarms(run: TrackedRun) -> list[str]:
    """Return the alarms of a run."""
    adaptive = run.options.get("kl_controller") == "adaptive"
    return find_alarms(
        run.curves,
        run.evaluation.metrics if run.evaluation else {},
        target_kl=run.options.get("target_kl") if adaptive else None,
        rewards=reward_names(run),
    )
