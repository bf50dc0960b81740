"""Compare the final policies of groups with each other, on the held-out prompts that their evaluations share.

The evaluations have recorded the completions and their scores. Nothing is generated or judged here.
"""

import itertools
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_recipes.comparison.runs import Evaluation
from rlhf_recipes.evaluation.figures import held_out_first
from rlhf_recipes.evaluation.statistics import (
    CrossedMean,
    preference_rate,
    share_between,
    share_over_baseline,
    wins_per_prompt,
)

Scores = dict[str, list[float | None]]  # of the samples of each prompt


@dataclass(frozen=True)
class Share:
    """The share of prompts on which one group beats another, with a 95 % interval.

    Args:
        share: Mean over all pairs of their runs and over the common prompts, in [0, 1].
        low: Lower end of the interval.
        high: Upper end of the interval.
        sources: Share of the variance that each factor brings: the runs of the one, the runs of the other (not for a
            baseline), the prompts. None if one of the groups has a single run: the interval is then over prompts only,
            and says nothing about other seeds.
    """

    share: float
    low: float
    high: float
    sources: tuple[float, ...] | None = None

    @property
    def separates(self) -> bool:
        """Whether the interval is over seeds and prompts, has a width, and does not hold 0.5."""
        return self.sources is not None and self.low < self.high and not self.low <= 0.5 <= self.high


@dataclass(frozen=True)
class WinMatrix:
    """The share of prompts on which a row beats a column, or None. The last column is the baseline of the row."""

    judge: str
    names: list[str]
    cells: list[list[Share | None]]
    num_prompts: int

    def cell(self, name: str, rival: str) -> Share | None:
        """Return the share of one group against another."""
        return self.cells[self.names.index(name)][self.names.index(rival)]

    def over_baseline(self, name: str) -> Share | None:
        """Return the share of one group against its baseline."""
        return self.cells[self.names.index(name)][-1]


@dataclass(frozen=True)
class Answer:
    """One completion of a prompt: the name of its policy, the text, and the scores of the judges."""

    name: str
    text: str
    scores: dict[str, float | None]


def judges_of(evaluations: Iterable[Evaluation]) -> list[str]:
    """Return the judges of some evaluations. `reward_model` is last, because it trains the policies."""
    columns = {name for evaluation in evaluations for row in evaluation.rows[:1] for name in row}
    judges = {name.removeprefix("policy_") for name in columns if name.startswith("policy_")} - {"completion"}
    return held_out_first(sorted(judges))


def win_matrices(groups: dict[str, list[Evaluation]]) -> list[WinMatrix]:
    """Compare every two groups, and each with its baseline, on the prompts that all their runs have answered.

    Scores of `reward_model` are compared only between evaluations with the same reward model.

    Args:
        groups: Evaluations of the runs of each group, by the name of the group.

    Returns:
        One matrix per judge.
    """
    evaluations = [evaluation for runs in groups.values() for evaluation in runs]
    return [_win_matrix(judge, groups) for judge in judges_of(evaluations)]


def _win_matrix(judge: str, groups: dict[str, list[Evaluation]]) -> WinMatrix:
    scores = {name: [_scores_by_prompt(run, f"policy_{judge}") for run in runs] for name, runs in groups.items()}
    cells = []
    for name, runs in groups.items():
        row = [
            None
            if rival == name or not all(_one_scale(judge, ours, theirs) for ours in runs for theirs in others)
            else _share_between(scores[name], scores[rival])
            for rival, others in groups.items()
        ]
        baselines = [_scores_by_prompt(run, f"baseline_{judge}") for run in runs]
        cells.append([*row, _share_over(scores[name], baselines)])
    most = max(len(known) for own in scores.values() for known in own)
    return WinMatrix(judge, list(groups), cells, most)


def _one_scale(judge: str, evaluation: Evaluation, rival: Evaluation) -> bool:
    return judge != "reward_model" or evaluation.reward_model == rival.reward_model


