"""Measure how time, memory and computed tokens of our iteration grow, and whether a long run leaks.

    python benchmarks/growth.py --output runs/benchmark
    python benchmarks/growth.py --output runs/benchmark --steps 300 --processes

Completions of 32 to 512 tokens, 8 to 64 rows, 1 and 2 processes (gloo), on a small model. The figures are those of one
process. Memory is the peak of the process minus its memory before the trainer was made. `--steps` trains a tiny model
that long, with one rollout per step, and counts memory, Python objects and tensors three times. Writes `growth.json`
and `growth.md`.
"""

import argparse
import gc
import json
import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from ppo_iteration_trainers import Builder, Scenario
from transformers import TrainerCallback

BASE = Scenario("4x128", 32, 64, rows=16, micro_batch=4, epochs=2)
CELLS = [replace(BASE, completion=n) for n in (32, 64, 128, 256, 512)]
CELLS += [replace(BASE, rows=n) for n in (8, 32, 64)]
LONG = Scenario("tiny", 8, 16, rows=4, micro_batch=2, epochs=1)


def resident(name: str = "VmRSS") -> int:
    """Return the resident memory of this process in bytes, or with `VmHWM` its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


class OneIteration(TrainerCallback):
    """Measure the second iteration, then end."""

    def __init__(self, builder: Builder) -> None:
        self.clock, self.epochs = builder.clock, builder.scenario.epochs

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock after the first iteration and stop it after the second."""
        if state.global_step == self.epochs:
            self.clock.reset()
        if state.global_step == 2 * self.epochs:
            self.clock.lap()
            control.should_training_stop = True


class Leaks(TrainerCallback):
    """Count memory, objects and tensors after each third of the steps, then end."""

    def __init__(self, steps: int) -> None:
        self.steps, self.found = steps, []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count, or end."""
        if state.global_step % max(self.steps // 3, 1) == 0:
            gc.collect()
            objects = gc.get_objects()
            tensors = sum(issubclass(type(x), torch.Tensor) for x in objects)
            self.found.append(
                {"step": state.global_step, "bytes": resident(), "objects": len(objects), "tensors": tensors}
            )
        control.should_training_stop = state.global_step >= self.steps


def measure(scenario: Scenario, processes: int) -> dict[str, Any]:
    """Return the figures of one cell."""
    before = resident()
    with tempfile.TemporaryDirectory() as folder:
        builder = Builder(scenario, "cpu", folder, processes=processes)
        trainer = builder.build("ours")
        trainer.add_callback(OneIteration(builder))
        trainer.train()
    phases = builder.clock.figures.values()
    totals = {name: sum(figures[name] for figures in phases) for name in ("wall", "cpu", "tokens", "forwards")}
    facts = {"completion": scenario.completion, "rows": scenario.rows, "processes": processes}
    return {**facts, **totals, "peak_bytes": resident("VmHWM") - before}


def leaks(steps: int) -> list[dict[str, Any]]:
    """Train for a number of steps and return the counts of each third."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Builder(LONG, "cpu", folder).build("ours")
        callback = Leaks(steps)
        trainer.add_callback(callback)
        trainer.train()
    return callback.found


def in_children(call: Callable[..., Any], *args: Any, processes: int = 1) -> Any:
    """Return the result of a call in the first of some new processes, which know each other by gloo.

    A child of this process need not import anything, and it has the memory of a process without a trainer.

    Raises:
        EOFError: If the first process ends without a result. The others end with this process.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ranks = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "localhost", "MASTER_PORT": port}

    def run(rank: int) -> None:
        if processes > 1:
            os.environ.update(
                {name: str(value) for name, value in (ranks | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            )
        if rank > 0:
            sender.close()
        result = call(*args)
        if rank == 0:
            sender.send(result)

    children = [context.Process(target=run, args=(rank,), daemon=True) for rank in range(processes)]
    for child in children:
        child.start()
    sender.close()  # only the first child has it now: if it ends, `recv` raises the error
    result = receiver.recv()
    for child in children:
        child.join()
    return result


def tables(cells: list[dict[str, Any]], counts: list[dict[str, Any]]) -> str:
    """Return both tables."""
    lines = [f"LoRA, {BASE}; {date.today()}; one iteration after one of warm-up, one thread a process", ""]
    names = ("completion", "rows", "processes", "CPU s", "s", "tokens computed", "forwards", "peak memory (MB)")
    lines += ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for cell in cells:
        lines.append(
            f"| {cell['completion']} | {cell['rows']} | {cell['processes']} | {cell['cpu']:.2f} | {cell['wall']:.2f} "
            f"| {cell['tokens']:,.0f} | {cell['forwards']:.0f} | {cell['peak_bytes'] / 1e6:.0f} |"
        )
    if counts:
        lines += ["", "| steps | resident memory (MB) | Python objects | tensors |", "|---|---|---|---|"]
        lines += [f"| {c['step']} | {c['bytes'] / 1e6:.1f} | {c['objects']:,} | {c['tensors']} |" for c in counts]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--longest", type=int, default=512, help="tokens of the longest completion")
    parser.add_argument("--steps", type=int, default=300, help="steps of the long run; 0: none")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    cells = []
    for scenario in (cell for cell in CELLS if cell.completion <= args.longest):
        for processes in args.processes:
            cells.append(in_children(measure, scenario, processes, processes=processes))
            print(cells[-1], flush=True)
    counts = in_children(leaks, args.steps) if args.steps else []
    result = {"cells": cells, "counts": counts}
    (args.output / "growth.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = tables(cells, counts)
    (args.output / "growth.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
