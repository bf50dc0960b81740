"""Curves of several runs on common axes: smoothing, bands over seeds, and the score that a run reaches within a KL.

Pandas in, pandas or floats out; knows nothing of MLflow.
"""

import math

import numpy as np
import pandas as pd

from rlhf_recipes.evaluation.alarms import finite

# A tenth of a run: wide enough to see a trend of 40 noisy points, too short to move its ends by more than a twentieth.
SMOOTHED_SHARE = 0.1


def smooth(curve: pd.Series) -> pd.Series:
    """Return the centred moving average over a tenth of the finite points.

    At both ends the window is cut, not padded, so a curve shorter than 20 points is returned as it is.
    """
    points = finite(curve)
    window = max(1, int(len(points) * SMOOTHED_SHARE))
    smoothed: pd.Series = points.rolling(window, center=True, min_periods=1).mean()
    return smoothed


def over_samples(curve: pd.Series, samples: pd.Series) -> pd.Series:
    """Return a curve over steps as one over completions sampled so far.

    Steps without a count are interpolated; the values of several steps on one rollout are averaged.

    Args:
        curve: Indexed by step.
        samples: Completions sampled so far, indexed by step, at least one finite.
    """
    known = finite(samples).sort_index()
    counts = np.interp(curve.index, known.index, known.to_numpy(dtype=float))
    averaged: pd.Series = pd.Series(curve.to_numpy(dtype=float), index=counts).groupby(level=0).mean()
    return averaged


def seed_band(curves: list[pd.Series]) -> pd.DataFrame:
    """Return mean, smallest and largest value of several curves, where all of them have values.

    The grid is the union of their points; between its own points a curve is linear, outside its range it says nothing.

    Args:
        curves: Of the seeds of one configuration; those without a finite point are left out.

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
    """Return a run's path in the plane of KL and score, both smoothed, in the order of training.

    Args:
        kl: Nats per completion, indexed by step.
        scores: Indexed by step.

    Returns:
        Columns `kl` and `score`, at the steps that have both.
    """
    path = pd.concat({"kl": smooth(kl), "score": smooth(scores)}, axis=1, join="inner")
    return path.sort_index()


def best_score_within(path: pd.DataFrame, limit: float) -> float:
    """Return the highest score on a path where its KL is at most `limit`: what the run offers within that budget.

    The path is linear between its points, so a crossing of the limit counts. A KL that comes back under the limit, as
    an adaptive controller makes it, counts as well.

    Args:
        path: As of `frontier_path`.
        limit: Nats.

    Returns:
        The score; NaN if the whole path lies above the limit.
    """
    kl, score = path["kl"].to_numpy(dtype=float), path["score"].to_numpy(dtype=float)
    crossing = np.flatnonzero((kl[:-1] - limit) * (kl[1:] - limit) < 0)
    share = (limit - kl[crossing]) / (kl[crossing + 1] - kl[crossing])
    at_limit = score[crossing] + share * (score[crossing + 1] - score[crossing])
    return float(max([*score[kl <= limit], *at_limit], default=math.nan))
