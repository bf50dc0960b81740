"""Other processes: one function on several gloo ranks of this machine, and scripts as a user runs them.

The function travels as (file, name), not as a pickle: pytest's importlib mode gives test modules names that a fresh
interpreter cannot import. So it must sit at the top level of its module.
"""

import importlib.util
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rlhf_recipes.durability.ending import GLOO_SECONDS

TIMEOUT_SECONDS = 240
EXPORTED_BY_MLFLOW = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID")
"""What `mlflow.set_tracking_uri` and `set_experiment` leave in the environment of the test's own process."""


def environment_of_a_user(**changes):
    """This environment without what MLflow has put into it for an earlier test, and with `changes`."""
    return {name: value for name, value in os.environ.items() if name not in EXPORTED_BY_MLFLOW} | changes


def run_in_processes(fn, world_size, *args):
    """[fn(rank, world_size, *args) for each rank], each in its own process with an initialised gloo group.

    A failing rank raises here with its traceback, and a rank that hangs is ended after `TIMEOUT_SECONDS`: no process
    outlives the call. Results go through `torch.save`.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = (world_size, free_port(), fn.__code__.co_filename, fn.__qualname__, folder, args)
        context = mp.spawn(_rank_main, args=job, nprocs=world_size, join=False)
        deadline = time.monotonic() + TIMEOUT_SECONDS
        try:
            while not context.join(timeout=1):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{fn.__qualname__} on {world_size} ranks ran past {TIMEOUT_SECONDS} s")
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [torch.load(_result_path(folder, rank), weights_only=False) for rank in range(world_size)]


def _rank_main(rank, world_size, port, file, name, folder, args):
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
    )
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_SECONDS))
    try:
        spec = importlib.util.spec_from_file_location(Path(file).stem, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        torch.save(getattr(module, name)(rank, world_size, *args), _result_path(folder, rank))
    finally:
        if dist.is_initialized():  # the function may have ended it
            time.sleep(GLOO_SECONDS)
            dist.destroy_process_group()


def _result_path(folder, rank):
    return Path(folder) / f"rank{rank}.pt"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# A recipe spends ten seconds on imports: this server does them once, and every recipe is a fork of it.
_recipes = multiprocessing.get_context("forkserver")
_recipes.set_forkserver_preload(
    ["rlhf_recipes.trainers.ppo", "rlhf_recipes.trainers.reward_modeling", "rlhf_recipes.tracking.session"]
)


def start_script(script, *arguments, directory, **environment):
    """Start a Python script as its own command would run in `directory`; its output is appended to `output.txt` there.

    Returns the process: `pid`, `join`, `exitcode`, `kill`.
    """
    job = (str(script), [str(a) for a in arguments], str(directory), environment)
    process = _recipes.Process(target=_script_main, args=job)
    process.start()
    return process


def run_script(script, *arguments, directory, **environment):
    """Run a Python script to its end; return its exit code and everything that scripts have said in `directory`."""
    process = start_script(script, *arguments, directory=directory, **environment)
    process.join(TIMEOUT_SECONDS)
    if process.exitcode is None:
        process.kill()
    process.join()
    return process.exitcode, Path(directory, "output.txt").read_text()


def _script_main(script, arguments, directory, environment):
    output = os.open(Path(directory, "output.txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(directory)
    # Not in the parent: this is a fork of a server that may have started in the middle of another test.
    variables = environment_of_a_user(**environment)
    os.environ.clear()
    os.environ.update(variables)
    sys.path.insert(0, directory)
    sys.argv = [script, *arguments]
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell has started in the background
    try:
        runpy.run_path(script, run_name="__main__")
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


@contextmanager
def mlflow_server(directory, port):
    """A real MLflow server of one worker with proxied artifacts; ended when the block is left."""
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{directory}/mlflow.db", "--serve-artifacts",
        "--artifacts-destination", directory / "artifacts",
    ]  # fmt: skip
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # evaluations on the server: 13 s
    with (directory / "server.txt").open("a") as log:
        process = subprocess.Popen(
            command, cwd=directory, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                with urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except (URLError, OSError):
                assert process.poll() is None, (directory / "server.txt").read_text()[-2000:]
                assert time.monotonic() < deadline
                time.sleep(0.2)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