def _scores_by_prompt(evaluation: Evaluation, column: str) -> Scores:
    """Return the scores of all samples of each prompt; a missing one is None."""
    scores: Scores = {}
    for row in evaluation.rows:
        scores.setdefault(prompt_key(row), []).append(row.get(column))
    return scores


def prompt_key(row: dict[str, Any]) -> str:
    """Return a text that identifies a prompt, plain or chat."""
    return json.dumps(row["prompt"], sort_keys=True)


def _share_between(ours: list[Scores], theirs: list[Scores]) -> Share | None:
    """Return the share of one group against another. A prompt without a score of each run does not count."""
    runs = [*ours, *theirs]
    if not (common := _common(runs)):
        return None
    wins = np.full((len(runs), len(runs), len(common)), 0.5)
    for i, j in itertools.combinations(range(len(runs)), 2):
        wins[i, j] = _wins(runs[i], runs[j], common)
        wins[j, i] = 1 - wins[i, j]
    wins = wins[:, :, np.isfinite(wins).all(axis=(0, 1))]
    between = wins[: len(ours), len(ours) :]
    return _as_share(share_between(wins, len(ours)), between.mean(axis=(0, 1))) if wins.size else None


def _share_over(ours: list[Scores], baselines: list[Scores]) -> Share | None:
    """Return the share of a group against the baselines of its runs."""
    if not (common := _common([*ours, *baselines])):
        return None
    wins = np.array([_wins(scores, baseline, common) for scores, baseline in zip(ours, baselines, strict=True)])
    wins = wins[:, np.isfinite(wins).all(axis=0)]
    return _as_share(share_over_baseline(wins), wins.mean(axis=0)) if wins.size else None


def _common(runs: list[Scores]) -> list[str]:
    return [prompt for prompt in runs[0] if all(prompt in scores for scores in runs)]


def _as_share(over_all: CrossedMean, by_prompt: np.ndarray) -> Share:
    """Return the share with its interval: over prompts only, if one of the groups has a single run."""
    if math.isnan(over_all.low):
        share, low, high = preference_rate(by_prompt).values()
        return Share(share, low, high)
    return Share(over_all.mean, max(over_all.low, 0.0), min(over_all.high, 1.0), over_all.shares)


def _wins(ours: Scores, theirs: Scores, prompts: list[str]) -> np.ndarray:
    width = max(len(scores[prompt]) for scores in (ours, theirs) for prompt in prompts)
    padded = [
        [scores[prompt] + [None] * (width - len(scores[prompt])) for prompt in prompts] for scores in (ours, theirs)
    ]
    return wins_per_prompt(*np.array(padded, dtype=float).reshape(2, -1, width))


def shared_answers(policies: dict[str, Evaluation], num_prompts: int) -> list[tuple[Any, list[Answer]]]:
    """Return some prompts with the first answer of the baseline and of every policy.

    Only prompts with the most answers are chosen, spread evenly over the data.
    """
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for name, evaluation in policies.items():
        for row in evaluation.rows:
            rows.setdefault(prompt_key(row), {}).setdefault(name, row)
    most = max((len(answers) for answers in rows.values()), default=0)
    shared = [answers for answers in rows.values() if len(answers) == most]
    shown = shared[:: max(len(shared) // max(num_prompts, 1), 1)][:num_prompts]
    judges = judges_of(policies.values())
    return [(next(iter(answers.values()))["prompt"], _answers(answers, judges)) for answers in shown]


def _answers(rows: dict[str, dict[str, Any]], judges: list[str]) -> list[Answer]:
    """Return the answers of the baselines, one if all are equal, and then those of the policies."""

    def answer(name: str, side: str, row: dict[str, Any]) -> Answer:
        scores = {judge: row[f"{side}_{judge}"] for judge in judges if f"{side}_{judge}" in row}
        return Answer(name, str(row[f"{side}_completion"]), scores)

    one_baseline = len({row["baseline_completion"] for row in rows.values()}) == 1
    baselines = [
        answer("baseline" if one_baseline else f"baseline of {name}", "baseline", row) for name, row in rows.items()
    ]
    return [*baselines[: 1 if one_baseline else None], *(answer(name, "policy", row) for name, row in rows.items())]
