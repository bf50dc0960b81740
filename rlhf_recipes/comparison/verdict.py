"""Decide between groups: the frontier of the training, and a winner only if a held-out judge shows one."""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from rlhf_recipes.comparison.frontier import Frontier, find_frontier
from rlhf_recipes.comparison.groups import Group, run_alarms, run_path, trained_judges
from rlhf_recipes.comparison.head_to_head import Share, WinMatrix, win_matrices
from rlhf_recipes.comparison.runs import Evaluation

# Three runs give a spread of seeds that is not itself an accident of two.
ENOUGH_SEEDS = 3


@dataclass(frozen=True)
class Verdict:
    """The answer.

    Args:
        headline: One sentence: the winner, or the group that is ahead and the reason why it is no winner, or the
            groups that are level.
        findings: Sentences about the frontier.
        missing: What would allow to name a winner. Empty if there is one.
        caveats: Sentences about runs that do not count, or not like the others.
        frontier: Frontier of the ranked groups. None without paths, or if their scores have different units.
        matrices: Win rates between groups, one matrix per judge.
        matrix: The one that decides. None without evaluations.
    """

    headline: str
    findings: list[str]
    missing: list[str]
    caveats: list[str]
    frontier: Frontier | None
    matrices: list[WinMatrix]
    matrix: WinMatrix | None


def decide(groups: list[Group]) -> Verdict:
    """Return which groups are on the frontier, and the winner if there is one.

    The winner beats each other group on held-out prompts, by a judge that trained no run, and each interval over seeds
    and prompts shows it. All of these comparisons must hold, so none of them needs a correction for their number.
    Another held-out judge may be undecided, but must not show the opposite. Runs that failed or logged no numbers do
    not count; the caveats name them.
    """
    paths = {run.run_id: run_path(run) for group in groups for run in group.counted}
    ranked = [group for group in groups if group.counted]
    evaluations = {group.name: own for group in ranked if (own := _evaluations(group))}
    matrices = win_matrices(evaluations)
    trained = trained_judges(run for group in ranked for run in group.counted)
    matrix = _deciding(matrices, trained)
    held_out = [each for each in matrices if each.judge not in trained]
    caveats = [*_left_out(groups, paths), *_running(groups), *_held_out_curves(ranked)]
    one_unit = len({run.reward for group in ranked for run in group.counted}) <= 1
    if not one_unit:
        caveats.append("The runs were trained on different rewards. Their scores have different units: no frontier.")
    frontier = find_frontier(ranked, paths) if ranked and one_unit else None
    headline, missing = _answer(ranked, matrix, held_out, frontier)
    findings = _findings(frontier) if frontier and len(ranked) > 1 else []
    return Verdict(headline, findings, missing, caveats, frontier, matrices, matrix)


def _evaluations(group: Group) -> list[Evaluation]:
    return [run.evaluation for run in group.counted if run.evaluation and run.evaluation.rows]


def _deciding(matrices: list[WinMatrix], trained: set[str]) -> WinMatrix | None:
    """Return the matrix that decides: of a judge that no run was trained on, and that compares the most groups."""
    return min(matrices, key=lambda m: (m.judge in trained, -sum(map(bool, sum(m.cells, [])))), default=None)


def _answer(
    groups: list[Group], matrix: WinMatrix | None, held_out: list[WinMatrix], frontier: Frontier | None
) -> tuple[str, list[str]]:
    """Return the headline, and what is missing for a winner."""
    if not groups:
        return "No finished run has finite scores and KL: nothing to rank.", []
    if len(groups) == 1:
        return _alone(groups[0], frontier), []
    if matrix is None:
        return "No winner: no evaluation has compared answers to held-out prompts.", _missing(
            groups, None, held_out, None
        )
    winner = _winner(groups, matrix)
    ahead = [winner] if winner else _ahead(groups, matrix)
    missing = _missing(groups, matrix, held_out, next(iter(ahead), None))
    if not ahead:
        return "No winner: no two groups have answered the same held-out prompts for the same judge.", missing
    are = "is ahead" if len(ahead) == 1 else "are level"
    shown = f"No winner: {' and '.join(map(_title, ahead))} {are}"
    if matrix not in held_out:
        return f"{shown}, but the only judge, {matrix.judge}, trained the policies.", missing
    if len(ahead) > 1:
        return f"{shown} on held-out prompts, judged by {matrix.judge}.", missing
    return _by_held_out_judges(groups, ahead[0], matrix, held_out, missing)


