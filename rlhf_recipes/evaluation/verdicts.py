"""Judge the result of a stage in at most three lines: good, doubtful or bad, each with its reason.

The functions read figures that the stage has computed anyway.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from rlhf_recipes.evaluation.alarms import KL_OVER_TARGET, alarms_of_log, curves_of_log, finite, first_and_last
from rlhf_recipes.evaluation.figures import ENDS, evaluation_of, held_out_first, interval, rounded
from rlhf_recipes.evaluation.statistics import wilson_interval
from rlhf_recipes.rewards.quality import (
    CALIBRATED,
    CHANCE,
    GOOD_ACCURACY,
    LITTLE_LENGTH,
    MISCALIBRATED,
    MUCH_LENGTH,
)

Level = Literal["good", "doubtful", "bad"]
BINS = 10  # of the calibration error
# Relative rise of a held-out loss from its best. Less is noise between two evaluations of some hundred rows.
RISE = 0.02
SCORES = ("objective/scores", "reward")  # the score of a training, by PPO or by TRL


@dataclass(frozen=True)
class Judgement:
    """Say how good one side of a result is.

    Args:
        level: `good`, `doubtful` or `bad`.
        text: Figures and reason.
    """

    level: Level
    text: str


def reward_model_verdict(metrics: Mapping[str, float], pairs: int) -> list[Judgement]:
    """Judge a reward model by accuracy, calibration and dependence on length.

    Args:
        metrics: Metrics of an evaluation, `eval_accuracy` and others of `statistics.preference_metrics`.
        pairs: Number of pairs in the evaluation.
    """
    accuracy, error, length = (
        metrics[f"eval_{name}"] for name in ("accuracy", "calibration_error", "length_correlation")
    )
    return [_accuracy(accuracy, pairs), _calibration(error, pairs), _length(length)]


def _accuracy(accuracy: float, pairs: int) -> Judgement:
    low, high = wilson_interval(accuracy * pairs, pairs)
    shown = f"accuracy {interval(accuracy, low, high)} on {pairs:,} held-out pairs"
    if accuracy <= CHANCE:
        return Judgement("bad", f"{shown}: no better than chance ({CHANCE}). Train it further before PPO.")
    if low <= CHANCE:
        return Judgement("doubtful", f"{shown}: the interval includes chance ({CHANCE}). Use more pairs.")
    if accuracy < GOOD_ACCURACY:
        return Judgement("doubtful", f"{shown}: people agree on more than {GOOD_ACCURACY}. Use more or cleaner pairs.")
    return Judgement("good", f"{shown}: clearly above chance ({CHANCE})")


def _calibration(error: float, pairs: int) -> Judgement:
    """Judge the calibration error beyond the one that a perfect model of this accuracy would show by chance.

    In each of `BINS` bins with `n = pairs / BINS` pairs the mean distance is `sqrt(2 / pi) sqrt(p (1 - p) / n)`, at
    most `0.4 sqrt(BINS / pairs)`.
    """
    excess = error - math.sqrt(2 / math.pi) / 2 * math.sqrt(BINS / pairs)
    shown = f"calibration error {rounded(error)}"
    if excess <= CALIBRATED:
        return Judgement("good", f"{shown}: its margins are right as probabilities, as far as {pairs:,} pairs show")
    level: Level = "bad" if excess > MISCALIBRATED else "doubtful"
    return Judgement(level, f"{shown}: its margins are wrong as probabilities. Train for fewer epochs or more rows.")


def _length(correlation: float) -> Judgement:
    shown = f"length correlation {rounded(correlation)}"
    if abs(correlation) <= LITTLE_LENGTH:
        return Judgement("good", f"{shown}: the score is not about length")
    level: Level = "bad" if abs(correlation) > MUCH_LENGTH else "doubtful"
    side = "long" if correlation > 0 else "short"
    outlook = f"it prefers {side} answers, and PPO will write them. Train it with `remove_length_bias: true`."
    return Judgement(level, f"{shown}: {outlook}")


def policy_verdict(
    log_history: Iterable[Mapping[str, Any]], target_kl: float | None = None, best_step: int | None = None
) -> list[Judgement]:
    """Judge a policy by its held-out win rate, by score, KL and length, and by its alarms.

    Args:
        log_history: Log of transformers' `TrainerState`.
        target_kl: Target of an adaptive controller, nats.
        best_step: Step whose weights the model has; `None`: those of the last step.
    """
    log = list(log_history)
    curves, alarms = curves_of_log(log), alarms_of_log(log, target_kl=target_kl)
    count = f"{len(alarms)} alarm{'s' * (len(alarms) > 1)}: {alarms[0]}" if alarms else "no alarm in its curves"
    return [
        _win_rate(evaluation_of(log, best_step)),
        _course(curves, target_kl),
        Judgement("doubtful" if alarms else "good", count),
    ]


def _win_rate(evaluation: Mapping[str, Any]) -> Judgement:
    latest = {name.removeprefix("eval_"): value for name, value in evaluation.items() if name.startswith("eval_")}
    judges = judges_of(latest)
    if not judges:
        return Judgement("doubtful", "no held-out evaluation: set `eval_strategy: steps`, or run the next command")
    return win_rate_judgement(latest, judges[0], "the policy before training")


def judges_of(results: Mapping[str, float]) -> list[str]:
    """Return the judges with a win rate: held-out ones first, those that the policy was trained on last."""
    return held_out_first(name.removesuffix("/win_rate") for name in results if name.endswith("/win_rate"))


def win_rate_judgement(results: Mapping[str, float], judge: str, baseline: str) -> Judgement:
    """Judge a win rate by its interval.

    Args:
        results: Figures with `<judge>/win_rate` and its interval.
        judge: Name of the judge.
        baseline: Name of the other policy, for the text.
    """
    rate, low, high = (results[f"{judge}/win_rate{end}"] for end in ENDS)
    shown = f"win rate {interval(rate, low, high)} over {baseline}, by {judge}"
    if not math.isfinite(rate):
        return Judgement("bad", f"{shown}: it gave no scores")
    if low > CHANCE:
        return Judgement("good", f"{shown}: better")
    if high < CHANCE:
        return Judgement("bad", f"{shown}: worse")
    return Judgement("doubtful", f"{shown}: the interval includes 0.5, so neither is better")


def _course(curves: Mapping[str, pd.Series], target_kl: float | None) -> Judgement:
    parts, level, reason = [], _score_level(curves), ""
    if score := _ends(curves, *SCORES):
        parts.append(f"score {rounded(score[0])} to {rounded(score[1])}")
        reason = {"good": ": it rises", "doubtful": ": it does not clearly rise", "bad": ": it falls"}[level]
    if kl := _ends(curves, "objective/kl", "kl"):
        of_target = "" if target_kl is None else f" (target {target_kl:g})"
        parts.append(f"KL {rounded(kl[1])} nats{of_target}")
        if target_kl is not None and kl[1] > KL_OVER_TARGET * target_kl:
            level, reason = "doubtful", ": the KL is far above its target"
    if length := _ends(curves, "completions/mean_length"):
        parts.append(f"length {rounded(length[0])} to {rounded(length[1])} tokens")
    if pairs := _ends(curves, "rewards/accuracies"):  # DPO's
        parts.append(f"accuracy on training pairs {rounded(pairs[0])} to {rounded(pairs[1])}")
    if not parts:
        return Judgement("doubtful", "no figure was logged: lower `logging_steps`")
    return Judgement(level, f"{', '.join(parts)}{reason}")


def _score_level(curves: Mapping[str, pd.Series]) -> Level:
    name = next((name for name in SCORES if name in curves), None)
    ends = None if name is None else first_and_last(curves[name])
    if name is None:
        return "good"  # DPO has no score
    if ends is None or not ends[2]:
        return "doubtful"
    return "good" if ends[1] > ends[0] else "bad"


def _ends(curves: Mapping[str, pd.Series], *names: str) -> tuple[float, float] | None:
    """Return the means of the first and the last quarter of the first curve that there is."""
    for name in names:
        points = finite(curves.get(name, pd.Series(dtype=float)))
        if len(points):
            quarter = max(len(points) // 4, 1)
            return float(points.iloc[:quarter].mean()), float(points.iloc[-quarter:].mean())
    return None


def sft_verdict(log_history: Iterable[Mapping[str, Any]]) -> list[Judgement]:
    """Judge a fine-tuning by the loss and the token accuracy of its evaluations, or without any by the training's."""
    curves = curves_of_log(log_history)
    none = pd.Series(dtype=float)
    loss, accuracy = (finite(curves.get(f"eval_{name}", none)) for name in ("loss", "mean_token_accuracy"))
    if loss.empty:
        return _training_loss(curves)
    shown = _course_of("held-out loss", loss) + (
        f", {_course_of('token accuracy', accuracy)}" if len(accuracy) else ""
    )
    if len(loss) == 1:
        text = f"{shown}: there is nothing to compare with. Set `eval_on_start: true`."
        return [Judgement("doubtful", text)]
    if loss.iloc[-1] > (1 + RISE) * loss.min():
        step = loss.idxmin()
        return [Judgement("bad", f"{shown}: the loss rises from its best at step {step}. Train for fewer epochs.")]
    if loss.iloc[-1] >= loss.iloc[0]:
        return [Judgement("doubtful", f"{shown}: the loss does not fall. Change `learning_rate`.")]
    return [Judgement("good", f"{shown}: it has learned what generalises")]


