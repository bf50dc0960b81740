"""What is printed of a figure: rounded, with its unit, the most important first."""

import math
import re
from pathlib import Path

import pytest
from tracked_experiments import evaluation_metrics

from rlhf_recipes.console import duration
from rlhf_recipes.evaluation.figures import ENDS, FIGURES, interval, log_line, rate, rounded, table_of, title

PPO = {
    "loss": -0.00012345678901234567,
    "grad_norm": 0.8312345678,
    "learning_rate": 3.0000000000000004e-05,
    "objective/scores": -0.4312345,
    "objective/kl": -1.2e-06,
    "completions/mean_length": 31.234567,
    "policy/clip_fraction": 0.0123456,
    "reward": -0.4312345,
    "entropy": 2.1234567,
    "epoch": 0.123456789,
}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (-0.0, "0.000"),
        (-1e-9, "0.000"),
        (0.123456, "0.123"),
        (-1.23456, "-1.23"),
        (31.23456, "31.2"),
        (1234567.8, "1,234,568"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
    ],
)
def test_a_number_has_about_three_digits_and_zero_no_sign(value, text):
    assert rounded(value) == text


def test_rates_intervals_and_times():
    assert rate(3.0000000000000004e-05) == "3e-05"
    assert interval(0.61234, 0.5, 0.7) == "0.61 [0.50, 0.70]"
    assert [duration(x) for x in (0.25, 59.7, 61, 3725)] == ["0.2 s", "1 min 0 s", "1 min 1 s", "1 h 2 min"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("eval_objective/kl", "KL (nats), held out"),
        ("policy/kl", "KL (nats)"),
        ("policy/length", "length (tokens)"),
        ("completions/mean_length", "length (tokens)"),
        ("eval_accuracy", "accuracy, held out"),
    ],
)
def test_pages_and_cards_name_a_figure_as_the_terminal_does(name, text):
    assert title(name) == text


def test_a_line_of_ppo_begins_with_what_decides_and_fits_the_terminal():
    line = log_line(PPO, 8, 100, 80)
    assert line == "step   8/100  score -0.431  KL 0.000 nats  length 31.2 tokens  clipped 0.012"
    wide = log_line(PPO, 8, 100, 300)
    assert wide.endswith("entropy 2.12 nats  rate 3e-05  gradient 0.831"), "the reward of TRL is the same score"


@pytest.mark.parametrize(("script", "places"), [("image", 1), ("slurm", 1)])
def test_the_checks_of_the_cluster_wait_for_the_line_of_a_training_step(script, places):
    text = (Path(__file__).parents[2] / f"cluster/checks/{script}.sh").read_text()
    patterns = re.findall(r"grep -\w+ '(\^step.*?)'", text)
    assert len(patterns) == places
    for pattern in patterns:
        assert re.search(pattern, log_line(PPO, 8, 100, 80))
        assert not re.search(pattern, log_line({"eval_objective/scores": 1.0}, 8, 100, 80))


def test_an_evaluation_shows_the_held_out_judge_first_with_its_interval():
    logs = {f"eval_{judge}/win_rate{end}": x for judge in ("score", "gold") for end, x in _interval().items()}
    line = log_line(logs | {"eval_win_rate": 0.6, "eval_win_rate_low": 0.5}, 25, 100, 100)
    assert line.startswith("step  25/100 held out  win rate by gold 0.60 [0.50, 0.70]  win rate by score")


def _interval():
    return {"": 0.6, "_low": 0.5, "_high": 0.7}


def test_the_end_of_a_training_is_a_sentence():
    logs = {"train_runtime": 125.3, "train_loss": 1.0412345, "total_flos": 1.2345e15, "train_steps_per_second": 2.0}
    assert log_line(logs, 250, 250, 80) == "Trained 250 steps in 2 min 5 s (0.5 s per step), mean loss 1.04."
    of_all = "in 2 min 5 s (0.5 s per step), mean loss 1.04."
    assert log_line(logs, 250, 250, 80, 100) == f"Trained 250 steps, 150 of them since step 100, {of_all}"
    over = f"Trained no step, because the run was over at step 250. It had taken {of_all.removeprefix('in ')}"
    assert log_line(logs, 250, 250, 80, 250) == over


def test_a_table_is_sorted_and_rounded_and_keeps_the_names():
    metrics = evaluation_metrics() | {
        "total_flos": 1.5e15,
        "eval_runtime": 61.0,
        "prompts": 80.0,
        "failed_calls": 0.0,
        "eval_accuracy": 0.71,
        "accuracy": 0.9,
    }
    table = table_of(metrics)
    assert "total_flos" not in table
    assert list(table)[:4] == ["eval_accuracy", *(f"gold_score/win_rate{end}" for end in ENDS)]
    assert next(name for name in table if not name.startswith("eval_")).endswith("/win_rate")
    assert list(table.items())[-1] == ("eval_runtime", "1 min 1 s")
    assert (table["prompts"], table["failed_calls"]) == ("80", "0")
    assert table["policy/kl"].endswith(" nats")
    assert set(table) == set(metrics) - {"total_flos"}


def test_every_printed_figure_is_explained():
    glossary = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert not [name for name in FIGURES if f"`{name}`" not in glossary and f"`eval_{name}`" not in glossary]
