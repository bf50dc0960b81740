"""A trainer of `ppo_iteration.py` in a process of its own. It runs one iteration for each word of the driver."""

import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any, TextIO

import torch
from ppo_iteration_trainers import TRL_1_12, Builder, Scenario
from profile_iteration import Profile
from random_models import folder_for_weights
from transformers import TrainerCallback


class Turns(TrainerCallback):
    """Send the figures of each iteration to the driver, and wait for its word before the next.

    Args:
        builder: Builder of the trainer.
        steps: Optimiser steps per iteration.
        answers: File that the driver reads.
        clean: Called before the process ends.
        shares_memory: Whether other trainers need the memory of the GPU between two iterations.
    """

    def __init__(
        self, builder: Builder, steps: int, answers: TextIO, clean: Callable[[], None], *, shares_memory: bool
    ) -> None:
        self.builder, self.steps, self.answers, self.clean = builder, steps, answers, clean
        self.shares_memory = shares_memory
        self.clock, self.profile = builder.clock, Profile(builder.device)
        self.memory_before = resident_peak()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait for the first word."""
        self.answers.write("ready\n")
        self.wait()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Answer and wait if the iteration is over."""
        if state.global_step % self.steps == 0:
            self.clock.lap()
            self.answers.write(json.dumps({**self.figures(), **self.profile.stop()}) + "\n")
            self.wait()

    def figures(self) -> dict[str, Any]:
        """Return the figures by phase, those of the update scaled to all epochs, and the peak memory."""
        phases, builder = self.clock.figures, self.builder
        for figure in ("wall", "cpu", "tokens", "forwards"):
            phases["update"][figure] *= builder.scenario.epochs / builder.epochs
        if self.clock.is_cuda:
            return {"phases": phases, "peak_bytes": max(figures["peak"] for figures in phases.values())}
        return {"phases": phases, "peak_bytes": resident_peak() - self.memory_before}

    def wait(self) -> None:
        """Wait for a word; any but three, and the end of the driver, end the process."""
        self.answers.flush()
        if self.clock.is_cuda and self.shares_memory:
            torch.cuda.empty_cache()
        word = sys.stdin.readline().strip()
        if word not in ("warm up", "go", "profile"):
            self.clean()
            os._exit(0)  # TRL 1.12 has no other way out of its `train`
        if word == "profile":
            self.profile.start()
        self.clock.reset()


def resident_peak() -> int:
    """Return the peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def work(kind: str, scenario: Scenario, device: str, threads: int, epochs: int | None, *, shares_memory: bool) -> None:
    """Train until the driver ends it.

    Args:
        kind: Trainer.
        scenario: Iteration.
        device: `cpu` or `cuda`.
        threads: Threads of this process.
        epochs: Number of epochs to run, instead of the scenario's.
        shares_memory: Whether other trainers need the memory of the GPU between two iterations.
    """
    answers, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(threads)
    folder = folder_for_weights(4 * (scenario.sizes.block_weights + 2 * scenario.sizes.embedding))
    with folder:
        builder = Builder(scenario, device, folder.name, epochs=epochs)
        steps = 1 if kind in TRL_1_12 else builder.epochs
        turns = Turns(builder, steps, answers, folder.cleanup, shares_memory=shares_memory)
        trainer = builder.build(kind)
        trainer.add_callback(turns)
        trainer.train()
