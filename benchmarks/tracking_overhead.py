"""What tracking costs a PPO run: the quickstart's PPO stage with everything recorded, and with nothing.

    make demo
    python benchmarks/tracking_overhead.py

Recorded are metrics, system metrics, tables of completions, lineage and the model, in a real `mlflow server` on this
machine; without tracking, no table is written either. The two take turns, as processes of their own, in either order.
Compared are the seconds inside training, and those of the whole command beside it. Writes `tracking_overhead.md`.
"""

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from urllib.request import urlopen

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
MODES = {"off": ["--tracking", "false", "--logged_samples", "0"], "on": ["--tracking", "true"]}


@contextmanager
def mlflow_server(directory: Path):
    """Run a server with a SQLite store; yield its address."""
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


def train(mode: str, steps: int, output_dir: Path, uri: str) -> tuple[float, float]:
    """Run the PPO stage for some steps; return the seconds of training and of the whole command."""
    start = time.perf_counter()
    command = [
        sys.executable,
        ROOT / "recipes" / "ppo.py",
        "--max_steps",
        steps,
        "--output_dir",
        output_dir,
        *MODES[mode],
    ]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": uri, "OMP_NUM_THREADS": "1"}
    subprocess.run([str(part) for part in command], check=True, env=environment, capture_output=True)
    wall = time.perf_counter() - start
    history = json.loads((output_dir / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return next(entry["train_runtime"] for entry in history if "train_runtime" in entry), wall


def main() -> None:
    """Let the two take turns, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=80, help="optimiser steps of each run; four are a rollout")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"))
    args = parser.parse_args()
    seconds: dict[str, list[tuple[float, float]]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory() as folder, mlflow_server(Path(folder)) as uri:
        for number in range(args.rounds):
            for mode in list(MODES)[:: 1 if number % 2 else -1]:
                seconds[mode].append(train(mode, args.steps, Path(folder, mode), uri))
                print(number, mode, *(f"{x:.1f} s" for x in seconds[mode][-1]), flush=True)
    on, off = (np.array(seconds[mode]) for mode in ("on", "off"))
    ratios, beside = on[:, 0] / off[:, 0], (on - off)[:, 1] - (on - off)[:, 0]
    lines = [
        f"Quickstart PPO, {args.steps} steps, {args.rounds} rounds; {date.today()}, {os.cpu_count()} cores, "
        f"{platform.machine()}",
        "",
        "| | seconds of training | with tracking / without |",
        "|---|---|---|",
        f"| without | {np.median(off[:, 0]):.1f} | 1 |",
        f"| with | {np.median(on[:, 0]):.1f} | {np.median(ratios):.3f} [{ratios.min():.3f}, {ratios.max():.3f}] |",
        "",
        f"Before and after training: {np.median(beside):.1f} s [{beside.min():.1f}, {beside.max():.1f}] more.",
    ]
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "tracking_overhead.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
