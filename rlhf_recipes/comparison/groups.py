"""Group runs by their options, and read their paths, their rewards and their alarms.

`rlhf_recipes/options/relevance.py` says which options may differ inside a group.
"""

import functools
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from string import ascii_uppercase

import numpy as np
import pandas as pd

from rlhf_recipes.comparison.curves import frontier_path, over_samples
from rlhf_recipes.comparison.runs import TrackedRun
from rlhf_recipes.evaluation.alarms import find_alarms
from rlhf_recipes.options.paths import function_name
from rlhf_recipes.options.relevance import compared_options


@dataclass(frozen=True)
class Group:
    """Runs of one configuration: `name` is a letter, `label` names the options that separate it from the others."""

    name: str
    label: str
    runs: list[TrackedRun]

    @functools.cached_property
    def counted(self) -> list[TrackedRun]:
        """Runs that count for a verdict: they did not fail, and have finite numbers for score and KL."""
        return [run for run in self.runs if not run.failed and len(run_path(run))]

    def run_name(self, run: TrackedRun) -> str:
        """Return a short name of one of the runs: the letter of the group, and the seed if there are several runs."""
        seeds = [other.seed for other in self.runs]
        number = run.seed if run.seed.isdigit() and len(set(seeds)) == len(seeds) else str(self.runs.index(run) + 1)
        return f"{self.name}{number}" if len(self.runs) > 1 else self.name


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


def final_kl(group: Group) -> float:
    """Return the mean KL at the end of the runs that did not fail, or NaN."""
    ends = [path["kl"].iloc[-1] for run in group.runs if not run.failed and len(path := run_path(run))]
    return float(np.mean(ends)) if ends else math.nan


def curve_over(run: TrackedRun, metric: str, *, samples: bool) -> pd.Series:
    """Return a metric of a run over the completions sampled so far, or over the optimiser steps."""
    curve = run.curves.get(metric, pd.Series(dtype=float))
    return over_samples(curve, run.curves["episode"]) if samples and len(curve) else curve


def all_count_samples(runs: list[TrackedRun]) -> bool:
    """Return whether every run has logged its number of sampled completions."""
    return all(np.isfinite(run.curves.get("episode", pd.Series(dtype=float))).any() for run in runs)


def trained_judges(runs: Iterable[TrackedRun]) -> set[str]:
    """Return the judges that some of the runs was trained on.

    A judge that is a reward model is the reward of a run if both have one path, or were trained by one run. The reward
    model of a run without recorded options is unknown, so the judge `reward_model` may be its reward.
    """
    runs = list(runs)
    functions = {function_name(str(name)) for run in runs for name in run.options.get("reward_functions") or ()}
    rewards = {name for run in runs for name in run.reward_models}
    judges = [judge for run in runs if run.evaluation for judge in run.evaluation.reward_models.items()]
    unknown = {"reward_model"} if any(not run.options for run in runs) else set()
    return functions | unknown | {name for name, known in judges if known & rewards}


def run_alarms(run: TrackedRun) -> list[str]:
    """Return the alarms of a run."""
    adaptive = run.options.get("kl_controller") == "adaptive"
    return find_alarms(
        run.curves,
        run.evaluation.metrics if run.evaluation else {},
        target_kl=run.options.get("target_kl") if adaptive else None,
        rewards=trained_judges([run]),
    )
