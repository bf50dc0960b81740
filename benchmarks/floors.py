"""The least time that an iteration can take on this machine.

Floor = FLOP / peak; while decoding, the larger of that and bytes / bandwidth. FLOP are those of useful products:
tokens of prompts and completions without padding, causal attention, the LM head on completions only. A frozen weight
costs 2 FLOP per token forward and 2 for the gradient of its input. A trained weight costs 2 more for its own gradient.
"""

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from ppo_iteration_trainers import RANK, TRL_1_12, Scenario


@dataclass(frozen=True)
class Machine:
    """Measured peaks. On a CPU a second is one of process CPU time.

    Args:
        square: FLOP/s of products of large square matrices.
        own: FLOP/s of a micro-batch with one weight of the MLP.
        bandwidth: Bytes per second, read and written.
    """

    name: str
    unit: str
    square: float
    own: float
    bandwidth: float

    @property
    def peak(self) -> float:
        """Return the larger rate of products."""
        return max(self.square, self.own)


@dataclass(frozen=True)
class Work:
    """Needed work of one phase.

    Args:
        tokens: Tokens that must pass a backbone, counted once for each backbone.
        flop: FLOP that large products can do.
        decode_flop: FLOP of one token per row at a time.
        decode_bytes: Weights and KV cache, read once per decoding step.
    """

    tokens: int
    flop: float
    decode_flop: float = 0.0
    decode_bytes: float = 0.0

    def floor(self, machine: Machine) -> float:
        """Return the least number of seconds."""
        decoding = max(self.decode_flop / machine.peak, self.decode_bytes / machine.bandwidth)
        return self.flop / machine.peak + decoding


def needed_work(scenario: Scenario, kind: str, bytes_per_number: int) -> dict[str, Work]:
    """Return the needed work by phase of a kind of trainer."""
    shape, lengths = scenario.sizes, scenario.lengths
    body, adapter = shape.block_weights, shape.adapter_weights(RANK)
    sampled, tokens = sum(lengths), sum(lengths) + scenario.prompt * scenario.rows
    attention = sum(2 * (scenario.prompt + n) ** 2 for n in lengths) * shape.hidden * shape.layers
    head = shape.embedding * sampled
    forward = 2 * (body + adapter) * tokens + attention
    critic = {"trl_1_12_lora": 4 * body + 6 * adapter}.get(kind, 6 * body)
    update = (4 * body + 6 * adapter) * tokens + 3 * attention + 4 * head
    backbones = 1
    plain = Work(tokens, 2 * body * tokens + attention)
    policy = Work(tokens, forward + 2 * head)
    if kind in TRL_1_12:  # its log-probabilities come from sampling, and its critic is a second model
        update, backbones, policy = update + critic * tokens + 3 * attention, 2, plain
    return {
        "generate": _generation(scenario, bytes_per_number),
        "score": plain,
        "policy forward": policy,
        "reference forward": replace(plain, flop=plain.flop + 2 * head),
        "update": Work(backbones * scenario.epochs * tokens, scenario.epochs * update),
    }


def _generation(scenario: Scenario, bytes_per_number: int) -> Work:
    """Return the work of sampling: all prompts at once, then one step per token of the longest completion."""
    shape, lengths, rows = scenario.sizes, scenario.lengths, scenario.rows
    weights = shape.block_weights + shape.adapter_weights(RANK)
    square = 2 * shape.hidden * shape.layers
    before = rows * (2 * weights * scenario.prompt + square * scenario.prompt**2 + 2 * shape.embedding)
    steps = [n - 1 for n in lengths]
    seen = sum(n * scenario.prompt + n * (n + 1) // 2 for n in steps)  # cached tokens that the steps read
    decoded = 2 * (weights + shape.embedding) * sum(steps) + 2 * square * seen
    cache = 2 * shape.kv_width * shape.layers * bytes_per_number * seen
    block_bytes = 0.5 if scenario.quantize else bytes_per_number
    read = shape.block_weights * block_bytes + shape.embedding * bytes_per_number
    return Work(rows * scenario.prompt + sum(steps), before, decoded, max(steps) * read + cache)


def measure_machine(scenario: Scenario, device: str, threads: int) -> Machine:
    """Return the peaks of this machine with this number of threads."""
    is_cuda = device != "cpu"
    before, dtype = torch.get_num_threads(), torch.bfloat16 if is_cuda else torch.float32
    torch.set_num_threads(threads)
    n, shape = 8_192 if is_cuda else 1_024, scenario.sizes
    columns = scenario.prompt + sum(scenario.lengths) // scenario.rows
    rates = [
        _flop_per_second(*sizes, device, dtype)
        for sizes in ((n, n, n), (scenario.micro_batch * columns, shape.hidden, shape.mlp))
    ]
    bandwidth = measured_bandwidth(device)
    torch.set_num_threads(before)
    if is_cuda:
        torch.cuda.empty_cache()  # the trainers need the memory
        name = f"{torch.cuda.get_device_name()}, bfloat16"
    else:
        name = f"{os.cpu_count()} cores, {platform.machine()}, float32, {threads} thread(s)"
    return Machine(name, "wall" if is_cuda else "cpu", *rates, bandwidth)


def measured_bandwidth(device: str) -> float:
    """Return the bytes per second of a copy, read and written, or of a product with a vector, the larger."""
    is_cuda = device != "cpu"
    dtype = torch.bfloat16 if is_cuda else torch.float32
    source = torch.zeros(2**29 if is_cuda else 2**26, device=device, dtype=dtype)
    target = torch.empty_like(source)
    size = source.numel() * source.element_size()
    matrix, vector = source.view(-1, 4_096), source[:4_096]
    copied = 2 * size / _seconds(lambda: target.copy_(source), is_cuda)
    return max(copied, size / _seconds(lambda: matrix @ vector, is_cuda))


def _flop_per_second(rows: int, inner: int, columns: int, device: str, dtype: torch.dtype) -> float:
    left, right = torch.randn(rows, inner, device=device), torch.randn(inner, columns, device=device)
    left, right = left.to(dtype), right.to(dtype)
    return 2 * rows * inner * columns / _seconds(lambda: left @ right, device != "cpu")


def _seconds(call: Callable[[], object], is_cuda: bool) -> float:
    """Return the least time of one call: wall time on a GPU, CPU time of the process on a CPU."""
    clock = time.perf_counter if is_cuda else time.process_time
    call()
    times, repeats = [], 20 if is_cuda else 3
    for _ in range(8):
        if is_cuda:
            torch.cuda.synchronize()
        start = clock()
        for _ in range(repeats):
            call()
        if is_cuda:
            torch.cuda.synchronize()
        times.append((clock() - start) / repeats)
    return min(times)
