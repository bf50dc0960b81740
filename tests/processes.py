"""Other processes: scripts as a user runs them, launches of several ranks, and one function on several gloo ranks.

Importing torch, TRL and MLflow costs ten seconds of CPU. So a server imports them once for each worker of pytest, and
every process here is a fork of that server. `test_processes.py` compares a fork with a fresh interpreter:

- The server only imports. It has no second thread of Python, no tensor, no store and no log handler of its own.
- multiprocessing resets its signal handlers in the fork. The fork also sets environment, working directory,
  arguments, `sys.path`, standard output and error, and random seeds, as the command would have them.
- The fork ends by `Py_Exit`, as an interpreter does: it joins threads, runs `atexit`, and tears modules down. Only the
  libraries that the server has imported stay whole, with what C++ keeps in them: half a second of work each time.

Every process leads a group of its own. The whole group ends with the test, also if the test fails or runs out of time.

The warnings that a library raises on import are the server's. So tests of a first run use fresh interpreters.
"""

import atexit
import ctypes
import functools
import gc
import importlib.metadata
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
from contextlib import closing, contextmanager, suppress
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from threading import Thread
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rlhf_recipes.durability.ending import GLOO_SECONDS

TIMEOUT_SECONDS = 240
LAUNCH_SECONDS = 600
EXPORTED_BY_MLFLOW = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID")
"""What `mlflow.set_tracking_uri` and `set_experiment` leave in the environment of the test's own process."""

LAUNCHER = "accelerate.commands.launch"

# At every step, accelerate reads the metadata of several packages from the disk: a third of a short training.
importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    [
        *("rlhf_recipes.trainers.ppo", "rlhf_recipes.trainers.reward_modeling", "rlhf_recipes.trainers.baselines"),
        *("rlhf_recipes.trainers.sft", "rlhf_recipes.tracking.session", "rlhf_recipes.preflight.preflight"),
        *("rlhf_recipes.evaluation.held_out", "rlhf_recipes.comparison.report", "rlhf_recipes.options.parser"),
        *(LAUNCHER, "torch.distributed.run", "pytest"),
        # What libraries import in the middle of a run. Without it here, each recipe would spend more than a second.
        *("deepspeed", "mlflow.store.tracking.sqlalchemy_store", "alembic.command", "git", "scipy.io", "einops"),
        *("opentelemetry.sdk.metrics.export", "pygments.formatters.html", "transformers.models.llama.modeling_llama"),
    ]
)
_started = []
_libraries = set()  # names of modules that the server has imported for a fork


