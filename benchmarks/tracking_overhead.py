"""Measure the cost of tracking in a PPO run: the share of the time of the quickstart's training.

    make demo
    python benchmarks/tracking_overhead.py

The run records metrics, system metrics, tables of completions, lineage and the model in a real `mlflow server` on this
machine. The difference between a run with and a run without tracking is smaller than their noise, so the time is taken
inside one run. Two times are added: the seconds in which training waits for a record, and the processor seconds of the
threads beside it that send records and sample the system, as if training had stopped for them. Writes
`tracking_overhead.md`.
"""

import argparse
import json
import os
import platform
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from rlhf_recipes.tracking.callback import RunCallback
from rlhf_recipes.tracking.delivery import Delivery
from rlhf_recipes.trainers import value_head

ROOT = Path(__file__).resolve().parents[1]
CALLBACKS = ("on_train_begin", "on_log", "on_evaluate", "on_save", "on_train_end")
seconds: dict[str, float] = defaultdict(float)


@contextmanager
def mlflow_server(directory: Path):
    """Run a server with a SQLite store, and yield its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{directory}/mlflow.db", "--artifacts-destination", f"{directory}/artifacts",
    ]  # fmt: skip
    with (directory / "server.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            uri = f"http://127.0.0.1:{port}"
            for _ in range(600):
                try:
                    urlopen(f"{uri}/health", timeout=1).close()
                    break
                except OSError:
                    time.sleep(0.2)
            yield uri
        finally:
            os.killpg(server.pid, 15)
            server.wait()


def count(place: Any, name: str, label: str, clock: Callable[[], float]) -> None:
    """Let a function add up the time of its calls."""
    original = getattr(place, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        start = clock()
        try:
            return original(*args, **kwargs)
        finally:
            seconds[label] += clock() - start

    setattr(place, name, counted)


def main() -> None:
    """Train with all records, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80, help="optimiser steps; four make a rollout")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"))
    args = parser.parse_args()
    for name in CALLBACKS:
        count(RunCallback, name, "training waits: metrics", time.perf_counter)
    count(value_head, "write_table", "training waits: tables of completions", time.perf_counter)
    count(Delivery, "_send", "beside it: sending", time.thread_time)
    count(SystemMetricsMonitor, "monitor", "beside it: system metrics", time.thread_time)
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as folder, mlflow_server(Path(folder)) as uri:
        os.environ.update(MLFLOW_TRACKING_URI=uri)
        sys.argv = ["recipes/ppo.py", "--max_steps", str(args.steps), "--output_dir", f"{folder}/ppo"]
        runpy.run_path("recipes/ppo.py", run_name="__main__")
        history = json.loads(Path(folder, "ppo", "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    training = next(entry["train_runtime"] for entry in history if "train_runtime" in entry)
    rows = [f"| {label} | {spent:.2f} | {spent / training:.2%} |" for label, spent in sorted(seconds.items())]
    total = sum(seconds.values())
    lines = [
        f"Quickstart PPO, {args.steps} steps in {training:.0f} s; {date.today()}, {os.cpu_count()} cores, "
        f"{platform.machine()}",
        "",
        "| | seconds | of training |",
        "|---|---|---|",
        *rows,
        f"| all | {total:.2f} | {total / training:.2%} |",
    ]
    (output / "tracking_overhead.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
