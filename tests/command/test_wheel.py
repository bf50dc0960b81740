"""A wheel holds all that the command runs, and works without the repository."""

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from processes import environment_of_a_user

ROOT = Path(__file__).parents[2]
BROUGHT_ALONG = (
    "recipes",
    "accelerate_configs",
    "rlhf_recipes/command/templates",
    "rlhf_recipes/comparison/templates",
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Build a wheel without network, and install it into a fresh environment that sees the libraries of this one."""
    directory = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", directory], cwd=ROOT, check=True)
    (wheel,) = directory.glob("*.whl")
    environment = directory / "environment"
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps")
    subprocess.run([*pip, wheel], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    # Its own packages come first. A `.pth` file in the folder that this names has no effect, so the editable
    # installation of this environment is not seen.
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    return packages


def _rlhf(installed, directory, *arguments):
    """Run the installed script from a directory outside of the repository."""
    command = [installed.parents[2] / "bin" / "rlhf", *arguments]
    environment = environment_of_a_user(PYTHONPATH="")
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)


def test_the_wheel_holds_recipes_configurations_and_templates(installed):
    (wheel,) = installed.parents[3].glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    for folder in BROUGHT_ALONG:
        tracked = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=True)
        expected = {
            name if name.startswith("rlhf_recipes/") else f"rlhf_recipes/{name}" for name in tracked.stdout.split()
        }
        assert expected
        assert expected <= set(names)
    assert not [name for name in names if name.startswith(("tests", "recipes", "docs"))]


def test_it_writes_and_finds_outside_of_the_repository(installed, tmp_path):
    assert _rlhf(installed, tmp_path, "init", "mine").returncode == 0
    assert (tmp_path / "mine" / "ppo.yaml").exists()
    assert (tmp_path / "mine" / "data" / "prompts" / "train.jsonl").exists()
    result = _rlhf(installed, tmp_path, "evaluate", "--config", "quickstart/evaluat")
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert "Did you mean `quickstart/evaluate`?" in result.stderr
    result = _rlhf(installed, tmp_path, "doctor")
    assert "rlhf-recipes 0." in result.stdout


@pytest.mark.recipe
def test_a_recipe_runs_to_its_exit_code(installed, tmp_path):
    """Launched by accelerate, it refuses a missing input in one line, and its exit code is that of the command."""
    result = _rlhf(installed, tmp_path, "ppo", "--config", "quickstart/ppo", "--tracking", "false")
    assert result.returncode == 1, result.stderr
    shipped = installed / "rlhf_recipes" / "recipes" / "configs" / "quickstart" / "ppo.yaml"
    assert f"`--config` quickstart/ppo is the shipped {shipped}." in result.stderr
    assert "Run `rlhf quickstart --until sft` first." in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow(reason="several stages take minutes; the tests above start a recipe of the wheel")
@pytest.mark.recipe
def test_the_quickstart_runs_and_its_stages_go_on(installed, tmp_path):
    options = ("--until", "reward_modeling", "--num_pairs", "240")
    result = _rlhf(installed, tmp_path, "quickstart", *options)
    assert result.returncode == 0, result.stderr[-3000:]
    result = _rlhf(installed, tmp_path, "ppo", "--config", "quickstart/ppo.yaml", "--max_steps", "4")
    assert result.returncode == 0, result.stderr[-3000:]
    result = _rlhf(installed, tmp_path, "evaluate", "--config", "quickstart/evaluate", "--num_samples", "1")
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "runs" / "quickstart" / "evaluate" / "results.json").exists()
    result = _rlhf(installed, tmp_path, "quickstart", "--start", "evaluate")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "win rate over SFT (gold)" in result.stdout
