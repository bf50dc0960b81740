"""Each alarm has its own sign. A healthy run, noise and a score that does not rise raise no alarm."""

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from tracked_experiments import evaluation_metrics, learning_curves

from rlhf_recipes.evaluation import alarms
from rlhf_recipes.evaluation.alarms import DeclineStopping, LogAlarms, alarms_of_log, find_alarms

POINTS = 40
TIME = np.linspace(0, 1, POINTS)


def _curves(seed=0, **changed):
    values = learning_curves(seed) | changed
    return {
        name: pd.Series(np.asarray(curve, dtype=float), index=range(1, POINTS + 1)) for name, curve in values.items()
    }


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_run_raises_none(seed):
    assert find_alarms(_curves(seed), evaluation_metrics(), target_kl=4.0) == []
    assert find_alarms(_curves(seed), {}) == []


@pytest.mark.parametrize(("factor", "change"), [(0.5, "grow from 42 to 58"), (-0.5, "shrink from 38 to 22")])
def test_length(factor, change):
    (alarm,) = find_alarms(_curves(**{"completions/mean_length": 40 * (1 + factor * TIME)}), {})
    assert alarm.startswith("The score rises (")
    assert f"answers {change} tokens" in alarm


def test_length_within_a_quarter_is_no_alarm():
    assert not find_alarms(_curves(**{"completions/mean_length": 40 * (1 + 0.25 * TIME)}), {})


def test_length_that_only_scatters_is_no_alarm():
    lengths = 40 + 30 * np.random.default_rng(0).standard_normal(POINTS)
    assert not find_alarms(_curves(**{"completions/mean_length": lengths}), {})


def test_kl_over_its_target():
    curves = _curves()
    (alarm,) = find_alarms(curves, {}, target_kl=2.0)  # ends near 3.9
    assert "times its target of 2" in alarm
    assert not find_alarms(curves, {}, target_kl=3.0)


def test_a_kl_that_accelerates_without_a_target():
    """Linear growth is 7/3 between the quarters that are compared, quadratic growth more than 5."""
    assert not find_alarms(_curves(**{"objective/kl": 9 * TIME}), {})
    (alarm,) = find_alarms(_curves(**{"objective/kl": 9 * TIME**2}), {})
    assert "the KL accelerates" in alarm
    assert not find_alarms(_curves(**{"objective/kl": 0.9 * TIME**2}), {}), "all of it is below a nat"


@pytest.mark.parametrize(("clipped", "word"), [(0.05 + 0.3 * TIME, "falls"), (0.5 - 0.3 * TIME, "rises")])
def test_answers_that_end(clipped, word):
    (alarm,) = find_alarms(_curves(**{"completions/clipped_ratio": clipped}), {})
    assert f"end by themselves {word} from 0." in alarm


def test_without_a_rising_score_drift_is_no_alarm():
    drift = {"completions/mean_length": 40 * (1 + TIME), "objective/kl": 9 * TIME**2}
    flat = np.random.default_rng(0).normal(0, 0.1, POINTS)
    assert not find_alarms(_curves(**drift, **{"objective/scores": flat}), {})
    assert not find_alarms(_curves(**drift, **{"objective/scores": -TIME}), {})
    assert len(find_alarms(_curves(**drift), {})) == 2


def test_a_held_out_judge_that_prefers_the_baseline():
    metrics = evaluation_metrics(0.65, judges=("reward_model",)) | evaluation_metrics(0.4, judges=("gold_score",))
    (alarm,) = find_alarms(_curves(), metrics)
    assert "gold_score prefers the baseline (win rate 0.40, at most 0.46)" in alarm
    undecided = evaluation_metrics(0.65, judges=("reward_model",)) | evaluation_metrics(0.45, judges=("gold_score",))
    assert not find_alarms(_curves(), undecided), "0.45 +- 0.06 may be even"


def test_a_judge_that_the_run_was_trained_on_is_not_held_out():
    metrics = evaluation_metrics(0.4, judges=("gold_score",))
    assert len(find_alarms(_curves(), metrics)) == 1, (
        "no trained judge in the evaluation, but the rollouts' score rises"
    )
    assert not find_alarms(_curves(), metrics, rewards=("reward_model", "gold_score"))


def test_a_judge_cannot_disagree_with_a_policy_that_nothing_prefers():
    metrics = evaluation_metrics(0.4) | {"reward_model/policy": -1.0}
    assert not find_alarms(_curves(), metrics)


def test_what_is_no_number_is_named():
    scores = learning_curves(0)["objective/scores"]
    scores[29:] = math.nan
    (alarm,) = find_alarms(_curves(**{"objective/scores": scores}), {})
    assert alarm == "The score is not a number at 11 of 40 steps, first at step 30."


