"""Figures of a process reward model, by hand."""

import math

import numpy as np
import pytest
from tolerances import FP64, assert_close

from rlhf_recipes.evaluation.steps import process_reward_model_verdict, step_metrics

ODDS = [np.array([2.0, -1.0, 3.0]), np.array([1.0, 0.5]), np.array([-1.0]), np.array([1.0, -2.0, -3.0])]
LABELS = [np.array([1, 0, 1]), np.array([1, 1]), np.array([1]), np.array([1, 1, 0])]


def test_figures_of_four_answers():
    """Seven of nine steps agree. The errors are at 1 and 2 (found: 1 and 1); of two right answers one is kept."""
    metrics = step_metrics(ODDS, LABELS, [1.0, 2.0, 3.0, 6.0])
    assert_close(metrics["accuracy"], 7 / 9, FP64)
    deviations = [3 - 3 * 7 / 9, 2 - 2 * 7 / 9, 0 - 7 / 9, 2 - 3 * 7 / 9]
    half = 1.96 * math.sqrt(sum(d * d for d in deviations)) / 9
    assert_close(metrics["accuracy_low"], 7 / 9 - half, FP64)
    assert_close(metrics["accuracy_high"], min(7 / 9 + half, 1), FP64)
    assert_close(metrics["right_steps"], 7 / 9, FP64)
    assert (metrics["score_mean"], metrics["score_std"]) == (3.0, math.sqrt(3.5))
    assert metrics["first_error_accuracy"] == metrics["all_right_accuracy"] == metrics["first_error_f1"] == 0.5
    # Right steps: 2, 3, 1, .5, -1, 1, -2. Wrong ones: -1 (beaten by five, one tie), -3 (beaten by all seven).
    assert_close(metrics["auc"], (5.5 + 7) / 14, FP64)
    steps = zip(np.concatenate(ODDS), np.concatenate(LABELS), strict=True)
    losses = [math.log1p(math.exp(-odds if right else odds)) for odds, right in steps]
    assert_close(metrics["loss"], sum(losses) / 9, FP64)


def test_figures_that_need_both_kinds_are_left_out():
    metrics = step_metrics(ODDS[:1], [np.ones(3)], [1.0])
    assert not {"auc", "first_error_f1"} & metrics.keys()
    assert metrics["right_steps"] == 1.0
    assert [judged.level for judged in process_reward_model_verdict(metrics)][:2] == ["bad", "doubtful"]


def test_soft_labels_are_probabilities():
    metrics = step_metrics([np.array([0.0, 4.0])], [np.array([0.5, 0.9])], [1.0])
    expected = (math.log(2) + math.log1p(math.exp(4)) - 0.9 * 4) / 2
    assert_close(metrics["loss"], expected, FP64)


@pytest.mark.parametrize(
    ("change", "levels"),
    [
        ({}, ["good", "good", "good"]),
        ({"accuracy_low": 0.79}, ["doubtful", "good", "good"]),
        ({"accuracy_high": 0.8}, ["bad", "good", "good"]),
        ({"auc": 0.6, "calibration_error": 0.15}, ["good", "doubtful", "doubtful"]),
        ({"auc": 0.5, "calibration_error": 0.3}, ["good", "bad", "bad"]),
    ],
)
def test_the_verdict_compares_with_one_answer_for_all_steps(change, levels):
    known = {"accuracy": 0.9, "accuracy_low": 0.85, "accuracy_high": 0.95, "right_steps": 0.2, "auc": 0.9}
    known |= {"calibration_error": 0.02, "first_error_f1": 0.7} | change
    verdict = process_reward_model_verdict({f"eval_{name}": value for name, value in known.items()})
    assert [judged.level for judged in verdict] == levels