def _training_loss(curves: Mapping[str, pd.Series]) -> list[Judgement]:
    loss = _ends(curves, "loss")
    if loss is None:
        return [Judgement("doubtful", "no loss was logged: lower `logging_steps`")]
    shown = f"training loss {rounded(loss[0])} to {rounded(loss[1])}"
    if accuracy := _ends(curves, "mean_token_accuracy"):
        shown += f", token accuracy {rounded(accuracy[0])} to {rounded(accuracy[1])}"
    if loss[1] >= loss[0]:
        return [Judgement("bad", f"{shown}: it does not fall. Change `learning_rate`.")]
    return [Judgement("good", f"{shown}; no held-out rows were asked for (`eval_strategy`)")]


def _course_of(name: str, curve: pd.Series) -> str:
    first, last = rounded(curve.iloc[0]), rounded(curve.iloc[-1])
    return f"{name} {last}" if len(curve) == 1 else f"{name} {first} to {last}"


def evaluation_verdict(results: Mapping[str, float]) -> list[Judgement]:
    """Judge a comparison of two policies by at most two judges, and by the distance between the policies."""
    judged = [win_rate_judgement(results, judge, "the baseline") for judge in judges_of(results)[:2]]
    lengths = " to ".join(rounded(results[f"{name}/length"]) for name in ("baseline", "policy"))
    far = f"KL {rounded(results['policy/kl'])} nats to the baseline, length {lengths} tokens"
    return [*judged, _disagreement(judged, far)]


def _disagreement(judged: list[Judgement], far: str) -> Judgement:
    if {"good", "bad"} <= {judgement.level for judgement in judged}:
        return Judgement("bad", f"{far}: the judges disagree, so the reward is being exploited. Read completions.")
    return Judgement("good", far)
