"""A training prints one short line per log; a bar is drawn in a terminal only."""

import re

import pytest
import tiny
from transformers import ProgressCallback, TrainerState

from rlhf_recipes import RewardModelTrainer
from rlhf_recipes.trainers.printing import FigureCallback

pytestmark = pytest.mark.tiny

EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 2, "per_device_eval_batch_size": 4}
RAW = re.compile(r"total_flos|-0\.00\b|\d\.\d{5,}|\{|\r|\x1b")


def test_a_pipe_gets_short_lines_and_no_bar(tmp_path, capfd):
    trainer = tiny.reward_trainer(tmp_path, disable_tqdm=False, **EVALUATED)
    trainer.train()
    printed = capfd.readouterr()
    lines = [line for line in printed.out.splitlines() if line]
    assert lines[0].startswith("step 1/2  accuracy ")
    assert lines[0].endswith(" left")
    assert any(line.startswith("step 2/2 held out  accuracy ") for line in lines)
    assert lines[-1].startswith("Trained 2 steps in ")
    assert not RAW.search(printed.out)
    assert all(len(line) <= 80 for line in lines[1:])
    assert "total_flos" in trainer.state.log_history[-1], "the log itself is whole"


def test_a_file_has_the_four_figures_of_the_first_hour_and_the_time(capfd):
    callback, state = FigureCallback(has_bar=False), TrainerState(max_steps=64)
    callback.on_train_begin(None, state, None)
    state.global_step = 36
    names = ("objective/scores", "objective/kl", "completions/mean_length", "policy/clip_fraction")
    callback.on_log(None, state, None, logs=dict(zip(names, (-0.962, 0.24, 58.9, 0.01), strict=True)))
    line = capfd.readouterr().out
    assert re.fullmatch(
        r"step 36/64  score -0\.962  KL 0\.240 nats  length 58\.9 tokens  clipped 0\.010  .* left\n", line
    )


def test_a_terminal_has_a_bar(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    tiny.reward_trainer(tmp_path, disable_tqdm=False, max_steps=2).train()
    printed = capfd.readouterr()
    assert "2/2" in printed.err
    assert "step 2/2  accuracy " in printed.out
    assert " left" not in printed.out, "the bar shows it"


def test_a_resume_says_what_it_trained_itself(tmp_path, capfd):
    saved = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    tiny.reward_trainer(tmp_path, max_steps=2, **saved).train()
    for steps, said in (
        (3, "Trained 3 steps, 1 of them since step 2, in "),
        (3, "Trained no step, because the run was "),
    ):
        capfd.readouterr()
        tiny.reward_trainer(tmp_path, max_steps=steps, **saved).train(resume_from_checkpoint=True)
        assert capfd.readouterr().out.splitlines()[-1].startswith(said)


def test_a_callback_of_the_users_own_stays(tmp_path):
    class Own(ProgressCallback):
        pass

    tok = tiny.tokenizer()
    options = {"train_dataset": tiny.preferences(), "processing_class": tok, "callbacks": [own := Own()]}
    args = tiny.reward_config(tmp_path, disable_tqdm=False)
    trainer = RewardModelTrainer(tiny.reward_model(tok), args, **options)
    callbacks = trainer.callback_handler.callbacks
    assert own in callbacks
    assert FigureCallback in map(type, callbacks)
    assert ProgressCallback not in map(type, callbacks)
