"""A signal, a checkpoint, and the same command again: real processes, real signals; tiny models."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import tiny
import yaml
from processes import environment_of_a_user, free_port, run_script, start_script, wait_for
from safetensors.torch import load_file

pytestmark = pytest.mark.recipe

ROOT = Path(__file__).parents[2]
LAUNCH = (sys.executable, "-m", "rlhf_recipes.command", "launch")
TIMES = ("step_time", "runtime", "per_second")
REWARDS = """
import os, signal, time
from pathlib import Path

def length(completions, **kwargs):
    return [float(len(c)) for c in completions]

def signalled(completions, **kwargs):
    # In the fourth call, once: two batches of the evaluation at the start come first, and one rollout.
    calls = Path("calls").read_text().count("x") if Path("calls").exists() else 0
    Path("calls").write_text("x" * (calls + 1))
    if calls == 3:
        os.kill(os.getpid(), getattr(signal, os.environ["SIGNAL"]))
    return length(completions)

def dying(completions, **kwargs):
    # SIGKILL twice: inside a rollout's sampling, and while a checkpoint is being written.
    import threading
    def watch():
        while not Path("out/_unfinished/checkpoint-7/optimizer.pt").exists():
            time.sleep(0.0005)
        Path("killed in saving").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if not Path("killed in sampling").exists() and Path("out/checkpoint-3").exists():
        Path("killed in sampling").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if Path("killed in sampling").exists() and not Path("killed in saving").exists():
        threading.Thread(target=watch, daemon=True).start()
    return length(completions)

def filling(completions, **kwargs):
    # From the second checkpoint on, no file can grow beyond this: what a full disk is to whoever writes.
    import resource
    if Path("out/checkpoint-4").exists() and not Path("room").exists():
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
    return length(completions)

def endless(**kwargs):
    Path("sampling").touch()
    time.sleep(600)
"""
OPTIONS = {
    **{name: value for name, value in tiny.QUIET.items() if name not in ("report_to", "save_strategy")},
    "dataset_name": "prompts",
    "model_name_or_path": "policy",
    "output_dir": "out",
    "steps_per_generation": 2,
    "num_iterations": 2,
    "max_completion_length": 6,
    "max_steps": 12,
    "logging_steps": 3,
    "learning_rate": 1e-3,
    "response_separator": " ",
    "save_strategy": "steps",
    "save_steps": 100,
    "eval_strategy": "steps",
    "eval_steps": 5,
    "resume_from_checkpoint": True,
}
"""Rollouts of four steps. The signal comes in the second, so step 5 is the last; an evaluation is due there."""


@pytest.fixture
def directory(tmp_path, empty_store):
    shutil.copy(empty_store, tmp_path)
    tiny.save(tiny.policy(tiny.tokenizer()), tmp_path / "policy")
    tiny.write_splits(tiny.prompts(count=16), tmp_path / "prompts")
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    return tmp_path


def _config(directory, **changes):
    path = directory / "ppo.yaml"
    path.write_text(yaml.safe_dump(OPTIONS | changes))
    return path


def _run(directory, environment, **changes):
    return run_script(
        ROOT / "recipes" / "ppo.py", "--config", _config(directory, **changes), directory=directory, **environment
    )


def _results(directory):
    history = json.loads((directory / "trainer_state.json").read_text())["log_history"]
    history = [entry for entry in history if "train_runtime" not in entry]
    return (
        load_file(directory / "model.safetensors"),
        load_file(directory / "value_head.safetensors"),
        [{name: value for name, value in entry.items() if not name.endswith(TIMES)} for entry in history],
    )


def _assert_same(left, right):
    for one, other in zip(_results(left)[:2], _results(right)[:2], strict=True):
        assert one.keys() == other.keys()
        assert all(one[name].equal(other[name]) for name in one)
    assert _results(left)[2] == _results(right)[2]


def test_the_same_command_goes_on_where_the_signal_stopped_it(directory):
    """The tests of the launchers send the other signal too."""
    environment = {"SIGNAL": "SIGTERM"}
    code, output = _run(directory, environment, reward_functions=["my_rewards:signalled"], reward_weights=[1.0])
    assert code == 75, output[-3000:]
    assert "Stopped by a signal at step 5, with a checkpoint in out." in output
    assert [path.name for path in (directory / "out").glob("*checkpoint*")] == ["checkpoint-5"]
    client = mlflow.MlflowClient(f"sqlite:///{directory}/mlflow.db")
    (run,) = client.search_runs(["1"])
    assert run.info.status == "KILLED"
    assert not run.outputs.model_outputs, "what was cut short is no result"
    assert not (directory / "out" / "model.safetensors").exists()

    code, output = _run(directory, environment, reward_functions=["my_rewards:signalled"], reward_weights=[1.0])
    assert code == 0, output[-3000:]
    (run,) = client.search_runs(["1"])
    assert run.info.status == "FINISHED"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "loss")] == [3, 6, 9, 12]
    assert [m.step for m in client.get_metric_history(run.info.run_id, "eval_win_rate")] == [0, 5, 10, 12]

    (directory / "calls").write_text("x" * 9)
    whole = {"output_dir": "whole", "tracking": False}
    code, output = _run(directory, environment, reward_functions=["my_rewards:signalled"], **whole)
    assert code == 0, output[-3000:]
    _assert_same(directory / "whole", directory / "out")


def test_a_killed_run_goes_on_and_ends_like_one_that_was_left_alone(directory):
    """`benchmarks/kill_and_resume.py` does this at random moments of the quickstart."""
    options = {
        "tracking": False,
        "save_steps": 1,
        "save_total_limit": 3,
        "num_iterations": 1,
        "steps_per_generation": 3,
    }
    codes = []
    while not codes or codes[-1] == -signal.SIGKILL:
        code, output = _run(directory, {}, reward_functions=["my_rewards:dying"], **options)
        codes.append(code)
        if (directory / "killed in saving").exists() and len(codes) == 2:
            assert (directory / "out" / "_unfinished" / "checkpoint-7").is_dir(), "killed in the middle"
            assert not (directory / "out" / "checkpoint-7").exists()
    assert codes == [-signal.SIGKILL, -signal.SIGKILL, 0], output[-3000:]
    code, output = _run(directory, {}, reward_functions=["my_rewards:dying"], output_dir="whole", **options)
    assert code == 0, output[-3000:]
    _assert_same(directory / "whole", directory / "out")


def test_a_full_disk_costs_no_checkpoint(directory):
    options = {"tracking": False, "save_steps": 4, "reward_functions": ["my_rewards:filling"], "logged_samples": 0}
    code, output = _run(directory, {}, **options)
    assert code == 1
    last = output.strip().splitlines()[-1]
    assert last.startswith("Error: Checkpoint out/checkpoint-8 could not be written: ")
    assert last.endswith("resume with `resume_from_checkpoint: true`.")
    assert sorted(path.name for path in (directory / "out").glob("*")) == [
        "README.md", "checkpoint-4", "samples",
    ]  # fmt: skip
    (directory / "room").touch()
    code, output = _run(directory, {}, **options)
    assert code == 0, output[-3000:]
    _run(directory, {}, **options, output_dir="whole")
    _assert_same(directory / "whole", directory / "out")


def test_a_run_that_is_over_is_not_trained_on(directory):
    """A job that is submitted again may have nothing left to do. transformers would train one more step."""
    for attempt in ("first", "second"):
        code, output = _run(directory, {}, reward_functions=["my_rewards:length"], tracking=False)
        assert code == 0, output[-3000:]
        assert json.loads((directory / "out" / "trainer_state.json").read_text())["global_step"] == 12
        shutil.copytree(directory / "out", directory / attempt)
    _assert_same(directory / "first", directory / "second")


def test_a_second_signal_ends_the_process_at_once(directory):
    config = _config(directory, reward_functions=["my_rewards:endless"], tracking=False)
    process = start_script(ROOT / "recipes" / "ppo.py", "--config", config, directory=directory)
    wait_for(directory / "sampling")
    os.kill(process.pid, signal.SIGTERM)
    process.join(2.5)
    assert process.exitcode is None, "the first one waits for the optimiser step"
    os.kill(process.pid, signal.SIGTERM)
    process.join(20)
    assert process.exitcode == 143


@pytest.mark.slow(reason="with several processes the launcher passes the same signals, which the default run tests")
def test_a_launcher_of_one_process_passes_the_signal_and_the_exit_code_on(directory):
    """`accelerate launch` would end at the signal, without a signal to the recipe, and always with 1."""
    config = _config(directory, reward_functions=["my_rewards:slow"])
    (directory / "my_rewards.py").write_text(
        REWARDS
        + """