def environment_of_a_user(**changes):
    """This environment without what MLflow has put into it for an earlier test, and with `changes`."""
    return {name: value for name, value in os.environ.items() if name not in EXPORTED_BY_MLFLOW} | changes


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_in_processes(fn, world_size, *args):
    """[fn(rank, world_size, *args) for each rank], each in its own process with an initialised gloo group.

    A failing rank raises here with its traceback, and a rank that hangs is ended after `TIMEOUT_SECONDS`: no process
    outlives the call. Results go through `torch.save`. The function travels as (file, name), not as a pickle:
    pytest's importlib mode names test modules so that no other process can import them. So it must sit at the top
    level of its module.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = (world_size, free_port(), fn.__code__.co_filename, fn.__qualname__, folder, dict(os.environ), args)
        context = mp.start_processes(
            _rank_main, args=job, nprocs=world_size, join=False, start_method=_server.get_start_method()
        )
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


def _rank_main(rank, world_size, port, file, name, folder, environment, args):
    _become(
        environment
        | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
        }
    )
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
    _exit(0)


def _result_path(folder, rank):
    return Path(folder) / f"rank{rank}.pt"


def start_script(script, *arguments, directory, **environment):
    """Start a Python script as its own command would run in `directory`; its output is appended to `output.txt` there.

    Returns the process: `pid`, `join`, `exitcode`, `kill`.
    """
    output = Path(directory, "output.txt")
    return _start(_script_main, (script, *arguments), directory, environment_of_a_user(**environment), output, output)


def run_script(script, *arguments, directory, **environment):
    """Run a Python script to its end; return its exit code and everything that scripts have said in `directory`."""
    process = start_script(script, *arguments, directory=directory, **environment)
    _join(process, TIMEOUT_SECONDS)
    return process.exitcode, Path(directory, "output.txt").read_text()


def run_command(script, *arguments, directory, **environment):
    """Run `python SCRIPT ARGUMENTS` by a fork; return its exit code and output as `subprocess.run` does."""
    return _run(_script_main, (script, *arguments), directory, environment)


def run_launch(*arguments, directory, fresh=False, **environment):
    """Run `accelerate launch ARGUMENTS` by forks; return the exit code and the output of all.

    The launcher is accelerate's own: it reads its file, makes the environment of the ranks, watches and ends them.
    With `fresh`, it and the ranks are fresh interpreters.
    """
    if fresh:
        return run_fresh("-m", LAUNCHER, *arguments, directory=directory, **environment)
    return _run(_launcher_main, arguments, directory, environment)


def run_fresh(*command, directory, **environment):
    """Run `python COMMAND` by a fresh interpreter; return its exit code and output."""
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=directory,
        env=environment_of_a_user(**environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output = process.communicate(timeout=LAUNCH_SECONDS)
    finally:
        end_group(process.pid)
        process.wait()
    return subprocess.CompletedProcess(process.args, process.returncode, *output)


def end_group(pid):
    """End a process and every process of its group."""
    with suppress(ProcessLookupError):  # all have ended
        os.killpg(pid, signal.SIGKILL)


@contextmanager
def none_left():
    """End each process that has been started in the block and still runs."""
    count = len(_started)
    try:
        yield
    finally:
        for process in _started[count:]:
            end_group(process.pid)
            process.kill()
            process.join()
        del _started[count:]


def _run(main, command, directory, environment):
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        process = _start(main, command, directory, environment_of_a_user(**environment), *outputs)
        _join(process, LAUNCH_SECONDS)
        texts = [path.read_text() if path.exists() else "" for path in outputs]
        return subprocess.CompletedProcess(command, process.exitcode, *texts)


def _start(main, command, directory, environment, stdout, stderr):
    job = ([str(part) for part in command], str(directory), environment, str(stdout), str(stderr), _python_path())
    process = _server.Process(target=main, args=job)
    process.start()
    _started.append(process)
    return process


def _join(process, seconds):
    try:
        process.join(seconds)
    finally:
        if process.exitcode is None:
            process.kill()
        end_group(process.pid)
        process.join()


@functools.cache
def _python_path():
    """`sys.path` of a fresh interpreter without its first entry, which depends on the command."""
    code = "import sys; print(*sys.path[1:], sep='\\n')"
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.splitlines()


def _become(environment):
    """Replace the environment, and what a fork of the server has in other ways than a fresh interpreter."""
    _libraries.update(name for name in sys.modules if _is_library(name))
    os.environ.clear()
    os.environ.update(environment)
    gc.freeze()  # to look through all that the server has imported takes two seconds at the end of each fork
    torch.set_num_threads(1)
    np.random.seed()
    torch.seed()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell has started in the background


def _enter(command, directory, environment, stdout, stderr):
    sys.stdout.flush()  # of the server's own
    if os.getpgrp() != os.getpid():
        os.setsid()
    for number, file in ((1, stdout), (2, stderr)):
        output = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(output, number)
        os.close(output)
    os.chdir(directory)
    _become(environment)
    sys.argv = command


def _script_main(command, directory, environment, stdout, stderr, path):
    _enter(command, directory, environment, stdout, stderr)
    sys.path[:] = [str(Path(command[0]).parent.resolve()), *path]
    _end_as_main(functools.partial(runpy.run_path, command[0], run_name="__main__"))


def _launcher_main(arguments, directory, environment, stdout, stderr, path):
    """Run accelerate's launcher, with torchrun's start of an interpreter replaced by a fork."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

    def start_rank(handler, command, environment):
        script = list(command[command.index("-u") + 1 :])
        job = (script, os.getcwd(), environment, stdout, stderr, path)
        process = _server.Process(target=_launched_main, args=job)
        process.start()
        return process._popen  # has `pid`, `poll` and `wait` as a process of `subprocess`

    SubprocessHandler._popen = start_rank
    forkserver._forkserver.ensure_running = lambda: None  # Python 3.11 starts one more server for a fork of a server
    _enter([LAUNCHER, *arguments], directory, environment, stdout, stderr)
    _end_as_main(importlib.import_module(LAUNCHER).main)


