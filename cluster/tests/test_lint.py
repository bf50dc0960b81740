"""Check Dockerfiles and shell scripts with their linters."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from files import DOCKERFILES, ROOT, SHELL_FILES, TASKS, name

BIN = Path(sys.executable).parent


def hadolint(text):
    """Return the result of hadolint for a Dockerfile."""
    return subprocess.run([BIN / "hadolint", "--no-color", "-"], input=text, cwd=ROOT, capture_output=True, text=True)


def shellcheck(text, *options):
    """Return the result of shellcheck for a script. It does not follow sourced files."""
    command = [BIN / "shellcheck", "--exclude", "SC1090,SC1091", *options, "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True)


def scripts():
    """Yield every script with its options for shellcheck, including the scripts in SkyPilot's tasks."""
    for path in SHELL_FILES:
        yield pytest.param(path.read_text(encoding="utf-8"), (), id=name(path))
    for path in TASKS:
        task = yaml.safe_load(path.read_text(encoding="utf-8"))
        for part in ("setup", "run"):
            yield pytest.param(task[part], ("--shell", "bash"), id=f"{name(path)}: {part}")


@pytest.mark.parametrize("path", DOCKERFILES, ids=name)
def test_a_dockerfile(path):
    process = hadolint(path.read_text(encoding="utf-8"))
    assert process.returncode == 0, process.stdout


@pytest.mark.parametrize("path", DOCKERFILES, ids=name)
@pytest.mark.parametrize(
    ("old", "new"), [("\nFROM ", "\nFORM "), ("\nRUN ", "\nRUN cd /tmp && "), ("\nUSER ", "\nUSER root\n#")]
)
def test_a_spoilt_dockerfile_is_noticed(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    assert hadolint(text.replace(old, new)).returncode != 0


@pytest.mark.parametrize(("text", "options"), scripts())
def test_a_script(text, options):
    process = shellcheck(text, *options)
    assert process.returncode == 0, process.stdout


@pytest.mark.parametrize(("text", "options"), scripts())
@pytest.mark.parametrize("line", ["rm -r $1", "if true; then", 'echo "$not_assigned_anywhere"', "unused=1"])
def test_a_spoilt_script_is_noticed(text, options, line):
    assert shellcheck(f"{text}\n{line}\n", *options).returncode != 0