def slow(completions, **kwargs):
    Path("sampling").touch()
    time.sleep(3)
    return length(completions)
"""
    )
    command = [str(part) for part in (*LAUNCH, ROOT / "recipes" / "ppo.py", "--config", config)]
    options = {"cwd": directory, "env": environment_of_a_user(OMP_NUM_THREADS="1"), "text": True}
    process = subprocess.Popen(command, **options, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for(directory / "sampling")
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output[-5000:]
    assert [path.name for path in (directory / "out").glob("*checkpoint*")] == ["checkpoint-1"]
    (directory / "fails.py").write_text("raise SystemExit(3)")
    failed = subprocess.run([*LAUNCH, "fails.py"], **options, capture_output=True, check=False)
    assert failed.returncode == 3
    assert "CalledProcessError" not in failed.stderr, "the recipe has said what is wrong"


@pytest.mark.distributed
def test_a_launcher_passes_the_signal_on_and_all_ranks_stop_at_one_step(directory):
    config = _config(directory, reward_functions=["my_rewards:waiting"], per_device_train_batch_size=2)
    (directory / "my_rewards.py").write_text(
        REWARDS
        + """
def waiting(completions, **kwargs):
    Path("sampling").touch()
    time.sleep(3)
    return length(completions)
"""
    )
    arguments = [
        "--config_file", ROOT / "accelerate_configs" / "multi_gpu.yaml", "--num_processes", 2,
        "--mixed_precision", "no", "--main_process_port", free_port(), ROOT / "recipes" / "ppo.py", "--config", config,
    ]  # fmt: skip
    process = subprocess.Popen(
        [str(part) for part in (*LAUNCH, *arguments)],
        cwd=directory,
        env=environment_of_a_user(OMP_NUM_THREADS="1"),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    wait_for(directory / "sampling")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output[-5000:]
    assert "Stopped by a signal at step 1, with a checkpoint in out." in output, output[-5000:]
    lines = [line for line in output.splitlines() if "reducer.cpp" not in line]
    assert [line for line in lines if re.search(r"\wWarning|UNEXPECTED", line)] == [], (
        "fresh interpreters, all imports"
    )
    assert [path.name for path in (directory / "out").glob("*checkpoint*")] == ["checkpoint-1"]
    (run,) = mlflow.MlflowClient(f"sqlite:///{directory}/mlflow.db").search_runs(["1"])
    assert run.info.status == "KILLED", "the other rank's end has not cut short the record"
