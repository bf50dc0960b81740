"""Every test: seeded, offline, network blocked except loopback. `@pytest.mark.gpu` implies the skip without CUDA.

`pytest --device cuda` runs the tests marked `portable` on a GPU, and those marked `gpu`.
"""

import gc
import ipaddress
import os
import random
import signal
import socket
import sys
from pathlib import Path

# oracles, tolerances, strategies and processes are imported by name, also by spawned ranks, which inherit sys.path.
sys.path.insert(0, str(Path(__file__).parent))

# A shell ignores SIGINT for a command in the background, and every process here would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # under nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    MLFLOW_DISABLE_TELEMETRY="true",
    TOKENIZERS_PARALLELISM="false",
)

import mlflow  # noqa: E402  (the hub reads its offline flag on import)
import numpy as np  # noqa: E402
import processes  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

from rlhf_recipes.durability.termination import SIGNALS  # noqa: E402

# Derandomised: a red run is red again. No deadline: the machine may be busy.
settings.register_profile("rlhf_recipes", deadline=None, derandomize=True, max_examples=40, database=None)
settings.load_profile("rlhf_recipes")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol():
    """Give back the signal handlers: a run that has stopped by a signal ignores it from then on."""
    numbers = (signal.SIGINT, signal.SIGHUP, *SIGNALS)
    handlers = {number: signal.getsignal(number) for number in numbers}
    result = yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return result


LOCAL_NAMES = {"", "localhost", "0.0.0.0", "::", socket.gethostname()}


class NetworkBlockedError(RuntimeError):
    """A test tried to leave the machine."""


def _is_local(host):
    host = host.decode() if isinstance(host, bytes) else host
    if host is None or host in LOCAL_NAMES:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _block_network(event, args):
    """Audit hook: sees every Python socket, whoever opens it, and cannot be patched away by a test."""
    if event in ("socket.connect", "socket.sendto"):
        address = args[1]
        # Unix sockets have a path for an address, not a (host, port) tuple.
        if isinstance(address, tuple) and not _is_local(address[0]):
            raise NetworkBlockedError(f"{event} to {address}: tests are offline")
    elif event in ("socket.getaddrinfo", "socket.gethostbyname") and not _is_local(args[0]):
        raise NetworkBlockedError(f"{event} of {args[0]!r}: tests are offline")


sys.addaudithook(_block_network)


def pytest_addoption(parser):
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where the `portable` tests run")


def pytest_configure(config):
    if config.getoption("device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no GPU")
    os.environ["TEST_DEVICE"] = config.getoption("device")  # before `tiny` is imported


def _on_gpu(item):
    """Return whether a test runs with `--device cuda`. Several processes would need several GPUs."""
    return item.get_closest_marker("gpu") or (
        item.get_closest_marker("portable") and not item.get_closest_marker("distributed")
    )


def pytest_collection_modifyitems(config, items):
    if config.getoption("device") == "cuda":
        config.hook.pytest_deselected(items=[item for item in items if not _on_gpu(item)])
        items[:] = filter(_on_gpu, items)
    # The longest files first, or one of them is left to one worker at the end.
    long, middle = (
        {item.path for item in items if any(map(item.get_closest_marker, kinds))}
        for kinds in (("distributed", "recipe", "learning"), ("tiny",))
    )
    items.sort(key=lambda item: (item.path not in long, item.path not in middle))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))


def pytest_collection_finish():
    # Each training begins with a garbage collection. To look through all that is imported takes half a second.
    gc.freeze()


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """Write an empty MLflow store to copy, because creating one takes seconds."""
    directory = tmp_path_factory.mktemp("empty_store")
    mlflow.MlflowClient(f"sqlite:///{directory}/mlflow.db").search_experiments()
    return directory / "mlflow.db"


@pytest.fixture(autouse=True)
def _seed():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_process_outlives_its_test():
    with processes.none_left():
        yield
