"""The exit code of a launch. For its signals see test_preemption_of_recipes.py."""

import signal
import subprocess
import sys

import pytest

from rlhf_recipes.durability.launch import exit_code, main


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([1], 1),
        ([2, -signal.SIGTERM], 2),
        ([75], 75),
        ([-signal.SIGTERM, 75], 75),
        ([-signal.SIGKILL, 1], 137),
        ([-signal.SIGTERM], 75),
        ([128 + signal.SIGUSR1], 75),
        ([1, -signal.SIGTERM], 1),
        ([-signal.SIGSEGV], 139),
        ([-signal.SIGINT], 130),
        ([130], 130),
        ([130, 75], 75),
    ],
)
def test_one_exit_code_for_all_processes(codes, expected):
    assert exit_code(codes) == expected
    assert exit_code(iter(codes)) == expected


@pytest.fixture
def deaf(monkeypatch):
    """No handlers of signals for this process."""
    monkeypatch.setattr("rlhf_recipes.durability.launch.listen", lambda: None)


def test_options_that_contradict_each_other_are_one_line(deaf):
    with pytest.raises(SystemExit, match=r"^Error: You need to use at least 2 processes to use `--multi_gpu`\.$"):
        main(["--multi_gpu", "--num_processes", "1", "script.py"])


@pytest.mark.parametrize("kind", [ValueError, ConnectionError])
def test_an_error_that_nobody_foresaw_keeps_its_traceback(deaf, monkeypatch, kind):
    def broken(args):
        raise kind("of another library")

    monkeypatch.setattr("accelerate.commands.launch.simple_launcher", broken)
    with pytest.raises(kind, match="of another library"):
        main(["--cpu", "--num_processes", "1", "script.py"])


def test_the_launcher_imports_no_trainer():
    """A node runs a launcher beside its recipes, so it must be small and must start at once."""
    script = (
        "import sys, rlhf_recipes.durability.launch; sys.exit(any(name in sys.modules for name in ('trl', 'mlflow')))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
