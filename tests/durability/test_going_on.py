"""The command that goes on is the one that the user has typed, with one option more."""

import shlex
import sys

import psutil
import pytest

from rlhf_recipes.console import _show_error
from rlhf_recipes.durability.ending import leave_together
from rlhf_recipes.durability.going_on import remedy
from rlhf_recipes.durability.termination import TerminatedError
from rlhf_recipes.options.commands import COMMAND

RESUME = ("--resume_from_checkpoint", "true")
PYTHON = "/opt/env/bin/python3.11"
ACCELERATE = ("launch", "--num_processes", "2", "recipes/ppo.py", "--config", "my ppo.yaml")


class _Parent:
    def __init__(self, command):
        self.command = command

    def parent(self):
        return self

    def cmdline(self):
        if self.command is None:
            raise psutil.AccessDenied
        return list(self.command)


@pytest.mark.parametrize(
    ("parent", "expected"),
    [
        ((PYTHON, "/opt/env/bin/accelerate", *ACCELERATE), ["accelerate", *ACCELERATE]),
        (("python", "-m", "accelerate.commands.launch", *ACCELERATE), None),
        (("srun", "python", "recipes/ppo.py"), None),
        (("bash", "-c", "cd here && python recipes/ppo.py"), ["python", "recipes/ppo.py"]),
        (None, ["python", "recipes/ppo.py"]),
    ],
    ids=["accelerate", "a module", "another launcher", "a shell", "of another user"],
)
def test_without_rlhf_it_is_that_of_the_launcher_or_of_python(monkeypatch, parent, expected):
    monkeypatch.delenv(COMMAND, raising=False)
    monkeypatch.setattr(psutil, "Process", lambda: _Parent(parent))
    monkeypatch.setattr(sys, "argv", ["recipes/ppo.py"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "recipes/ppo.py"])
    assert remedy(*RESUME) == f" To go on: {shlex.join([*(expected or parent), *RESUME])}"


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("rlhf ppo --config x.yaml", "rlhf ppo --config x.yaml --resume_from_checkpoint true"),
        ("rlhf ppo --resume_from_checkpoint true --seed 1", "rlhf ppo --seed 1 --resume_from_checkpoint true"),
        ("rlhf ppo --resume_from_checkpoint=out/checkpoint-4", "rlhf ppo --resume_from_checkpoint true"),
        ("rlhf ppo --hub_token hf_0123456789abcdefghij", "rlhf ppo --hub_token *** --resume_from_checkpoint true"),
    ],
)
def test_an_option_is_added_or_replaced_and_a_secret_hidden(monkeypatch, typed, told):
    monkeypatch.setenv(COMMAND, typed)
    assert remedy(*RESUME).removeprefix(" To go on: ").replace("'", "") == told
    assert remedy().endswith(typed.replace("hf_0123456789abcdefghij", "***"))


def test_nothing_is_told_where_another_process_tells_it(monkeypatch):
    monkeypatch.setenv(COMMAND, "")
    assert remedy(*RESUME) == remedy() == ""


@pytest.mark.parametrize(
    ("error", "options", "told"),
    [
        (KeyboardInterrupt(), (), "rlhf evaluate"),
        (TerminatedError(130), RESUME, "rlhf evaluate --resume_from_checkpoint true"),
    ],
    ids=["Ctrl-C", "a second one"],
)
def test_an_end_without_a_checkpoint_is_one_line(monkeypatch, capsys, error, options, told):
    monkeypatch.setenv(COMMAND, "rlhf evaluate")
    with pytest.raises(type(error)), leave_together(*options):
        raise error
    _show_error(KeyboardInterrupt, KeyboardInterrupt(), None)
    line = f"Stopped by a signal before the end, without a new checkpoint. To go on: {told}\n"
    assert capsys.readouterr().err == line


def test_only_the_first_process_tells_it(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(KeyboardInterrupt), leave_together():
        raise KeyboardInterrupt
    assert capsys.readouterr().err == ""
