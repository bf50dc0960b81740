"""Find signs in the metrics of a run that the policy exploits the reward.

An alarm is a reason to read completions. It is not a proof.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from transformers import TrainerCallback

from rlhf_recipes.evaluation.figures import TRAINED_SCORE
from rlhf_recipes.evaluation.samples import SAMPLES_DIRECTORY

logger = logging.getLogger(__name__)


# Two points per quarter: with fewer, the noise of a quarter is unknown.
MIN_POINTS = 8
# Standard errors between the first and the last quarter. Chance alone makes such a difference in one run of twenty.
SIGNIFICANT = 2.0
# Relative change of the length. Healthy seeds of the quickstart change by at most 12 % (docs/results.md).
LENGTH_DRIFT = 0.25
# KL divided by its target. The adaptive controller keeps the seeds of the quickstart within 30 % of the target.
KL_OVER_TARGET = 1.5
# KL of the last quarter divided by that of the second. Linear growth gives 7/3. More means that the KL accelerates,
# but each further nat brings less score (Gao et al. 2023, arXiv:2210.10760).
KL_ACCELERATION = 2.5
# Nats. With a smaller KL the policy is close to its reference, and the ratio of two small KLs is noise.
KL_FLOOR = 1.0
# Change in the share of completions that end by themselves. With 100 completions, a tenth is more than noise.
EOS_DRIFT = 0.1
# Change in the share of 4-grams that occurred earlier in the same answer.
REPETITION_DRIFT = 0.1
# Disagreement of score heads about the answers, divided by that about the reward model's evaluation data. The SFT
# policy's answers have about 1.
DISAGREEMENT_RATIO = 1.5


def find_alarms(
    curves: Mapping[str, pd.Series],
    evaluation: Mapping[str, float],
    *,
    target_kl: float | None = None,
    rewards: Iterable[str] = ("reward_model",),
) -> list[str]:
    """Return one sentence per alarm.

    Args:
        curves: Logged metrics by name, each indexed by step. A NaN was logged as NaN.
        evaluation: Metrics of the evaluation on held-out prompts. Empty without an evaluation.
        target_kl: Target of an adaptive controller, nats. None with a fixed coefficient.
        rewards: Names of the judges that the run was trained on. All other judges are held out.
    """
    alarms = _broken(curves)
    score = first_and_last(curves.get("objective/scores"))
    rising = score is not None and score[2] and score[1] > score[0]
    if score is not None and rising:
        drifts = (_length_drift(curves), _kl_drift(curves, target_kl), _eos_drift(curves), _repetition_drift(curves))
        alarms += [f"The score rises ({score[0]:.2f} to {score[1]:.2f}) while {drift}." for drift in drifts if drift]
    alarms += [text for judge, text in declines(curves).items() if judge not in rewards]
    return alarms + _doubts(curves) + _judge_disagreement(evaluation, frozenset(rewards), rising)


def declines(curves: Mapping[str, pd.Series]) -> dict[str, str]:
    """Return a sentence for each judge whose gain has fallen from its own best, by judge.

    The 95 % intervals over prompts of the best and of the latest evaluation must not overlap. The best is chosen among
    noisy evaluations, so a fall that only leaves one of the intervals would often be chance.

    Args:
        curves: Metrics of evaluations during training by name, `eval_<judge>/gain` and its interval.
    """
    found = {}
    for name in curves:
        judge = name.removeprefix("eval_").removesuffix("/gain")
        if name != f"eval_{judge}/gain" or not {f"{name}_low", f"{name}_high"} <= curves.keys():
            continue
        gain, low, high = (finite(curves[f"{name}{end}"]) for end in ("", "_low", "_high"))
        if gain.empty or not gain.index.equals(low.index) or not gain.index.equals(high.index):
            continue
        best, latest = gain.idxmax(), gain.index[-1]
        if high[latest] < low[best]:
            found[judge] = (
                f"The held-out judge {judge} has fallen from its best gain, {gain[best]:.2f} at step {best}, to "
                f"{gain[latest]:.2f}: the reward is being exploited. Use the checkpoint of that time, and raise "
                "`kl_coef`."
            )
    return found


def alarms_of_log(log_history: Iterable[Mapping[str, Any]], *, target_kl: float | None) -> list[str]:
    """Return the alarms of a run from the log of its trainer, which also holds the latest evaluation.

    Args:
        log_history: Log of transformers' `TrainerState`.
        target_kl: Same as for `find_alarms`.
    """
    curves = curves_of_log(log_history)
    evaluation = {name.removeprefix("eval_"): x.iloc[-1] for name, x in curves.items() if name.startswith("eval_")}
    return find_alarms(curves, evaluation, target_kl=target_kl, rewards=(TRAINED_SCORE,))


def curves_of_log(log_history: Iterable[Mapping[str, Any]]) -> dict[str, pd.Series]:
    """Return each figure of a trainer's log by step."""
    points: dict[str, dict[int, float]] = defaultdict(dict)
    for record in log_history:
        for name, value in record.items():
            if isinstance(value, int | float):
                points[name][int(record["step"])] = float(value)
    return {name: pd.Series(values).sort_index() for name, values in points.items()}


