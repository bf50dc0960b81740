"""Measure how well reward models rank answers, and compare them on the same rows."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain, combinations
from typing import Any

import numpy as np
import scipy
from tqdm.auto import tqdm

from rlhf_recipes.data.messages import Text
from rlhf_recipes.data.preferences import PreferenceSet
from rlhf_recipes.evaluation.calibration import CalibrationBin, calibration_interval, reliability
from rlhf_recipes.evaluation.reward_benchmarks import benchmark_scores, is_ties, row_outcome, ties_outcome
from rlhf_recipes.evaluation.statistics import head_metrics, mean_gain, preference_metrics, wilson_interval

# Answers per call of a scorer, which has a time limit. The answers to one prompt stay together: a judge may compare
# them with each other.
CHUNK = 256
REFERENCE, TIED = "ref", "tied"  # begin the ids of the category Ties: `ref:3`, `tied:3`


@dataclass(frozen=True)
class Ranking:
    """Hold how one reward model ranks the rows.

    Args:
        scores: Of each row the scores of its answers, the chosen ones first.
        outcomes: For each row 1 if it is ranked right and 0 if not, or a share (`row_outcome`). NaN for a row without
            all its scores, and for rows of the category Ties.
        by_category: The outcomes of each category; of Ties one for each question (`ties_outcome`).
        metrics: Figures by name.
        bins: Bins of the calibration plot.
    """

    scores: list[np.ndarray]
    outcomes: np.ndarray
    by_category: dict[str, np.ndarray]
    metrics: dict[str, float]
    bins: list[CalibrationBin] = field(default_factory=list)


def scores_of(
    judge: Callable[..., Any], prompts: list[Text], answers: list[list[Text]], **columns: list[list[Any]]
) -> list[np.ndarray]:
    """Return the scores of the answers to each prompt, NaN where there is none.

    Args:
        judge: Function with TRL's reward signature.
        prompts: Prompts.
        answers: Answers to each prompt.
        columns: Other arguments of the judge, a list for each prompt with one value per answer.
    """
    repeated = [[prompt] * len(row) for prompt, row in zip(prompts, answers, strict=True)]
    lists = {"prompts": repeated, "completions": answers, **columns}
    given = {name: list(chain.from_iterable(rows)) for name, rows in lists.items()}
    found: list[Any] = []
    sizes = [len(row) for row in answers]
    for part in tqdm(_parts(sizes), desc="Scoring", disable=None):
        found += judge(**{name: values[part] for name, values in given.items()})
    return np.split(np.array(found, dtype=float), np.cumsum(sizes)[:-1])


def _parts(sizes: list[int]) -> list[slice]:
    """Return the answers of each call, for the numbers of answers to each prompt."""
    parts = [slice(0, 0)]
    for size in sizes:
        start, end = parts[-1].start, parts[-1].stop
        if start < end and end + size - start > CHUNK:
            parts.append(slice(end, end + size))
        else:
            parts[-1] = slice(start, end + size)
    return parts


def rank(
    preferences: PreferenceSet, scores: list[np.ndarray], *, heads: list[np.ndarray] | None = None, seed: int = 0
) -> Ranking:
    """Measure how scores rank the rows of a preference set.

    Args:
        preferences: Rows.
        scores: Of each row the scores of its answers, the chosen ones first.
        heads: Of each row the scores of its answers by each head, `(answers, K)`, if there are several heads.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: If no row has all its scores, or questions of the category Ties have no second half.
    """
    categories = preferences.categories or []
    ties = np.array([is_ties(name) for name in categories] or [False] * len(scores))
    outcomes = np.array(
        [
            row_outcome(*_split(preferences, scores, row)) if np.isfinite(own).all() and not ties[row] else math.nan
            for row, own in enumerate(scores)
        ]
    )
    by_category = {
        name: _of_ties(preferences, scores) if is_ties(name) else outcomes[[own == name for own in categories]]
        for name in dict.fromkeys(categories)
    }
    counted = np.isfinite(outcomes)
    if not counted.any() and not ties.all():
        raise ValueError("No row has a score for each of its answers, so there is nothing to measure.")
    metrics = {"rows": float(len(scores)), "unscored": float((~counted & ~ties).sum())}
    metrics |= _share("accuracy", outcomes) | _by_category(by_category, seed)
    bins: list[CalibrationBin] = []
    if counted.any():
        pairs = _Pairs.of(preferences, scores, counted)
        metrics |= pairs.metrics(alone=preferences.is_pairs, seed=seed)
        bins = reliability(pairs.margins)
        if heads is not None:
            by_head = _Pairs.of(preferences, heads, counted)
            found = head_metrics(by_head.chosen, by_head.rejected)
            metrics |= {f"heads/{name}": value for name, value in found.items()}
    return Ranking(scores, outcomes, by_category, metrics, bins)


def _share(name: str, outcomes: np.ndarray) -> dict[str, float]:
    """Return the mean of the known outcomes with its interval; empty if none is known."""
    known = outcomes[np.isfinite(outcomes)]
    if not known.size:
        return {}
    low, high = wilson_interval(known.sum(), known.size)
    return {name: float(known.mean()), f"{name}_low": low, f"{name}_high": high}


def _by_category(by_category: Mapping[str, np.ndarray], seed: int) -> dict[str, float]:
    metrics: dict[str, float] = {}
    shares: dict[str, tuple[float, int]] = {}
    for category, outcomes in by_category.items():
        name = f"category/{category}/accuracy"
        count = int(np.isfinite(outcomes).sum())
        metrics[f"category/{category}/rows"] = float(count)
        if is_ties(category):
            metrics |= dict(zip((name, f"{name}_low", f"{name}_high"), interval_of(outcomes, seed), strict=True))
        else:
            metrics |= _share(name, outcomes)
        if count:
            shares[category] = metrics[name], count
    return metrics | benchmark_scores(shares)


def interval_of(values: np.ndarray, seed: int) -> tuple[float, float, float]:
    """Return the mean of the finite values, and its 95 % bootstrap interval."""
    mean, low, high = mean_gain(values, np.zeros_like(values), seed=seed).values()
    return mean, low, high


def _of_ties(preferences: PreferenceSet, scores: list[np.ndarray]) -> np.ndarray:
    """Return the outcome of each question of the category Ties; NaN for one without all its scores."""
    parts: dict[str, dict[str, int]] = {}
    for row, category in enumerate(preferences.categories or []):
        if is_ties(category):
            kind, _, question = (preferences.ids[row] if preferences.ids else "").partition(":")
            parts.setdefault(question, {})[kind] = row
    for question, rows in parts.items():
        if rows.keys() != {REFERENCE, TIED}:
            raise ValueError(
                f"`dataset_name` has the category Ties, but not both rows `{REFERENCE}:{question}` and "
                f"`{TIED}:{question}` in the column 'id' (row {min(rows.values())}). Give both."
            )
    halves = [[_split(preferences, scores, rows[kind]) for kind in (REFERENCE, TIED)] for rows in parts.values()]
    known = [all(np.isfinite(part).all() for half in both for part in half) for both in halves]
    return np.array(
        [ties_outcome(*both) if all_there else math.nan for both, all_there in zip(halves, known, strict=True)]
    )


def _split(preferences: PreferenceSet, scores: list[np.ndarray], row: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores of the chosen answers of a row, and those of the others."""
    count = len(preferences.chosen[row])
    return scores[row][:count], scores[row][count:]


