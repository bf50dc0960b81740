"""A run that ended itself after an evaluation is over: the same command trains no step and ends in the same way."""

import math
import os
import signal

import pytest
import tiny
import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, TrainerCallback
from trl import SFTConfig

from rlhf_recipes.durability.checkpoints import checkpoints_by_age, find_defect
from rlhf_recipes.durability.preemption import PreemptionCallback
from rlhf_recipes.durability.trainer import FINISHED_FILE
from rlhf_recipes.trainers.sft import SFTTrainer

pytestmark = pytest.mark.tiny
BOTH = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}


def _sft(directory, **options):
    tok = tiny.tokenizer()
    data = Dataset.from_dict({"text": tiny.TEXTS})
    args = SFTConfig(str(directory), **{**tiny.QUIET, **options})
    return SFTTrainer(tiny.policy(tok), args, train_dataset=data, eval_dataset=data, processing_class=tok)


def _ppo(directory, **options):
    return tiny.ppo_trainer(directory, eval_data=tiny.prompts(count=4), per_device_eval_batch_size=4, **options)


MAKE = {"ppo": _ppo, "reward model": tiny.reward_trainer, "sft": _sft}
each_trainer = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


class Count(TrainerCallback):
    """Count the optimiser steps of one call of `train`."""

    steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1


def _train(make, directory, figures=None, callbacks=(), resume=True, **options):
    """Train with evaluations that give these figures by step. Return the trainer and the number of its steps."""
    options = {"max_steps": 8, "metric_for_best_model": "figure", "greater_is_better": True, **BOTH, **options}
    trainer, count = make(directory, **options), Count()
    loop = trainer.evaluation_loop

    def evaluated(*args, **kwargs):
        output = loop(*args, **kwargs)
        output.metrics["eval_figure"] = (figures or {}).get(trainer.state.global_step, -trainer.state.global_step)
        return output

    trainer.evaluation_loop = evaluated
    for callback in (count, PreemptionCallback(), *callbacks):
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, count.steps


def _weights(trainer):
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def _check_over(make, directory, first, steps, **options):
    """Submit a run again: it must train nothing, and end with the same weights."""
    assert first.state.global_step == steps
    files = {path: path.stat().st_mtime_ns for path in directory.rglob("checkpoint-*/*")}
    again, trained = _train(make, directory, **options)
    assert trained == 0
    assert again.state.global_step == steps
    one, other = _weights(first), _weights(again)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("checkpoint-*/*")} == files


def _stop(patience=1):
    return [EarlyStoppingCallback(patience)]


@each_trainer
@pytest.mark.parametrize("save_steps", [2, 3])
def test_a_run_that_reached_its_last_step_writes_nothing_again(tmp_path, make, save_steps):
    options = {"eval_strategy": "no", "metric_for_best_model": None, "save_steps": save_steps}
    first, steps = _train(make, tmp_path, **options)
    assert steps == 8
    _check_over(make, tmp_path, first, 8, **options)


@each_trainer
@pytest.mark.parametrize("limit", [None, 1])
def test_a_run_that_stopped_early_is_over(tmp_path, make, limit, caplog):
    options = {"load_best_model_at_end": True, "save_total_limit": limit}
    first, steps = _train(make, tmp_path, callbacks=_stop(), **options)
    assert steps == 4
    assert first.state.best_model_checkpoint.endswith("checkpoint-2")
    _check_over(make, tmp_path, first, 4, callbacks=_stop(), **options)
    assert f"The run of {tmp_path}/checkpoint-4 has ended itself after an evaluation" in caplog.text


CASES = {
    "an evaluation between two checkpoints": ({"save_steps": 3}, 4),
    "a checkpoint before the evaluation of its step": (
        {"eval_strategy": "epoch", "save_steps": 3, "max_steps": 12},
        6,
    ),
    "checkpoints of the best steps only": ({"save_strategy": "best"}, 4),
}


