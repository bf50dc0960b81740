"""`rlhf doctor`: what this machine has, what is missing, and whether training can run here."""

import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import psutil
from packaging.requirements import Requirement

from rlhf_recipes.command.arguments import ArgumentParser

DISTRIBUTION = "rlhf-recipes"
SHOWN = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "mlflow")
# What each extra is for.
EXTRAS = {
    "quantization": "4-bit models (`load_in_4bit`)",
    "deepspeed": "ZeRO on several GPUs",
    "vllm": "sampling by vLLM (`use_vllm`)",
    "smollm2": "the weights of SmolLM2-135M without a model hub",
    "dev": "the tests of this library",
}
GB = 1e9
NEEDED_MEMORY, NEEDED_DISK = 2 * GB, 2 * GB  # of the quickstart, with what the libraries themselves take
SECONDS = 3
GPU_FILES = ("/dev/nvidia0", "/dev/kfd")


class Finding(NamedTuple):
    """A line of the report: `ok`, `note` or `FAILS`, and what it is about."""

    state: str
    subject: str
    text: str


def main(arguments: Sequence[str]) -> None:
    """Print the findings, and end with 0 if training can run here."""
    parser = ArgumentParser("doctor", "Check whether training can run on this machine. Ends with 0 if it can.")
    parser.parse_args(arguments)
    failures = 0
    for finding in findings():
        sys.stdout.write(f"{finding.state:6}{finding.subject:16}{finding.text}\n")
        failures += finding.state == "FAILS"
    sys.stdout.write("Training can run here.\n" if not failures else f"Training cannot run here: {failures} FAILS.\n")
    sys.exit(bool(failures))


def findings() -> Iterator[Finding]:
    """Find out about this machine, part by part."""
    yield _python()
    yield from _packages()
    yield from _devices()
    yield _memory()
    yield _disk(Path.cwd())
    yield _store(os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db")
    yield from _extras()


def _python() -> Finding:
    text = f"{platform.python_version()} at {sys.executable}"
    if (3, 11) <= sys.version_info < (3, 13):
        return Finding("ok", "Python", text)
    return Finding("FAILS", "Python", f"{text}: install Python 3.11 or 3.12")


def _packages() -> Iterator[Finding]:
    """Compare what is installed with what this library requires."""
    missing = [problem for needed in requirements() if (problem := _problem(needed))]
    if missing:
        yield Finding("FAILS", "Packages", f"{', '.join(missing)}: run `pip install {DISTRIBUTION}`")
    else:
        versions = ", ".join(f"{name} {version(name)}" for name in (DISTRIBUTION, *SHOWN))
        yield Finding("ok", "Packages", versions)


def requirements(extra: str = "") -> list[Requirement]:
    """Return what this library requires, or what one of its extras requires."""
    all_of_them = map(Requirement, requires(DISTRIBUTION) or [])
    chosen = (each for each in all_of_them if bool(extra) == ("extra" in str(each.marker)))
    return [each for each in chosen if each.marker is None or each.marker.evaluate({"extra": extra})]


def _problem(needed: Requirement) -> str | None:
    try:
        found = version(needed.name)
    except PackageNotFoundError:
        return f"{needed.name} is missing"
    return None if needed.specifier.contains(found, prereleases=True) else f"{needed} is needed, {found} is installed"


def _devices() -> Iterator[Finding]:
    """Ask the driver for GPUs, and torch only if there is one, because its import takes seconds."""
    yield Finding("ok", "CPU", f"{os.cpu_count()} cores, {platform.machine()}")
    gpus = _gpus()
    for gpu in gpus:
        yield Finding("ok", "GPU", gpu)
    if not gpus and not any(map(os.path.exists, GPU_FILES)):
        yield Finding("note", "GPU", "none: trainings use the CPU, which is enough for small models")
        return
    torch = import_module("torch")
    if not torch.cuda.is_available():
        text = f"torch {torch.__version__} sees no GPU, so training would use the CPU: install a build for this driver"
        yield Finding("note", "CUDA", f"{text}, or look at CUDA_VISIBLE_DEVICES")
    else:
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16: trainings use float32"
        yield Finding("ok", "CUDA", f"{torch.version.cuda} in torch, {torch.cuda.device_count()} GPUs visible, {bf16}")


def _gpus() -> list[str]:
    """Return name, memory and driver of each GPU, as `nvidia-smi` says."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return []
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return [line for line in result.stdout.splitlines() if line.count(",") == 2]


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    text = f"{memory.available / GB:.1f} GB of {memory.total / GB:.1f} GB free"
    if memory.available < NEEDED_MEMORY:
        return Finding("FAILS", "Memory", f"{text}: {NEEDED_MEMORY / GB:.0f} GB are needed, so end other processes")
    return Finding("ok", "Memory", text)


def _disk(directory: Path) -> Finding:
    free = shutil.disk_usage(directory).free
    text = f"{free / GB:.1f} GB free in {directory}"
    if not os.access(directory, os.W_OK):
        return Finding("FAILS", "Disk", f"{directory} is not writable: change to another directory")
    if free < NEEDED_DISK:
        return Finding("FAILS", "Disk", f"{text}: {NEEDED_DISK / GB:.0f} GB are needed")
    return Finding("ok", "Disk", text)


def _store(uri: str) -> Finding:
    """Look at the MLflow store. A run goes on without it, and delivers its records later."""
    address = urlsplit(uri)
    host = address.netloc.rpartition("@")[2]  # without a password
    shown = address._replace(netloc=host).geturl() if host != address.netloc else uri
    if address.scheme not in ("http", "https"):
        return Finding("ok", "Tracking store", shown)
    port = address.port or {"http": 80, "https": 443}[address.scheme]
    try:
        socket.create_connection((address.hostname, port), timeout=SECONDS).close()
    except OSError as error:
        return Finding(
            "note", "Tracking store", f"{shown} does not answer ({error}): runs keep their records until then"
        )
    return Finding("ok", "Tracking store", f"{shown} answers")


def _extras() -> Iterator[Finding]:
    for extra, purpose in EXTRAS.items():
        missing = [problem for needed in requirements(extra) if (problem := _problem(needed))]
        remedy = f"{', '.join(missing)}; `pip install '{DISTRIBUTION}[{extra}]'`"
        yield Finding("note" if missing else "ok", f"[{extra}]", f"{purpose}" + (f": {remedy}" if missing else ""))
