"""Measure how well a process reward model judges the steps of held-out answers."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import scipy  # it imports `scipy.stats`, which takes a second, at the first call

from rlhf_recipes.evaluation.figures import interval, rounded
from rlhf_recipes.evaluation.statistics import calibration_error
from rlhf_recipes.evaluation.verdicts import Judgement, Level
from rlhf_recipes.rewards.quality import CALIBRATED, MISCALIBRATED

Z = 1.96  # standard deviations of a 95 % interval
GOOD_AUC = 0.8


def step_metrics(
    log_odds: Sequence[np.ndarray], labels: Sequence[np.ndarray], scores: Sequence[float]
) -> dict[str, float]:
    """Return metrics over all steps, and over the answers that they belong to.

    A step is judged right if its probability is above 1/2, and is right if its label is.
    loss: mean binary cross-entropy.
    accuracy: share of steps that are judged as labelled, with a 95 % interval. Steps of one answer are not
    independent, so with r_i of n_i steps judged as labelled in answer i, the standard error of `a = sum r / sum n` is
    `sqrt(sum_i (r_i - a n_i)^2) / sum_i n_i`.
    right_steps: share of right steps. A model that has learned nothing reaches the larger one of this and its rest.
    auc: probability that a right step has a higher probability than a wrong one. A tie counts half.
    calibration_error: expected calibration error of the larger of p and 1 - p, see `preference_metrics`.
    first_error_accuracy: share of answers with a wrong step in which the first step that is judged wrong is the first
    wrong one. all_right_accuracy: share of answers without a wrong step in which no step is judged wrong.
    first_error_f1: harmonic mean of these two.
    Without wrong steps, or without answers that are all right, the figures that need them are left out.

    Args:
        log_odds: Log-odds of the steps of each answer.
        labels: Labels of the same steps, in [0, 1].
        scores: Summed rewards of each answer, for `score_mean` and `score_std` (of the population).

    Source: Zheng et al. 2024, ProcessBench, arXiv:2412.06559, section 3 (F1). Differs: the threshold is 1/2 and not
    chosen on a part of the data. Cochran 1977, "Sampling Techniques", chapter 6 (interval of a ratio).
    """
    odds, labelled = np.concatenate(log_odds).astype(float), np.concatenate(labels).astype(float)
    right, judged = labelled > 0.5, odds > 0
    probability, agrees = 1 / (1 + np.exp(-odds)), right == judged
    metrics = {
        "loss": (np.logaddexp(0, odds) - labelled * odds).mean(),
        **_accuracy([(a > 0) == (b > 0.5) for a, b in zip(log_odds, labels, strict=True)]),
        "right_steps": right.mean(),
        "score_mean": np.mean(scores),
        "score_std": np.std(scores),
        "calibration_error": calibration_error(np.maximum(probability, 1 - probability), agrees.astype(float)),
    }
    if right.any() and not right.all():
        pairs = right.sum() * (~right).sum()
        metrics["auc"] = scipy.stats.mannwhitneyu(odds[right], odds[~right]).statistic / pairs
    metrics |= _first_errors([_first(a <= 0) for a in log_odds], [_first(b <= 0.5) for b in labels])
    return {name: float(value) for name, value in metrics.items()}


def _accuracy(agrees: Sequence[np.ndarray]) -> dict[str, float]:
    right, steps = (np.array([measure(row) for row in agrees]) for measure in (np.sum, len))
    mean = right.sum() / steps.sum()
    half = Z * math.sqrt(((right - mean * steps) ** 2).sum()) / steps.sum()
    return {"accuracy": mean, "accuracy_low": max(mean - half, 0.0), "accuracy_high": min(mean + half, 1.0)}


def _first(wrong: np.ndarray) -> int:
    """Return the index of the first wrong step; -1 if there is none."""
    return int(wrong.argmax()) if wrong.any() else -1


def _first_errors(judged: list[int], labelled: list[int]) -> dict[str, float]:
    found, first = np.array(judged), np.array(labelled)
    has_error = first >= 0
    if not has_error.any() or has_error.all():
        return {}
    in_wrong, in_right = ((found == first)[rows].mean() for rows in (has_error, ~has_error))
    f1 = 2 * in_wrong * in_right / (in_wrong + in_right) if in_wrong + in_right else 0.0
    return {"first_error_accuracy": in_wrong, "all_right_accuracy": in_right, "first_error_f1": f1}


def process_reward_model_verdict(metrics: Mapping[str, float]) -> list[Judgement]:
    """Judge a process reward model by its accuracy, its AUC and its calibration.

    Args:
        metrics: Metrics of an evaluation: those of `step_metrics`, with `eval_` before their names.
    """
    known = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    return [_against_majority(known), *_separation(known), _calibration(known["calibration_error"])]


def _against_majority(known: Mapping[str, float]) -> Judgement:
    accuracy, low, high = (known[f"accuracy{end}"] for end in ("", "_low", "_high"))
    trivial = max(known["right_steps"], 1 - known["right_steps"])
    shown = f"accuracy {interval(accuracy, low, high)} of held-out steps"
    if high <= trivial:
        return Judgement("bad", f"{shown}: one answer for all steps would reach {trivial:.2f}. Train it further.")
    if low <= trivial:
        return Judgement("doubtful", f"{shown}: the interval includes {trivial:.2f}, that of one answer for all steps")
    return Judgement("good", f"{shown}: above {trivial:.2f}, that of one answer for all steps")


def _separation(known: Mapping[str, float]) -> list[Judgement]:
    if "auc" not in known:
        return [Judgement("doubtful", "all held-out steps have the same label, so nothing shows what it tells apart")]
    first = f", F1 of the first error {rounded(known['first_error_f1'])}" if "first_error_f1" in known else ""
    shown = f"AUC {rounded(known['auc'])}{first}"
    if known["auc"] <= 0.5:
        return [Judgement("bad", f"{shown}: it does not tell right steps from wrong ones")]
    level: Level = "good" if known["auc"] >= GOOD_AUC else "doubtful"
    return [Judgement(level, f"{shown}: {'it tells' if level == 'good' else 'it hardly tells'} right from wrong")]


def _calibration(error: float) -> Judgement:
    shown = f"calibration error {rounded(error)}"
    if error <= CALIBRATED:
        return Judgement("good", f"{shown}: its probabilities can be taken as such")
    level: Level = "bad" if error > MISCALIBRATED else "doubtful"
    return Judgement(level, f"{shown}: its probabilities are wrong. Train for fewer epochs or on more rows.")
