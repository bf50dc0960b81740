"""Stages in processes of their own: how they are started, and what a user sees of one that fails."""

import functools
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import run_command

from rlhf_recipes.durability import stages
from rlhf_recipes.durability.stages import continued, run_stages, start_method
from rlhf_recipes.durability.state import STATE_FILE
from rlhf_recipes.durability.termination import TerminatedError
from rlhf_recipes.options.commands import COMMAND
from rlhf_recipes.trainers.run_identity import IDENTITY_FILE

ROOT = Path(__file__).parents[2]
SPAWNED = """
import runpy, sys
from rlhf_recipes.durability import stages
stages.start_method = lambda: "spawn"
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(("has_device", "expected"), [(True, "spawn"), (False, "fork")])
def test_a_stage_is_forked_only_where_there_is_no_cuda_device(monkeypatch, has_device, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_device)
    assert start_method() == expected


def _note_threads(stage, path):
    path.write_text(str(torch.get_num_threads()))


def test_a_stage_has_one_thread_whatever_its_parent_has_and_its_title_and_time_are_printed(
    tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(stages, "start_method", lambda: "fork")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run_stages({"stage": "Stage 1 of 1"}, _note_threads, tmp_path / "threads")
    finally:
        torch.set_num_threads(before)
    assert (tmp_path / "threads").read_text() == "1"
    title, end = capfd.readouterr().out.strip().splitlines()
    assert title == "Stage 1 of 1"
    assert re.fullmatch(r"The stage `stage` took \d+\.\d s\.", end)


def _signal_first(stage, ends):
    """Signal the parent, as Ctrl-C does, and end as told; a stage without a word ends by the signal alone."""
    time.sleep(0.3)  # until the parent listens
    if stage in ends:
        signal.signal(signal.SIGINT, lambda *_: sys.exit(ends[stage]))
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(20)


@pytest.mark.parametrize(
    ("names", "ends", "code", "start"),
    [
        (["one", "two"], {"one": 75}, 75, "one"),
        (["one", "two"], {"one": 0}, 75, "two"),
        (["one"], {"one": 0}, None, None),
        (["one", "two"], {}, 130, "one"),
        (["one"], {"one": 1}, 1, "one"),
    ],
    ids=["with a checkpoint", "too late for the stage", "too late", "without a word", "with an error"],
)
def test_a_signal_reaches_the_stage_and_the_command_that_goes_on_is_told(monkeypatch, capfd, names, ends, code, start):
    monkeypatch.setattr(stages, "start_method", lambda: "fork")
    monkeypatch.setenv(COMMAND, "rlhf quickstart --seed 1")
    before = signal.getsignal(signal.SIGINT)
    if code is None:
        run_stages(dict.fromkeys(names, ""), _signal_first, ends)
    else:
        with pytest.raises(TerminatedError) as end:
            run_stages(dict.fromkeys(names, ""), _signal_first, ends)
        assert end.value.code == code
    told = f"Stopped by a signal in stage `one`. To go on: rlhf quickstart --seed 1 --start {start}\n"
    assert capfd.readouterr().err == (told if start else "")
    assert signal.getsignal(signal.SIGINT) == before


def test_only_the_first_stage_goes_on_and_only_if_it_was_stopped(tmp_path):
    resume = ["--resume_from_checkpoint", "true"]
    goes_on = functools.partial(continued, tmp_path / "ppo", seed=1, identity_file=IDENTITY_FILE)
    assert goes_on("ppo") == []
    (tmp_path / "ppo" / "checkpoint-4").mkdir(parents=True)
    assert goes_on("ppo") == resume
    assert goes_on("sft") == []
    (tmp_path / "ppo" / "model.safetensors").touch()
    assert goes_on("ppo") == []


@pytest.mark.parametrize(
    ("file", "text", "seeds"),
    [
        (IDENTITY_FILE, json.dumps({"`seed`": 1}), {1}),
        (STATE_FILE, json.dumps({"run": {"`seed`": 1}}), {1}),
        (STATE_FILE, json.dumps({"held_out": {}}), {1, 2}),
        (STATE_FILE, "{", {1, 2}),
    ],
)
def test_a_stage_goes_on_with_its_own_seed_alone(tmp_path, file, text, seeds):
    (tmp_path / "ppo" / "checkpoint-4").mkdir(parents=True)
    (tmp_path / "ppo" / "checkpoint-4" / file).write_text(text)
    assert {seed for seed in (1, 2) if continued(tmp_path / "ppo", "ppo", seed, IDENTITY_FILE)} == seeds


@pytest.mark.recipe
def test_a_spawned_stage_runs_and_fails_as_a_forked_one(tmp_path):
    """This stage needs the output of an earlier one, which is missing."""
    script = tmp_path / "spawned.py"
    script.write_text(SPAWNED)
    options = ("--start", "preferences", "--until", "preferences", "--directory", "here")
    typed = {COMMAND: " ".join(("rlhf quickstart", *options))}
    result = run_command(script, ROOT / "recipes" / "quickstart.py", *options, directory=tmp_path, **typed)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stdout.splitlines()[1:] == ["Stage 3 of 6, preferences: sample pairs of answers, and label them."]
    message, end = result.stderr.splitlines()[-2:]
    assert (
        message
        == "Error: `model` is runs/quickstart/sft, which does not exist. Run `rlhf quickstart --until sft` first."
    )
    assert end.startswith("The stage `preferences` failed after ")
    again = "rlhf quickstart --until preferences --directory here --start preferences"
    assert end.endswith(f"; its message is above. Remove the cause. To go on: {again}")