def _by_held_out_judges(
    groups: list[Group], first: Group, matrix: WinMatrix, held_out: list[WinMatrix], missing: list[str]
) -> tuple[str, list[str]]:
    """Return the headline about the group that is ahead by a judge that trained no run, and what is missing."""
    rivals = [group for group in groups if group is not first]
    if doubts := [rival for rival in rivals if not _beats(matrix, first, rival)]:
        return _undecided(first, doubts, matrix), missing
    if against := [(each, rival) for each in held_out for rival in rivals if _beats(each, rival, first)]:
        return _disagreement(first, matrix, *against[0])
    closest = min(rivals, key=lambda rival: _mean(matrix, first, rival))
    where = f"on held-out prompts, judged by {matrix.judge}: {_figure(_share(matrix, first, closest))}"
    whom = f"against {_title(closest)}{', the closest of the others' if len(rivals) > 1 else ''}"
    if any(run_alarms(run) for run in first.runs):
        return f"{_title(first)} beats every other group {where} {whom}. But it raises alarms: read them first.", []
    return f"Winner: {_title(first)}. It beats every other group {where} {whom}.", []


def _disagreement(first: Group, matrix: WinMatrix, other: WinMatrix, rival: Group) -> tuple[str, list[str]]:
    """Say which held-out judge shows the opposite of the deciding one."""
    judges = f"{matrix.judge} and {other.judge}"
    headline = (
        f"No winner: the held-out judges disagree. By {matrix.judge}, {_title(first)} beats every other group; by "
        f"{other.judge}, {_title(rival)} beats it: {_figure(_share(other, rival, first))}."
    )
    return headline, [f"a choice between {judges}: read the answers, and evaluate with the judge that you trust"]


def _alone(group: Group, frontier: Frontier | None) -> str:
    title = f"One configuration, {_title(group)}"
    if frontier is None:
        return f"{title}. Its runs were trained on different rewards."
    return (
        f"{title}: its best score is {frontier.best[group.name].mean:.2f} within a KL of {frontier.kl[-1]:.2f} nats."
    )


def _undecided(first: Group, doubts: list[Group], matrix: WinMatrix) -> str:
    """Say which group is ahead, and why it does not win against the rival that is closest to it."""
    closest = min(doubts, key=lambda rival: _mean(matrix, first, rival))  # NaN last
    share, title = _share(matrix, first, closest), _title(closest)
    if share is None:
        reason = f"nothing compares it with {title}"
    elif share.sources is None:
        reason = f"one seed does not show that it is better than {title}: {_figure(share)} over prompts only"
    else:
        reason = f"the interval over seeds and prompts does not show that it beats {title}: {_figure(share)}"
    others = f" In question: {', '.join(rival.name for rival in doubts)}." if len(doubts) > 1 else ""
    return f"No winner: {_title(first)} is ahead on held-out prompts, judged by {matrix.judge}, but {reason}.{others}"


def _winner(groups: list[Group], matrix: WinMatrix) -> Group | None:
    """Return the group that beats each other group; None if there is none."""
    return next((g for g in groups if all(_beats(matrix, g, rival) for rival in groups if rival is not g)), None)


def _ahead(groups: list[Group], matrix: WinMatrix) -> list[Group]:
    """Return the group with the highest mean share against the others, or all that have it; none without a share."""
    merits = {
        group.name: float(np.mean(shares))
        for group in groups
        if (shares := [share.share for rival in groups if (share := _share(matrix, group, rival))])
    }
    highest = max(merits.values(), default=0.0)
    return [group for group in groups if group.name in merits and math.isclose(merits[group.name], highest)]


