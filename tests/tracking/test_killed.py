"""A process that is killed at any moment leaves no run RUNNING for ever, and the next start loses and doubles nothing.

Each child is a real process that kills itself inside a function that it has patched. The store is a real one.
"""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import mlflow
import pytest
import tiny
import yaml
from processes import free_port, run_launch, run_script, start_script, wait_for

pytestmark = pytest.mark.recipe

PATCH = """
import os, signal, sys
from pathlib import Path

def kill_at(owner, name, *, before=True, call=1):
    original, calls = getattr(owner, name), []

    def patched(*args, **kwargs):
        calls.append(1)
        if before and len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, patched)
"""
PLACES = {
    "before the run": "import mlflow; kill_at(mlflow.MlflowClient, 'create_run')",
    "before its id is noted": "import mlflow; kill_at(mlflow.MlflowClient, 'create_run', before=False)",
    "while the options are recorded": "import rlhf_recipes.tracking.store as s; kill_at(s, '_record_options')",
    "before the first checkpoint": "import rlhf_recipes.durability.trainer as t; kill_at(t, 'publish')",
    "after the first checkpoint": "import rlhf_recipes.durability.trainer as t; kill_at(t, 'publish', before=False)",
    "after the second": "import rlhf_recipes.durability.trainer as t; kill_at(t, 'publish', before=False, call=2)",
    "before the end": "import mlflow; kill_at(mlflow, 'end_run')",
    "after the end": "import mlflow; kill_at(mlflow, 'end_run', before=False)",
    "with records that are not sent": (
        "import rlhf_recipes.tracking.delivery as d, rlhf_recipes.durability.trainer as t, threading\n"
        "stop, apply = threading.Event(), d._apply\n"
        "d._apply = lambda client, record: stop.wait() if record.get('step') == 2 else apply(client, record)\n"
        "kill_at(t, 'publish', before=False, call=2)"
    ),
}
CONTINUED = (
    *("after the first checkpoint", "after the second", "before the end", "after the end"),
    "with records that are not sent",
)
SLOW = ("while the options are recorded", "before the first checkpoint", "after the second", "after the end")
TRAIN = """
sys.path.insert(0, TESTS)
import tiny
from rlhf_recipes import RewardModelTrainer
from rlhf_recipes.options.recipes import TrackingArguments
from rlhf_recipes.tracking.session import log_results, track_run

def main():
    tok = tiny.tokenizer()
    args = tiny.reward_config("out", max_steps=5, save_strategy="steps", save_steps=2, resume_from_checkpoint=RESUME)
    with track_run(TrackingArguments(), "out", "reward_modeling", args) as callbacks:
        trainer = RewardModelTrainer(
            tiny.reward_model(tok), args, train_dataset=tiny.preferences(), processing_class=tok, callbacks=callbacks
        )
        log_results(trainer.train(resume_from_checkpoint=args.resume_from_checkpoint).metrics)
"""


@pytest.fixture
def directory(tmp_path, empty_store):
    shutil.copy(empty_store, tmp_path)
    return tmp_path


def _start(directory, patch="", *, resume=True):
    """Train in a child; return its exit code and what it has said."""
    script = directory / "train.py"
    body = PATCH + TRAIN.replace("TESTS", repr(str(Path(__file__).parents[1]))).replace("RESUME", repr(resume))
    script.write_text(f"{body}\n{patch}\nmain()\n")
    (directory / "output.txt").unlink(missing_ok=True)
    return run_script(script, directory=directory, MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING="false")


def _runs(directory):
    client = mlflow.MlflowClient(f"sqlite:///{directory}/mlflow.db")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return client, sorted(runs, key=lambda run: run.info.start_time)


def _steps(client, run, name):
    return [metric.step for metric in client.get_metric_history(run.info.run_id, name)]


@pytest.mark.parametrize(
    "place", [pytest.param(place, marks=pytest.mark.slow if place in SLOW else ()) for place in PLACES]
)
def test_the_same_command_after_a_kill(directory, place):
    code, output = _start(directory, PLACES[place])
    assert code == -signal.SIGKILL, output[-3000:]
    _, before = _runs(directory)
    code, output = _start(directory)
    assert code == 0, output[-3000:]
    client, runs = _runs(directory)
    expected = ["FINISHED"] if place in CONTINUED or not before else ["KILLED", "FINISHED"]
    assert [run.info.status for run in runs] == expected
    assert ("did not end, because its process was killed. It is now KILLED" in output) == (expected[0] == "KILLED")
    for name in ("loss", "num_tokens"):
        assert _steps(client, runs[-1], name) == [1, 2, 3, 4, 5]
    assert _steps(client, runs[-1], "train_loss") == [5]
    assert not (directory / "out" / "_mlflow_open.json").exists()


