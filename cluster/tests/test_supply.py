"""Check that an image holds only packages with known hashes, no trace of an index, and a base that cannot change."""

import re
import subprocess
import tomllib

import pytest
from files import DOCKERFILES, ROOT, name

REQUIREMENTS = ROOT / "cluster" / "requirements"
LOCKED = {path.stem: path.read_text(encoding="utf-8") for path in sorted(REQUIREMENTS.glob("*.txt"))}
CONSTRAINTS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
DIGEST = f"python:3.12@sha256:{'0' * 64}"
INDEX = re.compile(r"PIP_\w*INDEX|--(extra-)?index-url|--find-links|--trusted-host|https?://(?!127\.0\.0\.1)")


def locked(text):
    """Return version and number of hashes of each package of a file; the version is `None` if it is not exact."""
    entries = re.split(r"\n(?=[\w-])", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE))
    names = [re.match(r"([\w.-]+)(?:==([^\s;]+))?", entry) for entry in entries if entry.strip()]
    return {found[1]: (found[2], found.string.count("--hash=sha256:")) for found in names}


def check_lock(text):
    for package, (version, hashes) in locked(text).items():
        assert version == CONSTRAINTS.get(package, version), package
        assert version, package
        assert hashes, package


def check_dockerfile(text):
    assert not INDEX.search(text)
    installs = re.findall(r"pip install (.+?)(?= \\\n|\n)", text)
    assert installs
    for options in map(str.split, installs):
        assert "--require-hashes" in options or {"--no-index", "--no-deps"} <= {*options}
        # pip checks no hash of what it installs to build a package.
        assert {"--no-build-isolation", "--only-binary", "build.txt"} & {*options}


def release_check(text):
    """Return the shell command of a Dockerfile that looks at the base image."""
    (command,) = re.findall(r"^RUN (case .+?esac)$", text, re.MULTILINE | re.DOTALL)
    return command.replace("\\\n", "\n")


@pytest.mark.parametrize("file", LOCKED)
def test_packages_of_an_image_have_hashes_and_the_versions_of_the_tests(file):
    check_lock(LOCKED[file])


@pytest.mark.parametrize(
    ("old", "new"),
    [("trl==1.16.0 ", "trl==1.15.0 "), ("trl==1.16.0 ", "trl>=1.16 "), ("--hash=sha256:", "--sha256:")],
)
def test_a_mistake_in_a_lock_is_noticed(old, new):
    assert old in LOCKED["image"]
    with pytest.raises(AssertionError):
        check_lock(LOCKED["image"].replace(old, new))


def test_the_lock_holds_what_the_project_needs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = {re.match(r"[\w-]+", need)[0] for need in [*project["dependencies"], *extras["deepspeed"]]}
    assert wanted <= locked(LOCKED["image"]).keys()
    mlflow = re.search(r"mlflow==(\S+?)\\n", (ROOT / "Makefile").read_text())[1]
    assert locked(LOCKED["mlflow"])["mlflow"][0] == mlflow == CONSTRAINTS["mlflow"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=name)
def test_an_image_is_built_from_hashes_and_keeps_no_index(path):
    check_dockerfile(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", DOCKERFILES, ids=name)
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (" --require-hashes", ""),
        (" --require-hashes", " --require-hashes --extra-index-url https://me:password@example.com/simple"),
        ("RUN --mount=type=secret", "ARG PIP_EXTRA_INDEX_URL\nRUN --mount=type=secret"),
    ],
)
def test_a_spoilt_dockerfile_is_noticed(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    with pytest.raises(AssertionError):
        check_dockerfile(text.replace(old, new))


def test_no_argument_of_a_build_is_an_index():
    for file in ("docker-compose.yml", ".env.example"):
        assert not re.search("INDEX", (ROOT / file).read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", DOCKERFILES, ids=name)
@pytest.mark.parametrize(
    ("release", "image", "code"),
    [("1", "python:3.12", 1), ("1", DIGEST, 0), ("", "python:3.12", 0), ("1", "python@sha256", 1)],
)
def test_a_release_needs_a_base_image_with_a_digest(path, release, image, code):
    command = release_check(path.read_text(encoding="utf-8"))
    process = subprocess.run(["sh", "-c", command], env={"RELEASE": release, "BASE_IMAGE": image}, capture_output=True)
    assert process.returncode == code
    assert (b"RELEASE needs a BASE_IMAGE with a digest" in process.stderr) == bool(code)