def _share(matrix: WinMatrix, group: Group, rival: Group) -> Share | None:
    """Return the share of a group against another; None if nothing compares them."""
    known = group is not rival and {group.name, rival.name} <= {*matrix.names}
    return matrix.cell(group.name, rival.name) if known else None


def _mean(matrix: WinMatrix, group: Group, rival: Group) -> float:
    share = _share(matrix, group, rival)
    return math.inf if share is None else share.share


def _beats(matrix: WinMatrix, group: Group, rival: Group) -> bool:
    share = _share(matrix, group, rival)
    return share is not None and share.separates and share.share > 0.5


def _title(group: Group) -> str:
    return f"{group.name} ({group.label})"


def _figure(share: Share | None) -> str:
    return "" if share is None else f"{share.share:.2f} [{share.low:.2f}, {share.high:.2f}]"


def _findings(frontier: Frontier) -> list[str]:
    """Return which groups lead within which KL, in the order of the KL."""
    spans = sorted((start, end, name) for name, own in frontier.leads.items() for start, end in own)
    parts = ", ".join(f"{name} from {max(start, 0.0):.2f} to {end:.2f}" for start, end, name in spans)
    return [f"By the score of the training, these groups lead within a KL (nats): {parts}."] if spans else []


def _missing(
    groups: list[Group], matrix: WinMatrix | None, held_out: list[WinMatrix], first: Group | None
) -> list[str]:
    """Return what to add before a winner can be named."""
    return [
        *_missing_seeds(groups),
        *_missing_evaluations(groups, held_out),
        *(_missing_precision(groups, matrix, first) if matrix and first else []),
    ]


def _missing_seeds(groups: list[Group]) -> list[str]:
    by_count: dict[int, list[str]] = {}
    for group in groups:
        by_count.setdefault(ENOUGH_SEEDS - len(group.counted), []).append(group.name)
    return [
        f"{count} more seed{'s' if count > 1 else ''} of {'each of ' if len(names) > 1 else ''}{', '.join(names)}"
        for count, names in sorted(by_count.items(), reverse=True)
        if count > 0
    ]


def _missing_evaluations(groups: list[Group], held_out: list[WinMatrix]) -> list[str]:
    bare = [group.run_name(run) for group in groups for run in group.counted if not _is_evaluated(run.evaluation)]
    texts = [f"evaluations of {', '.join(bare)} on the same prompts, with `rlhf evaluate`"] if bare else []
    if not held_out:
        texts.append("a judge that trains no policy: `--judge_functions` or `--judge_models` of `rlhf evaluate`")
    return texts


def _is_evaluated(evaluation: Evaluation | None) -> bool:
    return evaluation is not None and bool(evaluation.rows)


def _missing_precision(groups: list[Group], matrix: WinMatrix, first: Group) -> list[str]:
    """Return what makes the widest part of the intervals that do not decide, where there are enough seeds."""
    texts = []
    for rival in groups:
        if rival is first or {first.name, rival.name} - {*matrix.names} or _beats(matrix, first, rival):
            continue
        share = _share(matrix, first, rival)
        if share is None:
            texts.append(f"evaluations of {first.name} and {rival.name} on the same prompts, by the same judge")
        elif share.sources and min(len(first.counted), len(rival.counted)) >= ENOUGH_SEEDS:
            more = "held-out prompts" if share.sources[-1] > 0.5 else f"seeds of {first.name} and {rival.name}"
            texts.append(f"more {more}, which make most of the uncertainty between {first.name} and {rival.name}")
    return texts


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


def _held_out_curves(groups: list[Group]) -> list[str]:
    names = [group.run_name(run) for group in groups for run in group.runs if run.held_out]
    if not names or len(groups) == 1:
        return []
    return [
        f"The training of {', '.join(names)} logs no score and KL of its own answers: these are from the "
        "evaluations, on held-out prompts."
    ]
