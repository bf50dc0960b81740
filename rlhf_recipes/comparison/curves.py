"""Bring curves of several runs to common axes: smoothing, bands over seeds, the frontier of score and KL."""

import math

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from rlhf_recipes.evaluation.alarms import finite

# Share of a run in the moving average. A tenth shows the trend of 40 noisy points, and blurs a twentieth at each end.
SMOOTHED_SHARE = 0.1


def smooth(curve: pd.Series) -> pd.Series:
    """Return the centred moving average over a tenth of the finite points.

    The window is cut at both ends, not padded. A curve of less than 20 points does not change.
    """
    points = finite(curve)
    window = max(1, int(len(points) * SMOOTHED_SHARE))
    smoothed: pd.Series = points.rolling(window, center=True, min_periods=1).mean()
    return smoothed


def over_samples(curve: pd.Series, samples: pd.Series) -> pd.Series:
    """Return a curve over steps as a curve over the number of completions sampled so far.

    A step without a count gets an interpolated one. Several steps on one rollout are averaged.

    Args:
        curve: Values indexed by step.
        samples: Completions sampled so far, indexed by step, at least one finite.
    """
    known = finite(samples).sort_index()
    counts = np.interp(curve.index, known.index, known.to_numpy(dtype=float))
    averaged: pd.Series = pd.Series(curve.to_numpy(dtype=float), index=counts).groupby(level=0).mean()
    return averaged


def seed_band(curves: list[pd.Series]) -> pd.DataFrame:
    """Return the mean, the smallest and the largest value of several curves, where all of them have values.

    The grid is the union of their points. A curve is linear between its points, and has no value outside of them.

    Args:
        curves: One curve per seed of a configuration. Curves without a finite point are left out.

    Returns:
        Columns `mean`, `low` and `high`; empty without a common range.
    """
    known = [finite(curve).sort_index() for curve in curves]
    known = [curve for curve in known if len(curve)]
    if not known:
        return pd.DataFrame(columns=["mean", "low", "high"], dtype=float)
    grid = np.unique(np.concatenate([curve.index.to_numpy(dtype=float) for curve in known]))
    start, end = max(curve.index[0] for curve in known), min(curve.index[-1] for curve in known)
    grid = grid[(grid >= start) & (grid <= end)]
    values = np.array([np.interp(grid, curve.index, curve) for curve in known])
    return pd.DataFrame({"mean": values.mean(axis=0), "low": values.min(axis=0), "high": values.max(axis=0)}, grid)


def frontier_path(kl: pd.Series, scores: pd.Series) -> pd.DataFrame:
    """Return the path of a run in the plane of KL and score, both smoothed, in the order of training.

    Args:
        kl: Nats per completion, indexed by step.
        scores: Scores indexed by step.

    Returns:
        Columns `kl` and `score`, at the steps that have both.
    """
    path = pd.concat({"kl": smooth(kl), "score": smooth(scores)}, axis=1, join="inner")
    return path.sort_index()


def best_score_within(path: pd.DataFrame, limits: ArrayLike) -> np.ndarray:
    """Return the highest score on the part of a path whose KL is at most each limit.

    The path is linear between its points, so a crossing of the limit counts. An adaptive controller can bring the KL
    back under the limit. That part counts too.

    Args:
        path: Path that `frontier_path` returned.
        limits: Largest KL, nats, `(K,)` or one number.

    Returns:
        The scores, in the shape of `limits`. NaN where the whole path is above the limit.
    """
    kl, score = path["kl"].to_numpy(dtype=float), path["score"].to_numpy(dtype=float)
    limit = np.asarray(limits, dtype=float)[..., None]
    below = np.where(kl <= limit, score, -np.inf)
    crosses = (kl[:-1] - limit) * (kl[1:] - limit) < 0
    share = np.divide(limit - kl[:-1], np.diff(kl), out=np.zeros(crosses.shape), where=crosses)
    at_limit = np.where(crosses, score[:-1] + share * np.diff(score), -np.inf)
    best = np.concatenate([below, at_limit], axis=-1).max(axis=-1, initial=-np.inf)
    found: np.ndarray = np.where(np.isfinite(best), best, math.nan)
    return found


def leaders(scores: np.ndarray) -> np.ndarray:
    """Return which groups have the highest score within each KL, `(G, K)`. Equal scores lead together.

    A group whose score is lower than that of another group at every KL leads nowhere. A group that moves little keeps
    its best score at larger KLs, where it leads only if no other group has reached more with the larger KL.

    Args:
        scores: Score of each of G groups within each of K limits of KL, `(G, K)`. NaN where a group has none.
    """
    known = np.isfinite(scores)
    best = np.where(known, scores, -np.inf).max(axis=0)
    leading: np.ndarray = known & (scores == best)
    return leading


def stretches(kl: np.ndarray, leading: np.ndarray) -> list[tuple[float, float]]:
    """Return the first and the last KL of each unbroken stretch in which a group leads.

    Args:
        kl: Limits of KL, `(K,)`, ascending.
        leading: Whether the group leads within each limit, `(K,)`.
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[0], leading.astype(int), [0]])))
    return [(float(kl[start]), float(kl[end - 1])) for start, end in zip(edges[::2], edges[1::2], strict=True)]