def _broken(curves: Mapping[str, pd.Series]) -> list[str]:
    names = {"objective/scores": "score", "objective/kl": "KL", "entropy": "entropy"}
    alarms = []
    for metric, name in names.items():
        curve = curves.get(metric, pd.Series(dtype=float))
        lost = curve.index[~np.isfinite(curve.to_numpy(dtype=float))]
        if len(lost):
            alarms.append(f"The {name} is not a number at {len(lost)} of {len(curve)} steps, first at step {lost[0]}.")
    return alarms


def first_and_last(curve: pd.Series | None) -> tuple[float, float, bool] | None:
    """Return the means of the first and the last quarter, and whether they differ by more than noise.

    The differences of successive points give the noise, because a trend hardly changes them:
    `sigma^2 = mean((x_i - x_{i-1})^2) / 2`.

    Source: von Neumann 1941, The Annals of Mathematical Statistics 12(4).
    """
    points = finite(curve).to_numpy(dtype=float) if curve is not None else np.empty(0)
    if len(points) < MIN_POINTS:
        return None
    quarter = len(points) // 4
    first, last = points[:quarter].mean(), points[-quarter:].mean()
    error = np.sqrt(np.mean(np.diff(points) ** 2) / 2 * 2 / quarter)
    return float(first), float(last), bool(abs(last - first) > SIGNIFICANT * error)


def _length_drift(curves: Mapping[str, pd.Series]) -> str:
    length = first_and_last(curves.get("completions/mean_length"))
    if length is None or not length[2] or abs(length[1] - length[0]) < LENGTH_DRIFT * length[0]:
        return ""
    first, last, _ = length
    change = "grow" if last > first else "shrink"
    return f"answers {change} from {first:.0f} to {last:.0f} tokens: length itself may be what is rewarded"


def _kl_drift(curves: Mapping[str, pd.Series], target_kl: float | None) -> str:
    kl = first_and_last(curves.get("objective/kl"))
    if kl is None or kl[1] < KL_FLOOR:
        return ""
    last = kl[1]
    if target_kl is not None:
        over = f"the KL, {last:.1f} nats, is {last / target_kl:.1f} times its target of {target_kl:g}"
        return f"{over}: the controller does not hold the policy" if last > KL_OVER_TARGET * target_kl else ""
    points = finite(curves["objective/kl"]).to_numpy(dtype=float)
    quarter = len(points) // 4
    second = float(points[quarter : 2 * quarter].mean())
    if last < KL_ACCELERATION * max(second, KL_FLOOR):
        return ""
    return f"the KL accelerates ({second:.1f} nats in the second quarter, {last:.1f} in the last): raise `kl_coef`"


def _eos_drift(curves: Mapping[str, pd.Series]) -> str:
    clipped = first_and_last(curves.get("completions/clipped_ratio"))
    if clipped is None or not clipped[2] or abs(clipped[1] - clipped[0]) < EOS_DRIFT:
        return ""
    first, last = 1 - clipped[0], 1 - clipped[1]
    direction = "rises" if last > first else "falls"
    return f"the share of answers that end by themselves {direction} from {first:.2f} to {last:.2f}"


