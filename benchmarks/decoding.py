"""Time one step of sampling in several ways, beside the floor of the memory's bandwidth.

    python benchmarks/decoding.py --device cuda
    python benchmarks/decoding.py --device cuda --compile
    python benchmarks/decoding.py --shape tiny --rows 4

The models have random weights: in bfloat16 with LoRA of rank 16 on all linear layers, and in float32 without. A step
computes one token of each row. The forward of the prompt is left out: (time of `--tokens` - time of 4) / (`--tokens`
- 4). `busy_ms` is the time of the GPU's kernels in a step. The floor is the time to read all weights, keys and values
once, in bfloat16. Prints one JSON line per way.
"""

import argparse
import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from floors import measured_bandwidth
from peft import LoraConfig, get_peft_model
from random_models import SHAPES, Shape, random_model
from transformers import GenerationConfig

FEW = 4  # tokens of the shorter of two calls


def autocast(device: str) -> Any:
    """Return the precision of a run with `bf16: true`."""
    return torch.autocast(device, torch.bfloat16)


def with_adapter(model: Any) -> Any:
    """Add an adapter with float32 weights, as in training."""
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.01)
    return model


@contextlib.contextmanager
def merged(model: Any) -> Iterator[None]:
    """Add the adapter to the weights inside."""
    model.merge_adapter()
    try:
        yield
    finally:
        model.unmerge_adapter()


@contextlib.contextmanager
def autocast_at_each_step(model: Any, device: str) -> Iterator[None]:
    """Enter autocast in each forward, as accelerate does, so that it casts the weights each time."""
    inner = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with autocast(device):
            return inner(*args, **kwargs)

    model.forward = functools.update_wrapper(forward, inner)
    try:
        yield
    finally:
        model.forward = inner


def seconds(call: Callable[[], Any], device: str) -> float:
    """Return the time of a call, with the work that it leaves to a GPU."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def measure(model: Any, args: argparse.Namespace, rows: int, **settings: Any) -> dict[str, float | None]:
    """Return the time of one step, that of its kernels on a GPU, and that of the first call."""
    ids = torch.randint(2, model.config.vocab_size, (rows, args.prompt), device=args.device)
    rest = {"do_sample": True, "top_k": 0, "pad_token_id": 0, "eos_token_id": None, "disable_compile": True}

    def sample(tokens: int) -> None:
        config = GenerationConfig(**{**rest, **settings}, max_new_tokens=tokens, min_new_tokens=tokens)
        with torch.no_grad():
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)

    calls = {n: functools.partial(sample, n) for n in (FEW, args.tokens)}
    first, few, whole = (seconds(calls[n], args.device) for n in (args.tokens, FEW, args.tokens))
    per_step = 1e3 / (args.tokens - FEW)
    busy = [kernel_seconds(call) for call in calls.values()] if args.device == "cuda" else None
    return {
        "ms_per_step": round(per_step * (whole - few), 2),
        "busy_ms": round(per_step * (busy[1] - busy[0]), 2) if busy else None,
        "first_call_s": round(first, 1),
    }


def kernel_seconds(call: Callable[[], Any]) -> float:
    """Return the time of a GPU's kernels in a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6


def floor(shape: Shape, args: argparse.Namespace, rows: int, bandwidth: float) -> float:
    """Return the time to read the weights, and the keys and values of half of the new tokens, in bfloat16."""
    cache = rows * (args.prompt + args.tokens / 2) * 2 * shape.layers * shape.kv_width
    return 2 * (shape.block_weights + shape.embedding + cache) / bandwidth


def main() -> None:
    """Time each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5_0.5b")
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens")
    parser.add_argument("--compile", action="store_true", help="also compile a step, which takes about a minute")
    args = parser.parse_args()
    bandwidth, shape = measured_bandwidth(args.device), SHAPES[args.shape]
    precision, static = functools.partial(autocast, args.device), {"cache_implementation": "static"}
    compiled = {**static, "disable_compile": False}
    for full in (False, True):
        model = random_model(shape.config(), args.device, torch.float32 if full else torch.bfloat16).eval()
        ways: list[tuple[str, Callable[[], Any], dict[str, Any]]]
        if full:
            each = functools.partial(autocast_at_each_step, model, args.device)
            ways = [("float32, autocast at each step", each, {}), ("float32, autocast around all", precision, {})]
        else:
            model = with_adapter(model)
            ways = [
                ("without LoRA", model.disable_adapter, {}),
                ("without LoRA, static cache", model.disable_adapter, static),
                ("LoRA in float32", contextlib.nullcontext, {}),
                ("LoRA under autocast", precision, {}),
                ("LoRA merged", functools.partial(merged, model), {}),
            ]
        if args.compile and not full:
            ways.append(("LoRA under autocast, static cache, compiled", precision, compiled))
            ways.append(("without LoRA, static cache, compiled", model.disable_adapter, compiled))
        for rows in args.rows:
            least = round(1e3 * floor(shape, args, rows, bandwidth), 2)
            for way, context, settings in ways:
                with context():
                    figures = measure(model, args, rows, **settings)
                print(json.dumps({"way": way, "rows": rows, **figures, "floor_ms": least}), flush=True)


if __name__ == "__main__":
    main()
