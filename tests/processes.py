"""Run one function on several gloo ranks of this machine and collect what each rank returns.

The function travels as (file, name), not as a pickle: pytest's importlib mode gives test modules names that a fresh
interpreter cannot import. So it must sit at the top level of its module.
"""

import importlib.util
import os
import socket
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT_SECONDS = 240


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
        dist.destroy_process_group()


def _result_path(folder, rank):
    return Path(folder) / f"rank{rank}.pt"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
