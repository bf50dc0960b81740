"""Each side of a result is good, doubtful or bad, with its figures and its reason."""

import math

import numpy as np
import pytest
from tracked_experiments import learning_curves

from rlhf_recipes.evaluation.statistics import preference_metrics
from rlhf_recipes.evaluation.verdicts import evaluation_verdict, policy_verdict, reward_model_verdict, sft_verdict


def _reward_model(pairs=400, **changed):
    metrics = {"accuracy": 0.7, "calibration_error": 0.05, "length_correlation": 0.1} | changed
    return reward_model_verdict({f"eval_{name}": value for name, value in metrics.items()}, pairs)


def _log(**curves):
    steps = range(len(next(iter(curves.values()))))
    return [{"step": step + 1, **{name: float(curve[step]) for name, curve in curves.items()}} for step in steps]


def _levels(verdict):
    return [judgement.level for judgement in verdict]


@pytest.mark.parametrize(
    ("accuracy", "pairs", "level"),
    [(0.7, 400, "good"), (0.65, 60, "good"), (0.65, 40, "doubtful"), (0.58, 4000, "doubtful"), (0.5, 400, "bad")],
)
def test_accuracy_is_judged_by_its_interval(accuracy, pairs, level):
    judgement = _reward_model(pairs, accuracy=accuracy)[0]
    assert judgement.level == level
    assert f"accuracy {accuracy:.2f} [" in judgement.text


def test_the_interval_is_wilsons():
    """Wilson 1927, by hand for 14 of 20. The interval of Clopper and Pearson is [0.46, 0.88]."""
    z, n, p = 1.959964, 20, 0.7
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    assert f"[{centre - half:.2f}, {centre + half:.2f}]" in _reward_model(20, accuracy=0.7)[0].text


@pytest.mark.parametrize(("error", "level"), [(0.1, "good"), (0.2, "doubtful"), (0.3, "bad")])
def test_calibration(error, level):
    assert _reward_model(400, calibration_error=error)[1].level == level


def test_a_calibrated_model_is_good_whatever_the_number_of_its_pairs():
    """Chance alone makes a calibration error in a small evaluation. 100 draws of a model that is right."""
    rng = np.random.default_rng(0)
    for pairs in (50, 400):
        bad = 0
        for _ in range(100):
            margin = rng.normal(0, 1.5, pairs)
            labels = rng.random(pairs) < 1 / (1 + np.exp(-margin))
            chosen, rejected = np.where(labels, margin, 0), np.where(labels, 0, margin)
            metrics = preference_metrics(chosen, rejected, np.ones(pairs), np.ones(pairs))
            bad += _reward_model(pairs, calibration_error=metrics["calibration_error"])[1].level != "good"
        assert bad <= 5


@pytest.mark.parametrize(("r", "level"), [(0.3, "good"), (-0.4, "doubtful"), (0.6, "bad")])
def test_length(r, level):
    judgement = _reward_model(length_correlation=r)[2]
    assert judgement.level == level
    assert ("short" in judgement.text) is (r == -0.4)


def test_a_healthy_policy():
    log = _log(**learning_curves(0))
    log[-1] |= {f"eval_gold/win_rate{end}": x for end, x in {"": 0.7, "_low": 0.6, "_high": 0.8}.items()}
    verdict = policy_verdict(log, 4.0)
    assert len(verdict) == 3
    assert verdict[0].text.startswith("win rate 0.70 [0.60, 0.80] over the policy before training, by gold")
    assert "(target 4)" in verdict[1].text
    assert _levels(verdict) == ["good", "good", "good"]


@pytest.mark.parametrize(("rate", "level"), [((0.5, 0.4, 0.6), "doubtful"), ((0.3, 0.2, 0.4), "bad")])
def test_a_win_rate_is_judged_by_its_interval(rate, level):
    log = _log(**learning_curves(0))
    log[-1] |= {f"eval_gold/win_rate{end}": x for end, x in zip(("", "_low", "_high"), rate, strict=True)}
    assert policy_verdict(log)[0].level == level


def test_the_win_rate_is_that_of_the_weights_that_were_saved():
    log = _log(**learning_curves(0))
    for entry, rates in ((log[20], (0.7, 0.6, 0.8)), (log[-1], (0.3, 0.2, 0.4))):
        entry |= {f"eval_gold/win_rate{end}": x for end, x in zip(("", "_low", "_high"), rates, strict=True)}
    assert policy_verdict(log)[0].level == "bad"
    assert policy_verdict(log, best_step=log[20]["step"])[0].level == "good"


def test_a_policy_whose_score_falls_and_a_short_run():
    falling = np.linspace(1, -1, 40)
    assert policy_verdict(_log(**{"objective/scores": falling}))[1].level == "bad"
    assert policy_verdict(_log(**{"objective/scores": falling[:2]}))[1].level == "doubtful"
    assert policy_verdict(_log(**{"reward": -falling}))[1].text == "score -0.769 to 0.769: it rises"
    assert _levels(policy_verdict([{"step": 1}])) == ["doubtful", "doubtful", "good"]


def test_alarms_are_counted():
    curves = learning_curves(0) | {"completions/mean_length": 40 * (1 + np.linspace(0, 1, 40))}
    judgement = policy_verdict(_log(**curves))[2]
    assert judgement.level == "doubtful"
    assert judgement.text.startswith("1 alarm: The score rises")


@pytest.mark.parametrize(
    ("losses", "level", "text"),
    [
        ([2.0, 1.0, 1.001], "good", "held-out loss 2.00 to 1.00"),
        ([2.0, 1.0, 1.1], "bad", "its best at step 2"),
        ([1.0], "doubtful", "eval_on_start"),
        ([1.0, 1.0], "doubtful", "does not fall"),
    ],
)
def test_sft_with_evaluations(losses, level, text):
    (judgement,) = sft_verdict(_log(eval_loss=losses, eval_mean_token_accuracy=[0.5] * len(losses)))
    assert judgement.level == level
    assert text in judgement.text
    assert "token accuracy 0.500" in judgement.text


def test_sft_without_evaluations():
    assert _levels(sft_verdict(_log(loss=[2.0, 1.0]))) == ["good"]
    assert _levels(sft_verdict(_log(loss=[1.0, 2.0]))) == ["bad"]
    assert _levels(sft_verdict([{"step": 1}])) == ["doubtful"]


def test_an_evaluation_whose_judges_disagree():
    results = {"policy/kl": 6.0, "policy/length": 40.0, "baseline/length": 30.0}
    for judge, rate in (("reward_model", (0.9, 0.8, 1.0)), ("gold", (0.3, 0.2, 0.4))):
        results |= {f"{judge}/win_rate{end}": x for end, x in zip(("", "_low", "_high"), rate, strict=True)}
    verdict = evaluation_verdict(results)
    assert _levels(verdict) == ["bad", "good", "bad"]
    assert "by gold" in verdict[0].text, "the held-out judge comes first"
    assert "KL 6.00 nats to the baseline, length 30.0 to 40.0 tokens" in verdict[2].text
