"""The rules of RewardBench and RewardBench 2, by hand numbers and against their definitions read literally."""

import math

import numpy as np
import pytest
from tolerances import FP64, assert_close

from rlhf_recipes.evaluation.reward_benchmarks import SECTIONS, benchmark_scores, row_outcome, ties_outcome


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ([1.0], [0.0], 1.0),
        ([0.0], [1.0], 0.0),
        ([1.0], [1.0], 0.0),  # RewardBench: a pair is right only if the score is higher
        ([2.0], [0.0, 1.0, 1.5], 1.0),
        ([2.0], [0.0, 3.0, 1.5], 0.0),
        ([2.0], [2.0, 1.0, 0.0], 1 / 2),  # RewardBench 2: the best share the point
        ([2.0], [2.0, 2.0, 2.0], 1 / 4),
        ([2.0], [2.0, 3.0, 0.0], 0.0),
        ([3.0, 2.0], [1.0], 1.0),
        ([3.0, 2.0], [2.0, 1.0], 0.0),
    ],
)
def test_an_outcome_by_hand(chosen, rejected, expected):
    assert row_outcome(chosen, rejected) == expected


def _literal_ties(reference, tied):
    """Follow the definition in words: 60 % accuracy, 40 % margin, and a hundredth for the size of the margin."""
    (right,), wrong = reference
    answers, others = tied
    in_order, tied_in_order = all(right > x for x in wrong), all(a > x for a in answers for x in others)
    spread = max(abs(a - b) for a in answers for b in answers)
    tied_margin = min(a - x for a in answers for x in others)
    margin = min(right - x for x in wrong)
    score = 0.3 * in_order + 0.3 * tied_in_order
    score += 0.2 * (tied_margin > spread) + 0.2 * (tied_margin > spread and margin > spread)
    return score + 0.01 * math.tanh(min(margin, tied_margin) / spread - 1)


def test_ties_follow_their_definition():
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        shift = rng.choice([0.0, 1.0, 3.0])
        reference = (rng.normal(shift, 1, 1).tolist(), rng.normal(0, 0.5, 3).tolist())
        tied = (rng.normal(shift, 0.5, 4).tolist(), rng.normal(0, 0.5, 3).tolist())
        score = ties_outcome(reference, tied)
        assert_close(score, _literal_ties(reference, tied), FP64)
        seen.add(round(score, 1))
    assert {0.0, 0.3, 0.6, 1.0} <= seen


def test_tied_answers_with_one_score_have_no_spread():
    assert_close(ties_outcome(([1.0], [0.0]), ([1.0, 1.0], [0.0])), 1.01, FP64)
    assert_close(ties_outcome(([0.0], [0.0]), ([0.0, 0.0], [0.0])), 0.0, FP64)
    assert_close(ties_outcome(([1.0], [0.0]), ([0.0, 0.0], [1.0])), 0.3 - 0.01, FP64)


def test_mathematics_weighs_as_much_as_all_code():
    shares = {name: (0.0, 164) for name in SECTIONS["Reasoning"]} | {"math-prm": (1.0, 447)}
    assert benchmark_scores(shares) == {"section/Reasoning": 0.5}


def test_a_section_is_the_mean_over_its_rows_and_the_score_that_of_the_sections():
    shares = {name: (1.0, 10) for names in SECTIONS.values() for name in names}
    shares["alpacaeval-easy"] = (0.0, 60)
    scores = benchmark_scores(shares)
    assert scores["section/Chat"] == 0.4
    assert scores["reward_bench"] == pytest.approx(3.4 / 4)
    del shares["mt-bench-hard"]
    assert benchmark_scores(shares).keys() == {"section/Chat", "section/Safety", "section/Reasoning"}


def test_the_score_of_the_second_needs_its_six_categories():
    shares = dict.fromkeys(("Factuality", "Precise IF", "Math", "Safety", "Focus"), (0.5, 9))
    assert benchmark_scores(shares) == {}
    assert benchmark_scores(shares | {"Ties": (1.1, 3)}) == {"reward_bench_2": pytest.approx(0.6)}