@pytest.mark.parametrize(("options", "end"), CASES.values(), ids=CASES)
def test_the_checkpoint_of_the_end_is_written_whenever_it_is_evaluated(tmp_path, options, end):
    first, _ = _train(_sft, tmp_path, callbacks=_stop(), **options)
    assert checkpoints_by_age(tmp_path)[-1].name == f"checkpoint-{end}"
    assert find_defect(tmp_path / f"checkpoint-{end}") is None
    _check_over(_sft, tmp_path, first, end, callbacks=_stop(), **options)


def test_a_run_with_checkpoints_of_the_best_steps_is_over_at_its_last(tmp_path):
    first, steps = _train(_sft, tmp_path, save_strategy="best")
    assert steps == 8
    assert not list(tmp_path.rglob(FINISHED_FILE)), "more `max_steps` continue it"
    _check_over(_sft, tmp_path, first, 8, save_strategy="best")
    assert _train(_sft, tmp_path, save_strategy="best", max_steps=10)[1] == 2


@each_trainer
def test_a_run_killed_after_its_end_only_has_its_end_left(tmp_path, make):
    options = {"load_best_model_at_end": True}
    expected, _ = _train(make, tmp_path / "whole", callbacks=_stop(), **options)

    def killed(self):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.Trainer._load_best_model", killed)
        with pytest.raises(KeyboardInterrupt):
            _train(make, tmp_path / "killed", callbacks=_stop(), **options)
    resumed, steps = _train(make, tmp_path / "killed", callbacks=_stop(), **options)
    assert steps == 0
    assert all(torch.equal(weight, _weights(expected)[name]) for name, weight in _weights(resumed).items())


class At(TrainerCallback):
    """Do something at the end of a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act(control)


def test_what_a_signal_ended_is_not_over(tmp_path):
    """The evaluation that the signal left out may then end the run, without a further step."""
    send = At(3, lambda control: os.kill(os.getpid(), signal.SIGUSR1))  # answered at the end of step 4
    with pytest.raises(SystemExit):
        _train(_sft, tmp_path, {2: 0.0}, callbacks=[send, *_stop()])
    assert not list(tmp_path.rglob(FINISHED_FILE))
    trained_on, steps = _train(_sft, tmp_path / "other", callbacks=_stop(), resume=str(tmp_path / "checkpoint-4"))
    assert (steps, trained_on.state.global_step) == (0, 4)
    first, steps = _train(_sft, tmp_path, {2: 0.0, 4: 1.0}, callbacks=_stop())
    assert steps == 2
    _check_over(_sft, tmp_path, first, 6, callbacks=_stop())


def test_what_another_callback_ended_is_not_over(tmp_path):
    """A limit of time ends a run for this day only."""
    end = At(4, lambda control: setattr(control, "should_training_stop", True))
    assert _train(_sft, tmp_path, callbacks=[end])[1] == 4
    assert _train(_sft, tmp_path)[1] == 4


@pytest.mark.parametrize("change", [{"max_steps": 12}, {"num_train_epochs": 9, "max_steps": -1}])
def test_more_steps_do_not_continue_a_run_that_ended_itself(tmp_path, change, caplog):
    first, _ = _train(_sft, tmp_path, callbacks=_stop())
    _check_over(_sft, tmp_path, first, 4, callbacks=_stop(3), **change)
    assert "the learning rate jumps" not in caplog.text, "no step has one"


def test_a_checkpoint_from_before_the_end_trains_on(tmp_path):
    _train(_sft, tmp_path, callbacks=_stop())
    assert _train(_sft, tmp_path, callbacks=_stop(), resume=str(tmp_path / "checkpoint-2"))[1] == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_figure_that_is_not_finite_chooses_no_best_checkpoint(tmp_path, bad, caplog):
    trainer, _ = _train(_sft, tmp_path, {2: bad, 4: 1.0, 6: bad, 8: 0.0}, load_best_model_at_end=True)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    assert trainer.state.best_metric == 1.0
    assert f"Step 2: eval_figure is {bad}. It cannot show the best checkpoint." in caplog.text