def _launched_main(*job):
    os.setsid()  # torchrun ends a group
    if job[2].get("ACCELERATE_USE_DEEPSPEED") == "true":
        # It would compile an operator for its collectives on CPUs, which takes a minute. Without it, it uses gloo.
        # `deepspeed.comm.torch` would be torch itself: an import with a star hides the module of that name.
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    Thread(target=_end_with_parent, daemon=True).start()
    _script_main(*job)


def _end_with_parent():
    """End this rank and its group if the launcher has ended without ending it."""
    wait([multiprocessing.parent_process().sentinel])
    end_group(os.getpid())


def _end_as_main(run):
    """Run the main program and end the process as the interpreter does: by an exit, an exception, or its last line."""
    code = 0
    try:
        run()
    except SystemExit as end:
        code = end.code or 0
        if not isinstance(code, int):
            sys.stderr.write(f"{code}\n")
            code = 1
    except BaseException as error:
        error = error.with_traceback(_from_script(error.__traceback__))
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
        if isinstance(error, KeyboardInterrupt):
            atexit._run_exitfuncs()
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    _exit(code)


def _exit(code):
    """End the interpreter: it joins threads, runs what `atexit` has been given, and tears modules down."""
    atexit.register(_keep_libraries)
    c = ctypes.CDLL(None)
    for function, argument in ((c._exit, code), (c.fflush, None)):  # the last one is called first
        c.__cxa_atexit(function, ctypes.c_void_p(argument), None)
    ctypes.pythonapi.Py_Exit(code)


def _keep_libraries():
    """Run all other functions of `atexit`; then hide the server's libraries from the interpreter, which ends them."""
    atexit.unregister(_keep_libraries)
    atexit._run_exitfuncs()
    kept = [sys.modules.pop(name) for name in _libraries & sys.modules.keys()]
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))


def _is_library(name):
    package = name.partition(".")[0]
    return package not in sys.stdlib_module_names and package not in ("rlhf_recipes", __name__, "__mp_main__")


def _from_script(trace):
    """The traceback from the first line of the script on."""
    own = (__file__, runpy.__file__, "<frozen runpy>")
    while trace.tb_next is not None and trace.tb_frame.f_code.co_filename in own:
        trace = trace.tb_next
    return trace


def wait_for(path):
    """Wait until another process has written a file."""
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} was never written"
        time.sleep(0.05)


def wait_for_server(process, url, log):
    """Wait until a process answers at an address."""
    deadline = time.monotonic() + 120
    while True:
        try:
            with urlopen(url, timeout=5):
                return
        except (URLError, OSError):
            assert process.is_alive(), log.read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.1)


@contextmanager
def raw_server(answer):
    """The address of a server in threads of this process: `answer(connection)` answers each client, byte by byte."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer_one(connection):
        with connection, suppress(OSError):
            answer(connection)

    def accept():
        with suppress(OSError):
            while True:
                Thread(target=answer_one, args=(listener.accept()[0],), daemon=True).start()

    Thread(target=accept, daemon=True).start()
    with closing(listener):
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def mlflow_server(directory, port):
    """A real MLflow server of one worker with proxied artifacts; ended when the block is left."""
    command = (
        "mlflow", "server", "--host", "127.0.0.1", "--port", port, "--workers", 1,
        "--backend-store-uri", f"sqlite:///{directory}/mlflow.db", "--serve-artifacts",
        "--artifacts-destination", directory / "artifacts",
    )  # fmt: skip
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # evaluations on the server: 13 s
    log = directory / "server.txt"
    process = _start(_mlflow_main, command, directory, environment, log, log)
    try:
        wait_for_server(process, f"http://127.0.0.1:{port}/health", log)
        yield
    finally:
        end_group(process.pid)
        process.kill()
        process.join()


def _mlflow_main(*job):
    """Run `mlflow server`, with the process that it starts for its one worker replaced by this one."""
    import mlflow.cli
    import mlflow.server

    def serve(command, extra_env, **options):
        os.environ.update(extra_env)
        sys.argv = command[command.index("-m") + 1 :]
        runpy.run_module("uvicorn", run_name="__main__", alter_sys=True)

    mlflow.server._exec_cmd = serve
    _enter(*job[:-1])
    _end_as_main(mlflow.cli.cli)
