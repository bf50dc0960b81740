"""A fork of the server that has imported the libraries must behave as a fresh interpreter does."""

import json
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import processes
import psutil
import pytest
from processes import none_left, run_command, run_fresh, start_script, wait_for

RECIPES = Path(__file__).parents[1] / "recipes"
STATE = """
import rlhf_recipes.trainers.ppo, rlhf_recipes.trainers.reward_modeling, rlhf_recipes.tracking.session
import json, logging, os, signal, sys, threading, warnings
import mlflow, torch

signals = {number.name: str(signal.getsignal(number)) for number in signal.valid_signals() if hasattr(number, "name")}
print(json.dumps({
    "signals": signals,
    "wakeup": signal.set_wakeup_fd(-1),
    "excepthook": sys.excepthook is sys.__excepthook__,
    "environment": dict(os.environ),
    "argv": sys.argv,
    "path": sys.path,
    "directory": os.getcwd(),
    "main": [__name__, __file__, sys.modules["__main__"].__dict__ is globals()],
    "threads": [thread.name for thread in threading.enumerate()],
    "log handlers": [str(handler) for handler in logging.getLogger().handlers],
    "log levels": {
        name: logger.level for name, logger in logging.root.manager.loggerDict.items() if hasattr(logger, "level")
    },
    "warning filters": [str(entry) for entry in warnings.filters],
    "torch": [torch.get_num_threads(), torch.distributed.is_initialized()],
    "mlflow": [mlflow.get_tracking_uri(), str(mlflow.active_run())],
    "terminals": [sys.stdin.isatty(), sys.stdout.isatty(), sys.stderr.isatty()],
}))
"""


@pytest.fixture(scope="module")
def fresh_state(tmp_path_factory):
    """A script that shows the state of its process, and what a fresh interpreter makes of it."""
    script = tmp_path_factory.mktemp("state") / "state.py"
    script.write_text(STATE)
    return script, run_fresh(script, "--option", "1", directory=script.parent, OMP_NUM_THREADS="1")


@pytest.mark.recipe
@pytest.mark.slow(reason="checks how the tests start recipes, and no code of the package")
def test_a_fork_starts_with_the_state_of_a_fresh_interpreter(fresh_state):
    script, fresh = fresh_state
    fork = run_command(script, "--option", "1", directory=script.parent, OMP_NUM_THREADS="1")
    assert (fork.returncode, fork.stderr) == (0, "")
    found, expected = json.loads(fork.stdout), json.loads(fresh.stdout)
    # The server imports more than this script, and torch notes its own default of a folder when it is imported.
    found["log levels"] = {name: found["log levels"].get(name) for name in expected["log levels"]}
    for state in (found, expected):
        for name in ("TORCHINDUCTOR_CACHE_DIR", "PYTEST_CURRENT_TEST"):
            state["environment"].pop(name, None)
    assert found == expected


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("print('done')", 0),
        ("sys.exit(75)", 75),
        ("sys.exit('Error: `gamma` is 2')", 1),
        ("raise ValueError('a bug')", 1),
        ("sys.excepthook = lambda *error: print(error[1]); raise ValueError('a refusal')", 1),
        ("signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); os.kill(os.getpid(), signal.SIGTERM)", 143),
        ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
        ("os.kill(os.getpid(), signal.SIGINT)", -signal.SIGINT),
        ("atexit.register(print, 'last')", 0),
        ("threading.Timer(0.2, print, ['from a thread']).start()", 0),
        ("threading.Thread(target=time.sleep, args=[60], daemon=True).start()", 0),
        ("sys.kept = type('Kept', (), {'__del__': lambda self, write=os.write: write(1, b'torn down')})()", 0),
    ],
)
def test_a_fork_ends_as_a_fresh_interpreter_does(tmp_path, end, code):
    script = tmp_path / "end.py"
    script.write_text(f"import atexit, os, signal, sys, threading, time\n\n\ndef main():\n    {end}\n\n\nmain()\n")
    fork, fresh = run_command(script, directory=tmp_path), run_fresh(script, directory=tmp_path)
    assert (fork.returncode, fork.stdout, fork.stderr) == (fresh.returncode, fresh.stdout, fresh.stderr)
    assert fork.returncode == code


@pytest.mark.recipe
@pytest.mark.slow(reason="checks how the tests start recipes, and no code of the package")
def test_a_recipe_says_in_a_fork_what_it_says_alone(tmp_path, fresh_state):
    command = (RECIPES / "ppo.py", "--no_such_option", "1")
    fork, fresh = run_command(*command, directory=tmp_path), run_fresh(*command, directory=tmp_path)
    said_on_import = fresh_state[1].stderr
    assert (fork.returncode, fork.stdout) == (fresh.returncode, fresh.stdout) == (1, "")
    assert said_on_import + fork.stderr == fresh.stderr


FAMILY = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stdout=-3, stderr=-3)
pathlib.Path("child.part").write_text(str(child.pid))
pathlib.Path("child.part").rename("child.txt")
{end}
"""


def _child(directory):
    wait_for(directory / "child.txt")
    return psutil.Process(int((directory / "child.txt").read_text()))


def _is_gone(process):
    deadline = time.monotonic() + 15
    with suppress(psutil.NoSuchProcess):
        while process.status() != psutil.STATUS_ZOMBIE:  # nobody may ask for its exit code
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
    return True


def _family(directory, end):
    script = directory / "family.py"
    script.write_text(FAMILY.format(end=end))
    return script


def test_a_test_that_fails_leaves_no_process_of_a_group(tmp_path):
    def fail():
        start_script(_family(tmp_path, "time.sleep(600)"), directory=tmp_path)
        children.append(_child(tmp_path))
        raise AssertionError("the test fails")

    children = []
    with pytest.raises(AssertionError, match="the test fails"), none_left():
        fail()
    assert _is_gone(children[0])


@pytest.mark.parametrize("run", [run_command, run_fresh])
def test_a_command_that_runs_out_of_time_ends_with_its_group(tmp_path, monkeypatch, run):
    monkeypatch.setattr(processes, "LAUNCH_SECONDS", 3)
    with suppress(subprocess.TimeoutExpired):
        run(_family(tmp_path, "time.sleep(600)"), directory=tmp_path)
    assert _is_gone(_child(tmp_path))


@pytest.mark.parametrize("run", [run_command, run_fresh])
def test_what_a_command_leaves_behind_ends_with_it(tmp_path, run):
    assert (
        run(_family(tmp_path, "sys.stdout.close(); sys.stderr.close(); sys.exit(0)"), directory=tmp_path).returncode
        == 0
    )
    assert _is_gone(_child(tmp_path))
