"""Hyper-parameters of a new project: chosen from the size of the model and the hardware."""

import json
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path

from rlhf_recipes.options.learning_rates import SMALL, TINY

# The default model of each kind of hardware: as large as its memory takes.
HARDWARE = {
    "cpu": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "gpu": "Qwen/Qwen2.5-0.5B-Instruct",
    "gpu-4bit": "Qwen/Qwen2.5-7B-Instruct",
    "multi-gpu": "Qwen/Qwen2.5-1.5B-Instruct",
}
PROCESSES = 8  # of `accelerate_configs/multi_gpu.yaml`
MEDIUM = 3e9  # parameters
UNKNOWN = 1.5e9


@dataclass(frozen=True)
class Plan:
    """Hold what the templates of a project read.

    Args:
        model: Path or name of the model to start from.
        size: Number of its parameters.
        is_known: Whether that is its real size.
    """

    name: str
    model: str
    hardware: str
    size: float
    is_known: bool

    @property
    def on_cpu(self) -> bool:
        """Return whether the project trains on the CPU."""
        return self.hardware == "cpu"

    @property
    def four_bit(self) -> bool:
        """Return whether the base has 4-bit weights."""
        return self.hardware == "gpu-4bit"

    @property
    def processes(self) -> int:
        """Return the number of processes of a training."""
        return PROCESSES if self.hardware == "multi-gpu" else 1

    @property
    def launch(self) -> str:
        """Return the options of the launcher, with a space after them."""
        return "--config_file multi_gpu " if self.processes > 1 else ""

    @property
    def tiny(self) -> bool:
        """Return whether the model is so small that it learns with large steps only."""
        return self.size <= TINY

    @property
    def lora(self) -> bool:
        """Return whether an adapter is trained. Full training needs 16 bytes per parameter, and two frozen copies."""
        return self.four_bit or self.size > (TINY if self.on_cpu else SMALL)

    @property
    def rows(self) -> int:
        """Return the rows of SFT and reward modelling on a device at the same time."""
        return 4 if self.on_cpu or self.size <= MEDIUM else 2

    @property
    def accumulation(self) -> int:
        """Return the micro-batches of a step: a step has 64 rows, or 16 on a CPU."""
        return max((16 if self.on_cpu else 64) // (self.rows * self.processes), 1)

    @property
    def rollout(self) -> int:
        """Return the completions of a rollout."""
        return 32 if self.on_cpu else 256

    @property
    def completions(self) -> int:
        """Return the completions on a device at the same time."""
        if self.on_cpu:
            return 4
        return 2 if self.size > MEDIUM else 8 if self.lora or self.processes > 1 else 16

    @property
    def rollout_batches(self) -> int:
        """Return `steps_per_generation`."""
        return self.rollout // (self.completions * self.processes)

    @property
    def mini_batches(self) -> int:
        """Return the optimiser steps of an epoch over a rollout."""
        return 2 if self.on_cpu else 4

    @property
    def size_text(self) -> str:
        """Return the size in words."""
        text = f"{self.size / 1e9:.1f} billion" if self.size >= 1e9 else f"{self.size / 1e6:.3g} million"
        return f"{text} parameters" if self.is_known else f"unknown size, taken as {text} parameters"


def plan(name: str, model: str, hardware: str) -> Plan:
    """Return the plan of a project."""
    size = size_of(model)
    return Plan(name, model, hardware, size or UNKNOWN, size is not None)


def size_of(model: str) -> float | None:
    """Return the number of parameters of a local model, or that of its name, as in `Qwen2.5-0.5B`; else `None`."""
    files = [*Path(model).expanduser().glob("*.safetensors")]
    if files:
        return sum(map(_parameters, files))
    named = re.findall(r"(?<![\d.a-zA-Z])(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", Path(model).name.lower())
    return float(named[-1][0]) * {"b": 1e9, "m": 1e6}[named[-1][1]] if named else None


def _parameters(file: Path) -> int:
    """Count by the header of a file of safetensors: its length in 8 bytes, and JSON."""
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return sum(prod(tensor["shape"]) for key, tensor in header.items() if key != "__metadata__")
