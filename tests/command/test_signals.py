"""Signals and Ctrl-C to `rlhf`: the work is kept, and the command that goes on is told and works.

Fresh interpreters in a process group of their own: Ctrl-C reaches every process of the group, as from a terminal.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import tiny
import yaml
from processes import end_group, environment_of_a_user, wait_for

from rlhf_recipes.command import main

RLHF = (sys.executable, "-m", "rlhf_recipes.command")
SLOW = "starts fresh interpreters; `test_hangup.py`, `test_stages.py` and `test_preemption.py` test the parts"
REWARDS = """
import time
from pathlib import Path

def waiting(completions, **kwargs):
    if Path("wait").exists():
        Path("sampling").touch()
        time.sleep(float(Path("wait").read_text()))
    return [float(len(text)) for text in completions]
"""
OPTIONS = {
    **{name: value for name, value in tiny.QUIET.items() if name not in ("report_to", "save_strategy")},
    "dataset_name": "prompts",
    "model_name_or_path": "policy",
    "output_dir": "out",
    "reward_functions": ["my_rewards:waiting"],
    "per_device_train_batch_size": 2,
    "steps_per_generation": 2,
    "max_completion_length": 6,
    "max_steps": 4,
    "response_separator": " ",
    "tracking": False,
}


@pytest.fixture
def directory(tmp_path):
    """A small run of PPO, whose first reward takes long."""
    tiny.save(tiny.policy(tiny.tokenizer()), tmp_path / "policy")
    tiny.write_splits(tiny.prompts(count=16), tmp_path / "prompts")
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    (tmp_path / "ppo.yaml").write_text(yaml.safe_dump(OPTIONS))
    (tmp_path / "wait").write_text("4")
    return tmp_path


class _Command:
    """A command in a process group of its own, which ends with the block."""

    def __init__(self, directory, *arguments):
        self.output = directory / "output.txt"
        environment = environment_of_a_user(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(sys.path))
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                [*RLHF, *arguments],
                cwd=directory,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        end_group(self.process.pid)
        self.process.wait()

    def end(self, seconds=120):
        """Wait for the exit code; return it with the output."""
        return self.process.wait(seconds), self.output.read_text()


def _checkpoints(directory):
    return sorted(path.name for path in (directory / "out").glob("*checkpoint*"))


def _go_on(directory, output):
    """Run the command that a run has told, in a shell."""
    (told,) = re.findall(r"To go on: (rlhf .*)$", output, re.MULTILINE)
    (directory / "wait").unlink()
    command = f"{shlex.join(RLHF)} {told.removeprefix('rlhf ')}"
    environment = environment_of_a_user(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(sys.path))
    subprocess.run(command, shell=True, cwd=directory, env=environment, check=True, capture_output=True)
    assert (directory / "out" / "model.safetensors").exists()
    return told


@pytest.mark.slow(reason=SLOW)
@pytest.mark.recipe
@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_to_ppo_leaves_a_checkpoint_and_the_command_that_goes_on(directory, number, processes):
    typed = ("ppo", "--config", "ppo.yaml", *(("--num_processes", processes) if processes == "2" else ()))
    if processes == "2":
        typed += ("--config_file", "multi_gpu")
    with _Command(directory, *typed) as command:
        wait_for(directory / "sampling")
        if number == signal.SIGINT:
            os.killpg(command.process.pid, number)
        else:
            command.process.send_signal(number)
        code, output = command.end()
    assert code == 75, output[-3000:]
    assert "Traceback" not in output, output[-3000:]
    assert _checkpoints(directory) == ["checkpoint-1"]
    assert ("Ctrl-C again" in output) == (number == signal.SIGINT)
    assert _go_on(directory, output) == shlex.join(["rlhf", *typed, "--resume_from_checkpoint", "true"])


@pytest.mark.slow(reason=SLOW)
@pytest.mark.recipe
def test_a_second_ctrl_c_ends_at_once_without_a_traceback(directory):
    (directory / "wait").write_text("60")
    with _Command(directory, "ppo", "--config", "ppo.yaml") as command:
        wait_for(directory / "sampling")
        os.killpg(command.process.pid, signal.SIGINT)
        time.sleep(2.5)
        assert command.process.poll() is None
        os.killpg(command.process.pid, signal.SIGINT)
        code, output = command.end(20)
    assert code == 130, output[-3000:]
    assert "Traceback" not in output, output[-3000:]
    assert _checkpoints(directory) == []
    _go_on(directory, output)


@pytest.mark.slow(reason=SLOW)
@pytest.mark.recipe
def test_ctrl_c_in_the_quickstart(tmp_path):
    """Its stages are processes of its own, and the stage that was stopped goes on as the same run."""
    folder = tmp_path / "runs" / "quickstart" / "sft"
    steps, runs = [], set()
    for start in ((), ("--start", "sft")):
        with _Command(tmp_path, "quickstart", "--until", "sft", *start) as command:
            deadline = time.monotonic() + 300
            while not re.search(r"\bloss\W+\d", command.output.read_text()) and time.monotonic() < deadline:
                time.sleep(0.2)
            os.killpg(command.process.pid, signal.SIGINT)
            code, output = command.end()
        assert "Traceback" not in output, output[-3000:]
        assert "Stopped by a signal in stage `sft`. To go on: rlhf quickstart --until sft --start sft\n" in output
        assert code == 75
        latest = max(folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
        steps.append(int(latest.name.partition("-")[2]))
        runs.add(json.loads((latest / "mlflow_run.json").read_text())["run_id"])
    assert steps[0] < steps[1]
    assert len(runs) == 1


LAUNCHER = """
import subprocess, sys
from rlhf_recipes.durability.launch import exit_code, listen
listen()
open("listens", "w").close()
if "--started" in sys.argv:
    process = subprocess.Popen([sys.executable, "rank.py"])
    sys.exit(exit_code([process.wait()]))
__import__("time").sleep(20)
"""
RANK = """
import signal, sys, time
from pathlib import Path
got = []
signal.signal(signal.SIGINT, lambda *_: got.append(1))
Path("started").touch()
while not got:
    time.sleep(0.05)
time.sleep(0.5)
sys.exit(75 if len(got) in (1, 2) else 1)
"""


@pytest.mark.parametrize(("started", "code"), [(True, 75), (False, 130)], ids=["beside a rank", "before a rank"])
def test_a_launcher_outlives_ctrl_c_while_its_processes_save(tmp_path, started, code):
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    (tmp_path / "rank.py").write_text(RANK)
    process = subprocess.Popen(
        [sys.executable, "launcher.py", *(["--started"] if started else [])],
        cwd=tmp_path,
        env=environment_of_a_user(PYTHONPATH=os.pathsep.join(sys.path)),
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(tmp_path / ("started" if started else "listens"))
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (code, "")


def test_ctrl_c_in_a_tool_is_no_traceback(monkeypatch):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "run", interrupted)
    monkeypatch.setattr(main.os, "environ", {})
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 130