@pytest.mark.parametrize("place", ["after the first checkpoint", "before its id is noted"])
def test_a_new_start_closes_the_run_that_was_left(directory, place):
    """It does not resume, so it cannot continue the run."""
    assert _start(directory, PLACES[place])[0] == -signal.SIGKILL
    code, output = _start(directory, resume=False)
    assert code == 0, output[-3000:]
    _, runs = _runs(directory)
    assert [run.info.status for run in runs] == ["KILLED", "FINISHED"]
    assert "did not end, because its process was killed" in output


def test_a_checkpoint_knows_its_run(directory):
    """A second run in the directory is killed before its first checkpoint: the resume is one of the first."""
    assert _start(directory)[0] == 0
    _, (first,) = _runs(directory)
    assert _start(directory, PLACES["before the first checkpoint"], resume=False)[0] == -signal.SIGKILL
    code, output = _start(directory)
    assert code == 0, output[-3000:]
    client, runs = _runs(directory)
    assert [run.info.status for run in runs] == ["FINISHED", "KILLED"]
    note = json.loads((directory / "out" / "checkpoint-5" / "mlflow_run.json").read_text())
    assert note["run_id"] == first.info.run_id == runs[0].info.run_id
    assert _steps(client, runs[0], "loss") == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("damage", ["{", *(pytest.param(text, marks=pytest.mark.slow) for text in ("", "[]", "{}"))])
def test_a_note_that_cannot_be_read_stops_no_start(directory, damage):
    assert _start(directory, PLACES["after the second"])[0] == -signal.SIGKILL
    for name in ("_mlflow_open.json", "mlflow_run.json"):
        (directory / "out" / name).write_text(damage)
    code, output = _start(directory)
    assert code == 0, output[-3000:]
    (run,) = _runs(directory)[1]
    assert run.info.status == "FINISHED"


REWARDS = """
import os, signal
from accelerate import PartialState

def deadly(completions, **kwargs):
    if PartialState().process_index == 1 and os.path.exists("out/checkpoint-2"):
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(len(text)) for text in completions]
"""


@pytest.mark.distributed
def test_a_killed_rank_takes_the_others_along_and_leaves_no_open_run(directory):
    """The ranks wait for the one that is gone, and the launcher ends them."""
    tiny.save(tiny.policy(tiny.tokenizer()), directory / "policy")
    tiny.write_splits(tiny.prompts(count=16), directory / "prompts")
    (directory / "my_rewards.py").write_text(REWARDS)
    options = {
        **tiny.RECIPE, "model_name_or_path": "policy", "dataset_name": "prompts", "output_dir": "out", "max_steps": 8,
        "reward_functions": ["my_rewards:deadly"], "response_separator": " ", "max_completion_length": 6,
        "steps_per_generation": 2, "num_iterations": 1, "save_strategy": "steps", "save_steps": 2,
    }  # fmt: skip
    (directory / "ppo.yaml").write_text(yaml.safe_dump(options))
    root = Path(__file__).parents[2]
    result = run_launch(
        "--config_file", root / "accelerate_configs" / "multi_gpu.yaml", "--num_processes", 2, "--mixed_precision",
        "no", "--main_process_port", free_port(), root / "recipes" / "ppo.py", "--config", "ppo.yaml",
        directory=directory,
    )  # fmt: skip
    assert result.returncode != 0
    _, (run,) = _runs(directory)
    assert run.info.status in ("FAILED", "KILLED"), result.stderr[-3000:]


STUCK = """
import hashlib, os, sys
from dataclasses import dataclass
from pathlib import Path
from rlhf_recipes.options.recipes import TrackingArguments
from rlhf_recipes.tracking import stuck
from rlhf_recipes.tracking.session import track_run

@dataclass
class Config:
    output_dir: str = "out"

stuck.STUCK_SECONDS = 0.3
with track_run(TrackingArguments(), "out", "sft", Config()):
    Path("stuck").touch()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2 ** 30)  # runs no handler of a signal, as a collective without a partner
"""


def test_a_process_that_cannot_react_to_a_signal_leaves_no_open_run(directory):
    (directory / "stuck.py").write_text(STUCK)
    process = start_script(directory / "stuck.py", directory=directory)
    wait_for(directory / "stuck")
    time.sleep(0.5)
    client, (run,) = _runs(directory)
    assert run.info.status == "RUNNING"
    os.kill(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + 20
    while client.get_run(run.info.run_id).info.status == "RUNNING" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert process.exitcode is None
    process.kill()
    process.join()
    assert client.get_run(run.info.run_id).info.status == "KILLED"
