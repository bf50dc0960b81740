"""The counts of the preflight against those of the trainers, and the findings about them."""

import pytest
import tiny
from trl import SFTConfig, SFTTrainer

from rlhf_recipes.options.ppo import PPOConfig
from rlhf_recipes.preflight.schedule import kl_findings, rollout_schedule, schedule_findings, supervised_schedule


class Counted(Exception):
    """Report that training has begun and has counted its steps."""


def _counts(trainer, monkeypatch):
    """Return the steps and passes that transformers has counted before the first step."""

    def stop(args, state, control):
        raise Counted

    monkeypatch.setattr(trainer.callback_handler, "on_train_begin", stop)
    with pytest.raises(Counted):
        trainer.train()
    return trainer.state.max_steps, trainer.state.num_train_epochs


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 5},
        {"max_steps": -1, "num_train_epochs": 3},
        {"max_steps": -1, "num_train_epochs": 1.5},
        {"max_steps": -1, "num_train_epochs": 2, "num_generations": 4},
        {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 4},
        {"max_steps": 7, "num_generations": 2, "num_iterations": 3},
    ],
    ids=str,
)
def test_ppo_steps_are_those_that_the_trainer_makes(tmp_path, monkeypatch, options):
    trainer = tiny.ppo_trainer(tmp_path, data=tiny.prompts(count=37), **options)
    schedule = rollout_schedule(trainer.args, 37)
    steps, passes = _counts(trainer, monkeypatch)
    assert schedule.steps == steps
    assert passes - 1 < schedule.passes <= passes


def test_ppo_batches(tmp_path):
    args = tiny.ppo_config(
        tmp_path,
        num_generations=4,
        gradient_accumulation_steps=2,
        steps_per_generation=8,
        num_iterations=3,
        max_steps=30,
    )
    schedule = rollout_schedule(args, 20)
    assert schedule.rollout == 4 * 8
    assert schedule.batch == 4 * 2
    assert schedule.mini_batches == 4
    assert schedule.rollouts == 3  # of 12 steps; the last is used for 6
    assert schedule.prompts == 3 * 8
    assert schedule.passes == 30 / 24  # 2 rollouts of 8 prompts in a pass over 20


@pytest.mark.parametrize(
    ("options", "evaluations", "checkpoints"),
    [
        ({"eval_strategy": "no", "save_strategy": "no"}, 0, 0),
        ({"eval_strategy": "steps", "eval_steps": 8, "save_strategy": "steps", "save_steps": 8}, 5, 4),
        ({"eval_strategy": "steps", "eval_steps": 12, "save_strategy": "steps", "save_steps": 12}, 4, 3),
        ({"eval_strategy": "steps", "eval_steps": 0.25, "save_strategy": "steps", "save_steps": 64}, 5, 1),
        ({"eval_strategy": "steps", "eval_steps": 8, "eval_delay": 17, "save_strategy": "no"}, 3, 0),
        ({"eval_strategy": "epoch", "save_strategy": "epoch"}, 9, 8),
    ],
    ids=str,
)
def test_evaluations_and_checkpoints_are_those_of_a_run(tmp_path, options, evaluations, checkpoints):
    evaluation = tiny.prompts(count=2)
    trainer = tiny.ppo_trainer(tmp_path, max_steps=32, max_completion_length=2, eval_data=evaluation, **options)
    schedule = rollout_schedule(trainer.args, 8)
    assert (schedule.evaluations, schedule.checkpoints) == (evaluations, checkpoints)
    trainer.train()
    assert len([record for record in trainer.state.log_history if "eval_score/gain" in record]) == evaluations
    assert len(list(tmp_path.glob("checkpoint-*"))) == checkpoints


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 5},
        {"max_steps": -1, "num_train_epochs": 2},
        {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 3},
        {"max_steps": -1, "num_train_epochs": 0.5},
    ],
    ids=str,
)
def test_supervised_steps_are_those_that_the_trainer_makes(tmp_path, monkeypatch, options):
    tok = tiny.tokenizer()
    trainer = SFTTrainer(
        tiny.policy(tok),
        SFTConfig(str(tmp_path), **{**tiny.QUIET, **options}),
        train_dataset=tiny.preferences(count=37).rename_column("chosen", "completion").remove_columns("rejected"),
        processing_class=tok,
    )
    schedule = supervised_schedule(trainer.args, 37)
    assert schedule.steps == _counts(trainer, monkeypatch)[0]
    assert schedule.batch == 4 * options.get("gradient_accumulation_steps", 1)


def _messages(tmp_path, rows=32, evaluation_rows=80, **options):
    args = tiny.ppo_config(tmp_path, **options)
    schedule = rollout_schedule(args, rows)
    findings = [*schedule_findings(args, schedule, evaluation_rows), *kl_findings(args, schedule)]
    assert {finding.level for finding in findings} <= {"warning"}
    return " ".join(finding.message for finding in findings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_strategy": "steps", "eval_steps": 41}, "`eval_steps` (41) is more than the run's 40"),
        (
            {"eval_strategy": "steps", "eval_steps": 20, "early_stopping_patience": 3},
            "`early_stopping_patience` (3) cannot end a run of 3",
        ),
        ({"critic_warmup_steps": 40}, "`critic_warmup_steps` (40) covers all of the run's 40 optimiser steps"),
        ({"evaluation_rows": 12}, "12 prompts to evaluate on: the 95 % interval of a win rate is then about ±0.28"),
        ({"beta": 0.1}, "The KL is paid twice"),
        ({"target_kl": 3.0}, "`target_kl` (3) does nothing with `kl_controller: fixed`"),
        ({"kl_controller": "adaptive"}, "`kl_horizon` (10000) is more than the run's 80 completions"),
        ({"kl_controller": "adaptive", "kl_horizon": 7}, "`kl_horizon` (7) is less than one rollout's 8"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_each_oddity_is_named(tmp_path, options, message):
    assert message in _messages(tmp_path, **{"max_steps": 40, **options})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"eval_strategy": "steps", "eval_steps": 40, "early_stopping_patience": 1},
        {"critic_warmup_steps": 39},
        {"evaluation_rows": None},
        {"evaluation_rows": 30},
        {"beta": 0.1, "kl_coef": 0.0},
        {"kl_controller": "adaptive", "kl_horizon": 80, "target_kl": 3.0},
        {"kl_controller": "adaptive", "kl_horizon": 8},
    ],
    ids=str,
)
def test_nothing_is_said_of_what_may_be_meant(tmp_path, options):
    assert _messages(tmp_path, **{"max_steps": 40, **options}) == ""


def test_the_default_target_is_the_one_that_counts_as_not_set():
    assert PPOConfig.target_kl == 6.0
