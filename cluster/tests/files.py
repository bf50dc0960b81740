"""Find the files of images, jobs and services by their names, and render overlays with kustomize."""

import functools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
KUBERNETES = CLUSTER / "kubernetes"
OVERLAYS = sorted(path.name for path in (KUBERNETES / "overlays").iterdir())
NOT_OURS = {".venv", ".cluster", ".git", "runs", "node_modules"}


def found(*patterns):
    """Return the files of the repository with these names."""
    paths = {path for pattern in patterns for path in ROOT.rglob(pattern) if path.is_file()}
    return sorted(path for path in paths if NOT_OURS.isdisjoint(path.relative_to(ROOT).parts))


DOCKERFILES = found("Dockerfile", "Dockerfile.*", "*.Dockerfile")
COMPOSE_FILES = found("compose*.yaml", "compose*.yml", "docker-compose*.yaml", "docker-compose*.yml")
SHELL_FILES = found("*.sh", "*.slurm", "*.sbatch", ".ci/run")
TASKS = sorted((CLUSTER / "skypilot").glob("*.yaml"))


def name(path):
    """Return the name of a file in the list of tests."""
    return str(path.relative_to(ROOT))


def documents(text):
    """Return the documents of a YAML text."""
    return [document for document in yaml.safe_load_all(text) if document]


def manifests():
    """Yield every manifest with its file: whole manifests, and patches of an overlay."""
    for path in sorted(KUBERNETES.rglob("*.yaml")):
        for document in documents(path.read_text(encoding="utf-8")):
            if document.get("kind") not in (None, "Kustomization", "Component"):
                yield path, document


def build(folder):
    """Run kustomize on a folder, and return the finished process."""
    if shutil.which("kubectl"):
        command = ["kubectl", "kustomize"]
    elif shutil.which("kustomize"):
        command = ["kustomize", "build"]
    else:
        pytest.skip("neither kubectl nor kustomize is installed: only the files themselves are checked")
    return subprocess.run([*command, str(folder)], capture_output=True, text=True)


@functools.cache
def rendered(overlay):
    """Return the text that `kubectl apply -k` would send for an overlay."""
    process = build(KUBERNETES / "overlays" / overlay)
    assert process.returncode == 0, process.stderr
    return process.stdout


def assignment(name):
    """Return the number that the library assigns to a constant."""
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "rlhf_recipes").rglob("*.py"))
    (value,) = {int(found) for source in sources for found in re.findall(rf"^{name} = (\d+)\b", source, re.MULTILINE)}
    return value
