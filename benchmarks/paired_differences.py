"""Paired differences of a figure over seeds, with intervals that hold for few seeds."""

from collections.abc import Sequence

import numpy as np

from rlhf_recipes.evaluation.statistics import CrossedMean, crossed_mean

INTERVALS = "with 95 % t intervals over seeds"


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> CrossedMean:
    """Return the mean difference over seeds with its t interval.

    Args:
        ours: A figure of our runs, one for each seed.
        theirs: The figure of the other runs on the same seeds.
    """
    return crossed_mean(np.subtract(ours, theirs))


def as_cell(difference: CrossedMean, digits: int = 3) -> str:
    """Return a difference as text. One seed has no interval."""
    mean, low, high = (f"{x:+.{digits}f}" for x in (difference.mean, difference.low, difference.high))
    return mean if np.isnan(difference.low) else f"{mean} [{low}, {high}]"
