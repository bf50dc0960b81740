"""Compare final policies with each other, on the held-out prompts that their evaluations share.

The evaluations have recorded the completions and their scores. Nothing is generated or judged here.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_recipes.comparison.runs import Evaluation
from rlhf_recipes.evaluation.statistics import win_rate

Scores = dict[str, list[float | None]]  # of the samples of each prompt


@dataclass(frozen=True)
class WinMatrix:
    """The share of prompts on which a row beats a column: `(share, low, high)`, or None without common prompts."""

    judge: str
    names: list[str]
    cells: list[list[tuple[float, float, float] | None]]
    num_prompts: int


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
    return sorted(judges, key=lambda judge: (judge == "reward_model", judge))


def win_matrices(policies: dict[str, Evaluation]) -> list[WinMatrix]:
    """Compare every two policies, and each with its baseline, on the prompts that both have answered.

    Scores of `reward_model` are compared only between evaluations with the same reward model.

    Args:
        policies: Evaluations by the name of the policy.

    Returns:
        One matrix per judge. Its last column is the baseline of the policy in the row.
    """
    return [_win_matrix(judge, policies) for judge in judges_of(policies.values())]


def _win_matrix(judge: str, policies: dict[str, Evaluation]) -> WinMatrix:
    scores = {name: _scores_by_prompt(evaluation, f"policy_{judge}") for name, evaluation in policies.items()}
    baselines = {name: _scores_by_prompt(evaluation, f"baseline_{judge}") for name, evaluation in policies.items()}
    cells = []
    for name, evaluation in policies.items():
        row = [
            None if other == name or not _one_scale(judge, evaluation, rival) else _beats(scores[name], scores[other])
            for other, rival in policies.items()
        ]
        cells.append([*row, _beats(scores[name], baselines[name])])
    return WinMatrix(judge, list(policies), cells, max(len(known) for known in scores.values()))


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


def _beats(ours: Scores, theirs: Scores) -> tuple[float, float, float] | None:
    common = [prompt for prompt in ours if prompt in theirs]
    if not common:
        return None
    width = max(len(scores[prompt]) for scores in (ours, theirs) for prompt in common)
    padded = [[s[prompt] + [None] * (width - len(s[prompt])) for prompt in common] for s in (ours, theirs)]
    outcome = win_rate(*np.array(padded, dtype=float))
    if math.isnan(outcome["win_rate"]):
        return None
    return outcome["win_rate"], outcome["win_rate_low"], outcome["win_rate_high"]


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
