"""With any value of an option, a recipe either trains, or refuses it before it trains by a message with its name."""

import re
from pathlib import Path

import processes
import pytest

pytestmark = pytest.mark.recipe
DRIVER = Path(__file__).parents[2] / "benchmarks" / "odd_options.py"


@pytest.mark.parametrize(("count", "seed"), [(15, 0), pytest.param(800, 1, marks=pytest.mark.slow)])
def test_an_option_is_trained_with_or_refused_by_name(tmp_path, count, seed):
    """The driver draws lines of all recipes, for the command line and for YAML, and runs each."""
    ended = processes.run_command(DRIVER, "--count", str(count), "--seed", str(seed), directory=tmp_path)
    assert ended.returncode == 0, ended.stdout
    found = {end: int(number) for end, number in re.findall(r"'(\w+)': (\d+)", ended.stdout.splitlines()[-1])}
    assert found.keys() == {"refused", "trained", "accepted"}
    assert found["refused"] > count / 2
    assert found["trained"] > count / 10
