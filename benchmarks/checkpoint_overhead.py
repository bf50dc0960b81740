"""Measure the cost of checkpoints in a PPO run: their share of the time of the quickstart's training.

    make demo
    python benchmarks/checkpoint_overhead.py

The time is taken inside one run: the seconds in which checkpoints are written, hashed, synchronised to the disk and
renamed, and the seconds of training. Writes `checkpoint_overhead.md`.
"""

import argparse
import json
import os
import platform
import runpy
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

from rlhf_recipes import PPOTrainer
from rlhf_recipes.durability.checkpoints import checkpoints_by_age

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Train, add up the seconds and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--save_steps", type=int, default=40, help="the default is the quickstart's")
    parser.add_argument("--directory", type=Path, default=Path("runs/checkpoint_overhead"))
    options = parser.parse_args()
    directory, seconds = options.directory.resolve(), []
    save_checkpoint: Any = PPOTrainer._save_checkpoint

    def timed(*args: Any) -> None:
        start = time.perf_counter()
        save_checkpoint(*args)
        seconds.append(time.perf_counter() - start)

    setattr(PPOTrainer, "_save_checkpoint", timed)  # noqa: B010  (mypy refuses an assignment to a method)
    os.chdir(ROOT)
    sys.argv = [
        "recipes/ppo.py", "--output_dir", str(directory), "--max_steps", str(options.steps), "--tracking", "false",
        "--save_strategy", "steps", "--save_steps", str(options.save_steps),
    ]  # fmt: skip
    runpy.run_path("recipes/ppo.py", run_name="__main__")
    history = json.loads((directory / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    training = next(entry["train_runtime"] for entry in history if "train_runtime" in entry)
    size = sum(file.stat().st_size for file in checkpoints_by_age(directory)[-1].rglob("*") if file.is_file()) / 1e6
    table = (
        "| checkpoints | MB each | seconds each | seconds of training | share |\n|---|---|---|---|---|\n"
        f"| {len(seconds)} | {size:.0f} | {sum(seconds) / len(seconds):.2f} | {training:.0f} "
        f"| {sum(seconds) / training:.1%} |\n\n{platform.machine()}, {os.cpu_count()} cores, {date.today()}\n"
    )
    (directory / "checkpoint_overhead.md").write_text(table, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