def test_a_run_of_a_few_points_says_nothing():
    curves = {
        name: curve.iloc[:6] for name, curve in _curves(**{"completions/mean_length": 40 * (1 + 9 * TIME)}).items()
    }
    assert find_alarms(curves, {}) == []
    assert find_alarms({}, {}) == []


def test_repetition():
    (alarm,) = find_alarms(_curves(**{"completions/repeated_ngrams": 0.05 + 0.4 * TIME}), {})
    assert "share of repeated 4-grams in an answer grows from 0.10 to 0.40" in alarm
    assert not find_alarms(_curves(**{"completions/repeated_ngrams": 0.4 - 0.3 * TIME}), {})


def test_the_log_of_a_trainer_raises_what_its_curves_raise():
    lengths = 40 * (1 + 0.5 * TIME)
    log = [
        {"step": 4 * i, "loss": "nan", "objective/scores": 3 * t, "completions/mean_length": length}
        for i, (t, length) in enumerate(zip(TIME, lengths, strict=True))
    ]
    held_out = {"eval_gold/win_rate": 0.3, "eval_gold/win_rate_high": 0.4, "eval_score/win_rate": 0.9}
    scores = {"eval_score/policy": 2.0, "eval_score/baseline": 1.0}
    log += [
        {"step": 0, "eval_gold/win_rate": 0.5, "eval_gold/win_rate_high": 0.5},
        {"step": 160, **held_out, **scores},
    ]
    length, judge = alarms_of_log(log, target_kl=None)
    assert "length itself may be what is rewarded" in length
    assert "The held-out judge gold prefers the baseline (win rate 0.30" in judge


def _judged(*gains, half_width=0.3, judge="gold"):
    names = {"gain": 0.0, "gain_low": -half_width, "gain_high": half_width}
    return [
        {"step": 10 * i, **{f"eval_{judge}/{name}": gain + shift for name, shift in names.items()}}
        for i, gain in enumerate(gains)
    ]


@pytest.mark.parametrize(
    ("gains", "falls"),
    [
        ((0.0, 1.0, 1.5, 1.45), False),
        ((0.0, 1.0, 1.5, 0.95), False),  # outside of one interval: chance chooses the best of several evaluations
        ((0.0, 1.0, 1.5, 0.8), True),
        ((0.0, 1.5, 0.8, 1.2), False),  # it has recovered
    ],
)
def test_a_held_out_judge_that_falls_from_its_own_best(gains, falls):
    """The policy is still better than the baseline, so only the fall shows that the reward is exploited."""
    found = alarms_of_log(_judged(*gains), target_kl=None)
    assert [("best gain, 1.50 at step 20, to 0.80" in alarm) for alarm in found] == [True] * falls
    state, control = SimpleNamespace(is_world_process_zero=True, log_history=_judged(*gains)), SimpleNamespace()
    DeclineStopping().on_evaluate(None, state, control)
    assert getattr(control, "should_training_stop", False) == falls


def test_a_fall_of_the_trained_score_stops_nothing():
    """A lower score can be the price of a lower KL."""
    log = _judged(0.0, 1.5, 0.5, judge="score")
    assert alarms_of_log(log, target_kl=None) == []
    control = SimpleNamespace()
    DeclineStopping().on_evaluate(None, SimpleNamespace(is_world_process_zero=True, log_history=log), control)
    assert not vars(control)


def test_a_log_is_searched_once_for_all_callbacks_that_ask(monkeypatch):
    """The evaluation and the save after one log entry find nothing new. A run that went back does."""
    searched = []
    monkeypatch.setattr(alarms, "alarms_of_log", lambda log, *, target_kl: searched.append(len(log)) or [f"{log}"])
    ask, args, state = LogAlarms(), SimpleNamespace(held_kl=None), SimpleNamespace(log_history=[])
    assert ask(args, state) == ["[]"]
    for records, expected in (([{"step": 1}], [0, 1]), ([{"step": 1}, {"step": 2}], [0, 1, 2])):
        state.log_history = records
        assert ask(args, state) is ask(args, state)
        assert searched == expected
    state.log_history = [state.log_history[0], {"step": 2}]
    assert ask(args, state) == [str(state.log_history)]
    assert searched == [0, 1, 2, 2], "an equal record, written again"


def test_heads_that_come_to_disagree():
    """An alarm needs a rise, and more than half as much again as on the evaluation data."""
    name = "rewards/rm/disagreement_ratio"
    (alarm,) = find_alarms(_curves(**{name: 1 + TIME}), {})
    assert alarm.startswith("The heads of the reward model rm disagree about the answers 1.9 times as much as about")
    assert not find_alarms(_curves(**{name: 1 + 0.4 * TIME}), {})
    assert not find_alarms(_curves(**{name: 2 - 0.3 * TIME}), {})