@dataclass(frozen=True)
class _Pairs:
    """Hold every chosen answer beside every rejected one of its row, N pairs.

    Args:
        chosen: Scores, `(N,)`, or by head, `(N, K)`.
        rejected: Scores of the other answers, in the same form.
        chosen_lengths: Characters, `(N,)`.
        rejected_lengths: Characters of the other answers, `(N,)`.
        rows: Row of each pair, `(N,)`.
    """

    chosen: np.ndarray
    rejected: np.ndarray
    chosen_lengths: np.ndarray
    rejected_lengths: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, preferences: PreferenceSet, scores: list[np.ndarray], counted: np.ndarray) -> "_Pairs":
        """Return the pairs of the rows that count."""
        columns = []
        for row in np.flatnonzero(counted):
            right, wrong = np.split(np.arange(len(scores[row])), [len(preferences.chosen[row])])
            one, other = np.repeat(right, wrong.size), np.tile(wrong, right.size)
            lengths = np.array(preferences.lengths[row])
            columns.append(
                (scores[row][one], scores[row][other], lengths[one], lengths[other], np.full(one.size, row))
            )
        return cls(*(np.concatenate(column) for column in zip(*columns, strict=True)))

    @property
    def margins(self) -> np.ndarray:
        """Return the score of the chosen answer less that of the rejected one."""
        return self.chosen - self.rejected

    def metrics(self, *, alone: bool, seed: int) -> dict[str, float]:
        """Return the figures of `preference_metrics`, with intervals, and the accuracy by the longer answer.

        Args:
            alone: Whether each row is one pair, so that the accuracy over pairs is that over rows.
            seed: Seed of the bootstrap.
        """
        found = preference_metrics(self.chosen, self.rejected, self.chosen_lengths, self.rejected_lengths)
        accuracy = found.pop("accuracy")
        ends = calibration_interval(self.margins, self.rows, seed=seed)
        found |= dict(zip(("calibration_error_low", "calibration_error_high"), ends, strict=True))
        gaps, correct = self.chosen_lengths - self.rejected_lengths, (self.margins > 0).astype(float)
        if self.margins.std() > 0 and gaps.std() > 0 and gaps.size > 3:
            ends = scipy.stats.pearsonr(self.margins, gaps).confidence_interval(0.95)
            found |= {"length_correlation_low": float(ends.low), "length_correlation_high": float(ends.high)}
        for name, counted in (("longer", gaps > 0), ("shorter", gaps < 0)):
            found |= _share(f"accuracy_chosen_{name}", correct[counted]) | {
                f"pairs_chosen_{name}": float(counted.sum())
            }
        return found | ({} if alone else {"pairs": float(correct.size), "pair_accuracy": accuracy})


