"""Write the figures of a run as lines for a reader: the most important ones first, rounded, with units.

Only what is printed is short. The tracked figures and those in JSON files stay exact and complete.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from rlhf_recipes.console import duration

# Figures that readers see, most important first: label and unit. Of two figures with one label, the first is printed.
FIGURES = {
    "win_rate": ("win rate", ""),
    "objective/scores": ("score", ""),
    "reward": ("score", ""),
    "objective/kl": ("KL", "nats"),
    "kl": ("KL", "nats"),
    "completions/mean_length": ("length", "tokens"),
    "policy/clip_fraction": ("clipped", ""),
    "clip_ratio/region_mean": ("clipped", ""),
    "accuracy": ("accuracy", ""),
    "loss": ("loss", ""),
    "auc": ("AUC", ""),
    "first_error_f1": ("first error F1", ""),
    "rewards/accuracies": ("accuracy", ""),
    "rewards/margins": ("margin", ""),
    "mean_token_accuracy": ("token accuracy", ""),
    "margin": ("margin", ""),
    "calibration_error": ("calibration error", ""),
    "length_correlation": ("length correlation", ""),
    "entropy": ("entropy", "nats"),
    "val/explained_variance_mc": ("critic explains", ""),
    "completions/clipped_ratio": ("cut off", ""),
    "learning_rate": ("rate", ""),
    "grad_norm": ("gradient", ""),
}
SEPARATOR = "  "
ENDS = ("", "_low", "_high")  # of the names of a figure with its interval
TRAINED_SCORE = "score"  # the judge that is the reward itself
HIDDEN = ("total_flos", "epoch")  # nobody decides by them; the log of the trainer keeps them
UNITS = {"length": "tokens", "kl": "nats"}  # of figures with a judge or a policy before their name


def rounded(value: float) -> str:
    """Return a number with about three digits, thousands with commas, and zero without a sign.

    What is below a thousandth is zero: no figure of a run is judged by less, and rates have `rate`.
    """
    if not math.isfinite(value):
        return str(float(value))
    size = abs(value)
    decimals = 0 if size >= 1000 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:z,.{decimals}f}"


def rate(value: float) -> str:
    """Return a learning rate as text: `2e-05`, `0.0003`."""
    return f"{value:.2g}"


def interval(mean: float, low: float, high: float) -> str:
    """Return a share with its interval."""
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def figure(name: str, value: float) -> str:
    """Return a figure with its label and its unit."""
    label, unit = FIGURES[name]
    text = rate(value) if name == "learning_rate" else rounded(value)
    return f"{label} {text} {unit}".rstrip()


def title(name: str) -> str:
    """Return the label of a figure with its unit, and whether it is from an evaluation: for pages and cards."""
    own = name.removeprefix("eval_")
    last = own.rpartition("/")[2]
    label, unit = FIGURES.get(own) or FIGURES.get(last) or (last, UNITS.get(last, ""))
    return f"{label}{f' ({unit})' if unit else ''}{', held out' if name != own else ''}"


def log_line(logs: Mapping[str, Any], step: int, steps: int, width: int, first_step: int = 0) -> str:
    """Return one line about a log of a trainer: as many of its figures as fit.

    Args:
        logs: Figures by name. Those of an evaluation begin with `eval_`.
        step: Optimiser steps so far.
        steps: Optimiser steps of the run.
        width: Characters of a line.
        first_step: Optimiser steps before this training, which may be a resume.
    """
    if "train_runtime" in logs:
        return _end_line(logs, step, first_step)
    is_evaluation = any(name.startswith("eval_") for name in logs)
    found = {name.removeprefix("eval_"): value for name, value in logs.items() if isinstance(value, int | float)}
    figures = [*_judged(found), *_figures(found)]
    line = f"step {step:>{len(str(steps))}}/{steps}" + (" held out" if is_evaluation else "")
    for text in figures:
        if len(line) + len(SEPARATOR) + len(text) > width:
            break
        line += SEPARATOR + text
    return line


def _figures(found: Mapping[str, float]) -> list[str]:
    names: dict[str, str] = {}
    for name, (label, _) in FIGURES.items():
        if name in found and f"{name}_low" not in found:
            names.setdefault(label, name)
    return [figure(name, found[name]) for name in names.values()]


def _judged(found: Mapping[str, float]) -> list[str]:
    """Return the win rate of each judge with its interval; a held-out judge before the trained score."""
    judges = held_out_first(name.removesuffix("/win_rate") for name in found if name.endswith("/win_rate"))
    return [f"win rate by {judge} {interval(*(found[f'{judge}/win_rate{end}'] for end in ENDS))}" for judge in judges]


def _end_line(logs: Mapping[str, Any], step: int, first_step: int) -> str:
    """Return a sentence about the whole run: the figures of its end count all of its sessions."""
    seconds = logs["train_runtime"]
    loss = f", mean loss {rounded(logs['train_loss'])}" if "train_loss" in logs else ""
    took = f"{duration(seconds)} ({seconds / max(step, 1):.2g} s per step){loss}"
    if step == first_step > 0:
        return f"Trained no step, because the run was over at step {step:,}. It had taken {took}."
    since = f", {step - first_step:,} of them since step {first_step:,}," if first_step else ""
    return f"Trained {step:,} steps{since} in {took}."


def evaluation_of(log_history: Iterable[Mapping[str, Any]], step: int | None) -> dict[str, Any]:
    """Return the latest evaluation in a log; empty without one.

    Args:
        log_history: Entries of the log.
        step: Step whose weights the model has; `None`: those of the last step.
    """
    found: dict[str, Any] = {}
    for entry in log_history:
        if any(name.startswith("eval_") for name in entry) and step in (None, entry["step"]):
            found = dict(entry)
    return found


def held_out_first(judges: Iterable[str]) -> list[str]:
    """Return names of judges in their order, but those that a policy may be trained on last."""
    return sorted(judges, key=lambda judge: judge in (TRAINED_SCORE, "reward_model"))


def table_of(metrics: Mapping[str, float]) -> dict[str, str]:
    """Return figures by name for a table: held-out ones first, the most important at the top, rounded, times last."""
    names = sorted((name for name in metrics if name not in HIDDEN), key=_place)
    return {name: _cell(name, metrics[name]) for name in names}


def _place(name: str) -> tuple[bool, bool, int]:
    order, known = list(FIGURES), re.sub("^eval_|_low$|_high$", "", name)
    known = known if known in order else known.rpartition("/")[2]
    is_time = name.endswith(("_runtime", "_per_second"))
    return is_time, not name.startswith("eval_"), order.index(known) if known in order else len(order)


def _cell(name: str, value: float) -> str:
    if name.endswith("_runtime"):
        return duration(value)
    unit = UNITS.get(name.rpartition("/")[2], "")
    if not unit and float(value).is_integer():  # a count, or a whole share
        return f"{int(value):,}"
    return f"{rounded(value)} {unit}".rstrip()
