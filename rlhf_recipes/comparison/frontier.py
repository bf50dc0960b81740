"""Find which groups have the highest score of the training within each KL that the runs have reached."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from rlhf_recipes.comparison.curves import best_score_within, leaders, stretches
from rlhf_recipes.comparison.groups import Group
from rlhf_recipes.evaluation.statistics import CrossedMean, crossed_mean

# Points of the frontier in a figure, and at most so many rows in a table.
POINTS, ROWS = 200, 8
# Share of the reached KL. A group that leads for less is not named: noise makes such leads.
SHORT = 0.05


@dataclass(frozen=True)
class Row:
    """The frontier within one KL.

    Args:
        kl: Limit of the KL, nats.
        leaders: Groups with the highest mean score: one, or several with equal scores.
        score: Their score, with its interval over seeds.
        close: Other groups, whose difference to the first leader has an interval over seeds that holds 0, or none.
    """

    kl: float
    leaders: list[Group]
    score: CrossedMean
    close: list[Group]


@dataclass(frozen=True)
class Frontier:
    """The highest mean score of a group within each KL: a curve, and rows at round numbers.

    Args:
        kl: Limits of the KL, `(K,)`, ascending, up to the largest KL of a run.
        scores: Highest mean score within each limit, `(K,)`. NaN below the start of all paths.
        leads: Stretches of KL in which each group leads, by the name of the group, without short ones.
        rows: The frontier at round numbers and at the largest KL.
        best: Best score of each group within the largest KL, by its name, with an interval over seeds.
    """

    kl: np.ndarray
    scores: np.ndarray
    leads: dict[str, list[tuple[float, float]]]
    rows: list[Row]
    best: dict[str, CrossedMean]


def find_frontier(groups: list[Group], paths: dict[str, pd.DataFrame]) -> Frontier:
    """Return the frontier of some groups.

    The score of a run within a KL is the best one on its smoothed path up to there. The score of a group is the mean
    over its runs. So a run that stopped at a small KL keeps its score at larger ones, and limits nothing.

    Args:
        groups: Groups, each with at least one path.
        paths: Path of each ranked run by its id.
    """
    members = [[paths[run.run_id] for run in group.runs if run.run_id in paths] for group in groups]
    reach = float(max(path["kl"].max() for path in paths.values()))
    kl = np.unique(np.linspace(min(reach, 0.0), reach, POINTS))
    means = np.array([_scores(runs, kl).mean(axis=0) for runs in members])
    leading = leaders(means)
    ticks = np.array(MaxNLocator(ROWS - 1).tick_values(0.0, max(reach, 0.0)))
    rows = [_row(groups, members, float(limit)) for limit in [*ticks[(ticks > 0) & (ticks < 0.97 * reach)], reach]]
    return Frontier(
        kl=kl,
        scores=np.where(leading.any(axis=0), np.where(leading, means, -np.inf).max(axis=0), np.nan),
        leads={
            group.name: [(start, end) for start, end in stretches(kl, own) if end - start >= SHORT * (kl[-1] - kl[0])]
            for group, own in zip(groups, leading, strict=True)
        },
        rows=[row for row in rows if row.leaders],
        best={group.name: crossed_mean(_scores(runs, reach)) for group, runs in zip(groups, members, strict=True)},
    )


def _scores(paths: list[pd.DataFrame], limits: ArrayLike) -> np.ndarray:
    """Return the best score of each run within each KL, `(R,)` or `(R, K)`. NaN where a whole path is above the KL."""
    return np.array([best_score_within(path, limits) for path in paths])


def _row(groups: list[Group], members: list[list[pd.DataFrame]], limit: float) -> Row:
    scores = [_scores(paths, limit) for paths in members]
    leading = leaders(np.array([[own.mean()] for own in scores]))[:, 0]
    first = scores[int(leading.argmax())]
    close = [
        group
        for group, own, leads in zip(groups, scores, leading, strict=True)
        if not leads and np.isfinite(own).all() and not crossed_mean(first[:, None] - own).excludes(0.0)
    ]
    names = [group for group, leads in zip(groups, leading, strict=True) if leads]
    return Row(limit, names, crossed_mean(first), close)