def _repetition_drift(curves: Mapping[str, pd.Series]) -> str:
    repeated = first_and_last(curves.get("completions/repeated_ngrams"))
    if repeated is None or not repeated[2] or repeated[1] - repeated[0] < REPETITION_DRIFT:
        return ""
    return f"the share of repeated 4-grams in an answer grows from {repeated[0]:.2f} to {repeated[1]:.2f}"


def _doubts(curves: Mapping[str, pd.Series]) -> list[str]:
    """Return an alarm per reward model whose heads have come to disagree about the answers."""
    alarms = []
    for name in sorted(name for name in curves if re.fullmatch(r"rewards/.+/disagreement_ratio", name)):
        ratio = first_and_last(curves[name])
        if ratio is not None and ratio[2] and ratio[1] > max(ratio[0], DISAGREEMENT_RATIO):
            alarms.append(
                f"The heads of the reward model {name.split('/')[1]} disagree about the answers {ratio[1]:.1f} times "
                f"as much as about its evaluation data ({ratio[0]:.1f} times at the start): the policy goes where the "
                "reward model has not learned the score. Set `reward_heads: pessimistic`, or raise `kl_coef`."
            )
    return alarms


def _judge_disagreement(evaluation: Mapping[str, float], rewards: frozenset[str], rising: bool) -> list[str]:
    """Return an alarm per held-out judge that prefers the baseline, if the trained score prefers the policy."""
    judges = sorted(name.removesuffix("/win_rate") for name in evaluation if name.endswith("/win_rate"))
    trained = [judge for judge in judges if judge in rewards and f"{judge}/baseline" in evaluation]
    improved = any(evaluation[f"{judge}/policy"] > evaluation[f"{judge}/baseline"] for judge in trained)
    if not (improved or (rising and not trained)):
        return []
    return [
        f"The held-out judge {judge} prefers the baseline (win rate {evaluation[f'{judge}/win_rate']:.2f}, at most "
        f"{evaluation[f'{judge}/win_rate_high']:.2f}) while the trained score rises: the reward is being exploited."
        for judge in judges
        if judge not in rewards and evaluation.get(f"{judge}/win_rate_high", 1.0) < 0.5
    ]


class LogAlarms:
    """Find the alarms of a growing log once, for all callbacks that ask at the same point of it.

    The newest record identifies the point: a record is never changed, and a run that goes back gets new ones.
    """

    def __init__(self) -> None:
        self._newest: Mapping[str, Any] | None = None
        self._alarms: list[str] = []

    def __call__(self, args: Any, state: Any) -> list[str]:
        """Return the alarms of a PPO run so far.

        Args:
            args: Options of the run, a `PPOConfig`.
            state: transformers' `TrainerState`.
        """
        newest = state.log_history[-1] if state.log_history else None
        if newest is None or newest is not self._newest:
            self._newest, self._alarms = newest, alarms_of_log(state.log_history, target_kl=args.held_kl)
        return self._alarms


current_alarms = LogAlarms()


class AlarmCallback(TrainerCallback):
    """Warn once of each kind of alarm, after the evaluation or the save that first shows it."""

    def __init__(self) -> None:
        self._known = set[str]()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Warn of alarms of a kind that is new."""
        if not state.is_world_process_zero:
            return
        for alarm in current_alarms(args, state):
            kind = re.sub(r"(?<!\w)-?\d+(\.\d+)?", "", alarm)  # the figures change while the alarm is the same
            if kind not in self._known:
                logger.warning(f"{alarm} Read some completions: {Path(args.output_dir, SAMPLES_DIRECTORY)}")
            self._known.add(kind)

    on_save = on_train_end = on_evaluate


class DeclineStopping(TrainerCallback):
    """End the training when a held-out judge has fallen from its best: see `declines`."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop after this evaluation if a judge has fallen."""
        fallen = {j: text for j, text in declines(curves_of_log(state.log_history)).items() if j != TRAINED_SCORE}
        if fallen:
            control.should_training_stop = True
            if state.is_world_process_zero:
                logger.warning(f"Training ends (`stop_on_decline`). {' '.join(fallen.values())}")


def finite(curve: pd.Series) -> pd.Series:
    """Return the finite points of a curve."""
    return curve[np.isfinite(curve.to_numpy(dtype=float))]