@dataclass(frozen=True)
class Comparison:
    """Hold by how much one reward model ranks better than another, on the same rows.

    Args:
        first: Name of one.
        second: Name of the other.
        metrics: For `accuracy`, and for the accuracy of each category, the mean over rows of the outcome of the first
            less that of the second, with the ends of its interval.
    """

    first: str
    second: str
    metrics: dict[str, float]

    @property
    def better(self) -> str | None:
        """Return the name of the better one; `None` if the interval includes 0 or has no width."""
        gain, low, high = (self.metrics[f"accuracy{end}"] for end in ("", "_low", "_high"))
        if not low < high or low <= 0 <= high:
            return None
        return self.first if gain > 0 else self.second


def compare(rankings: Mapping[str, Ranking], *, seed: int = 0) -> list[Comparison]:
    """Compare every two reward models by a paired bootstrap over rows.

    Args:
        rankings: Rankings of the same rows, by the name of the reward model.
        seed: Seed of the bootstrap.
    """
    found = []
    for (first, ours), (second, theirs) in combinations(rankings.items(), 2):
        pairs = {"accuracy": (ours.outcomes, theirs.outcomes)} | {
            f"category/{name}/accuracy": (outcomes, theirs.by_category[name])
            for name, outcomes in ours.by_category.items()
        }
        metrics: dict[str, float] = {}
        for name, (one, other) in pairs.items():
            ends = mean_gain(one, other, seed=seed).values()
            metrics |= dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
        found.append(Comparison(first, second, metrics))
    return found


def winner(comparisons: list[Comparison]) -> str | None:
    """Return the reward model that is better than every other one; `None` if there is none."""
    names = {name for comparison in comparisons for name in (comparison.first, comparison.second)}
    wins = [comparison.better for comparison in comparisons]
    return next((name for name in sorted(names) if wins.count(name) == len(names) - 1), None)
