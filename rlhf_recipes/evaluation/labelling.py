"""Label pairs of answers by everything that scores one answer or compares two."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from rlhf_recipes.algorithm.heads import combine_heads
from rlhf_recipes.data.pairs import Pair
from rlhf_recipes.evaluation.statistics import swapped_preferences
from rlhf_recipes.rewards.calls import RewardCalls
from rlhf_recipes.rewards.heads import KeptHeads
from rlhf_recipes.rewards.protocol import Scorer, scorer_of


class _Comparison(Scorer):
    """Give the method `compare` of a judge the form of a function that compares, and keep the judge's counts."""

    def __init__(self, name: str, judge: Any) -> None:
        self.__name__, self._judge, scorer = name, judge, scorer_of(judge)
        self.take_counts, self.figures = scorer.take_counts, scorer.figures  # type: ignore[method-assign]

    def __call__(self, prompts: Any, completions_a: Any, completions_b: Any) -> Any:  # type: ignore[override]
        """Compare answers."""
        return self._judge.compare(prompts, completions_a, completions_b)


@dataclass(frozen=True)
class _GuardedJudge:
    """Compare answers under a guard."""

    guarded: Callable[..., list[float]]

    def compare(self, prompts: Any, first: Any, second: Any) -> list[float]:
        """Return the results; NaN for all of a failed call, if failures are masked."""
        return self.guarded(prompts=prompts, completions_a=first, completions_b=second)


def guarded_comparisons(judges: Mapping[str, Any], calls: RewardCalls, own_limits: RewardCalls) -> dict[str, Any]:
    """Return the judges with a guard.

    Args:
        judges: Judges by name.
        calls: Guard of functions.
        own_limits: Guard of judges with a method `compare`: they have a time limit and retries of their own.
    """
    functions = {name: judge for name, judge in judges.items() if not hasattr(judge, "compare")}
    given = {name: judge for name, judge in judges.items() if name not in functions}
    compared = {name: _GuardedJudge(own_limits.guard(_Comparison(name, judge), name)) for name, judge in given.items()}
    guarded = calls.guard_judges(functions) | compared
    return {name: guarded[name] for name in judges}


@dataclass(frozen=True)
class Asked:
    """Hold the answers as judges see them: prompts, answers, token ids, and the other columns of the prompts.

    The answers to one prompt stand together, as many for each.
    """

    prompts: list[Any]
    answers: list[Any]
    ids: list[list[int]]
    columns: Mapping[str, list[Any]]
    samples: int = 1  # answers to each prompt
    at_once: int = 512  # answers in a call of a judge, which has a time limit

    def parts(self, numbers: Sequence[int], together: int = 1) -> tqdm:
        """Return the numbers of answers in the parts of one call each.

        Args:
            numbers: Numbers of answers, or of pairs.
            together: How many of them stay in one call.
        """
        step = max(self.at_once // together, 1) * together
        parts = [numbers[start : start + step] for start in range(0, len(numbers), step)]
        return tqdm(parts, desc="Labelling", disable=None)

    def of(self, numbers: Sequence[int]) -> dict[str, list[Any]]:
        """Return prompts and columns of some answers."""
        known = {"prompts": self.prompts, **self.columns}
        return {name: [values[number] for number in numbers] for name, values in known.items()}


def scores_of(judges: Mapping[str, Any], asked: Asked, calls: RewardCalls | None = None) -> np.ndarray:
    """Return the scores of all answers in standard deviations, one column per judge and per head, `(N, J)`.

    Judges have units of their own, and no unit should decide the mean. NaN where a judge gave no score.

    Args:
        judges: Judges that score one answer, by name.
        asked: Answers as judges see them.
        calls: Time limit and retries of a judge. Default: those of `RewardCalls()`.
    """
    guarded = (calls or RewardCalls()).guard_judges({**judges})
    columns = [column for name, judge in judges.items() for column in _columns_of(judge, guarded[name], asked)]
    scores = np.array(columns, dtype=float).reshape(len(columns), len(asked.answers)).T
    spread = np.ma.masked_invalid(scores).std(axis=0).filled(1.0)
    return scores / np.where(spread > 0, spread, 1.0)


def _columns_of(judge: Any, guarded: Callable[..., Any], asked: Asked) -> list[list[float]]:
    """Return the scores by a judge: one column, or one for each head of a reward model that combines several."""
    combine = getattr(judge, "combine", None)  # the last step of a reward model with score heads: (B, K) to (B,)
    kept = KeptHeads(guarded, combine or combine_heads)
    if combine is not None:
        judge.combine = kept.combine
    scores: list[float] = []
    try:
        for part in asked.parts(range(len(asked.answers)), asked.samples):
            answers, ids = ([values[number] for number in part] for values in (asked.answers, asked.ids))
            given = kept(completions=answers, completion_ids=ids, **asked.of(part))
            scores += [math.nan if score is None else float(score) for score in given]
    finally:
        if combine is not None:
            judge.combine = combine
    by_head = kept.by_answer()
    if by_head is None:
        return [scores]
    columns: list[list[float]] = np.where(np.isnan(scores), np.nan, by_head.T).tolist()
    return columns


def strengths(pairs: Sequence[Pair], scores: np.ndarray, judges: Mapping[str, Any], asked: Asked) -> np.ndarray:
    """Return how much each judge prefers the first answer of each pair, `(P, J)`; NaN where it does not know.

    Of scores it is their difference in standard deviations. Of a judge that compares, it is in [-1, 1].

    Args:
        pairs: Pairs of answers.
        scores: Scores by `scores_of`.
        judges: Judges that compare two answers, by name.
        asked: Answers.
    """
    first, second = (np.array([pair[side] for pair in pairs], dtype=int) for side in (0, 1))
    compared = [_compared(judge, pairs, asked) for judge in judges.values()]
    return np.column_stack([scores[first] - scores[second], *compared])


def _compared(judge: Any, pairs: Sequence[Pair], asked: Asked) -> np.ndarray:
    given: list[float] = []
    for part in asked.parts(range(len(pairs))):
        first, second = ([pairs[place][side] for place in part] for side in (0, 1))
        known = asked.of(first)
        rows = (known.pop("prompts"), [asked.answers[i] for i in first], [asked.answers[i] for i in second])
        compares = hasattr(judge, "compare")
        given += judge.compare(*rows) if compares else swapped_preferences(judge, *rows, **known)
    return 2 * np.array([math.nan if x is None else x for x in given], dtype=float) - 1


def decided(preferred: np.ndarray, *, only_agreed: bool) -> tuple[list[int], Counter[str]]:
    """Return for each pair 1 if the first answer is chosen, -1 if the second is, 0 if none; and count those.

    The mean over the judges decides.

    Args:
        preferred: Result of `strengths`.
        only_agreed: Whether a pair in which one judge prefers the first and one the second answer has no label.
    """
    unknown = np.isnan(preferred).any(axis=1) | (preferred.shape[1] == 0)
    split = (preferred > 0).any(axis=1) & (preferred < 0).any(axis=1) & ~unknown
    mean = np.where(unknown, 0.0, np.nan_to_num(preferred).mean(axis=1))
    left_out = split if only_agreed else np.zeros_like(split)
    labels = np.where(left_out, 0, np.sign(mean)).astype(int)
    ties = (mean == 0) & ~unknown & ~left_out
    counts = {"unlabelled": unknown, "disagreed": split, "ties": ties}
    return labels.tolist(), Counter({name: int(found.sum()) for name, found in counts.items()})
