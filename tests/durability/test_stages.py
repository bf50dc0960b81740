"""Stages in processes of their own: how they are started, and what a user sees of one that fails."""

import re
from pathlib import Path

import pytest
import torch
from processes import run_command

from rlhf_recipes.durability import stages
from rlhf_recipes.durability.stages import run_stages, start_method

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
        run_stages({"stage": "Stage 1 of 1"}, _note_threads, tmp_path / "threads", go_on=str)
    finally:
        torch.set_num_threads(before)
    assert (tmp_path / "threads").read_text() == "1"
    title, end = capfd.readouterr().out.strip().splitlines()
    assert title == "Stage 1 of 1"
    assert re.fullmatch(r"The stage `stage` took \d+\.\d s\.", end)


@pytest.mark.recipe
def test_a_spawned_stage_runs_and_fails_as_a_forked_one(tmp_path):
    """This stage needs the output of an earlier one, which is missing."""
    script = tmp_path / "spawned.py"
    script.write_text(SPAWNED)
    options = ("--start", "preferences", "--until", "preferences", "--directory", "here")
    result = run_command(script, ROOT / "recipes" / "quickstart.py", *options, directory=tmp_path)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stdout.splitlines()[1:] == ["Stage 3 of 6, preferences: sample pairs of answers, and label them."]
    message, end = result.stderr.splitlines()[-2:]
    assert (
        message
        == "Error: `model` is runs/quickstart/sft, which does not exist. Run `rlhf quickstart --until sft` first."
    )
    assert end.startswith("The stage `preferences` failed after ")
    again = "python recipes/quickstart.py --start preferences --until preferences --directory here"
    assert end.endswith(f"; its message is above. Remove the cause, and go on with `{again}`.")
