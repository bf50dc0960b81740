r"""Measure the peak memory of one PPO iteration in four set-ups, from full models to one 4-bit backbone.

    python benchmarks/memory.py --output runs/benchmark
    python benchmarks/memory.py --sizes smollm2_135m qwen2.5_0.5b --device cuda
    python benchmarks/memory.py --device cuda --sizes llama3.1_8b --computed --setups one_backbone_4bit \
        --rows 16 256 --prompt 256 --completion 128 --checkpointing

Every set-up is a process of its own with random weights of the given shape. The result is the process's peak memory
minus the memory after the imports (on a GPU: the peak of the allocator, of each phase too). Sizes of `--computed` do
not run: their weights, gradients and Adam states are added up, without activations. Writes `memory.json` and
`memory.md`.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from phases import PHASES, Clock, watch
from random_models import (
    SHAPES,
    Shape,
    folder_for_weights,
    four_bit,
    write_base,
    write_reward_adapter,
    write_reward_model,
)

from rlhf_recipes import PPOConfig, PPOTrainer

SETUPS = {
    "full": "full fine-tuning: policy, reference, reward model",
    "lora": "LoRA, reward model beside it",
    "one_backbone": "LoRA, reward adapter on one backbone",
    "one_backbone_4bit": "4-bit LoRA, reward adapter on one backbone",
}
RANK = 16


def precision(device: str) -> torch.dtype:
    """Return the precision of the weights."""
    return torch.float32 if device == "cpu" else torch.bfloat16


def size_in_bytes(shape: Shape, device: str) -> int:
    """Return the size of one model on the disk."""
    return (shape.block_weights + 2 * shape.embedding) * (4 if device == "cpu" else 2)


def write_models(folder: str, setup: str, size: str, device: str) -> None:
    """Write a random policy and a reward model, which is a whole model or an adapter on the policy's base."""
    torch.set_num_threads(1)
    config, dtype = SHAPES[size].config(), precision(device)
    base, rm = f"{folder}/base", f"{folder}/rm"
    write_base(config, base, device, dtype)
    if setup == "full":
        write_reward_model(config, rm, device, dtype)
    else:
        write_reward_adapter(config, rm, base, RANK, device, dtype, quantized=setup == "one_backbone_4bit")


def make_trainer(folder: str, setup: str, rows: int, args: argparse.Namespace) -> Any:
    """Return a trainer of one iteration of one epoch, whose completions are all as long as allowed."""
    dtype, is_cpu = precision(args.device), args.device == "cpu"
    base, rm, adapter = f"{folder}/base", f"{folder}/rm", setup.startswith("one_backbone")
    options = PPOConfig(
        f"{folder}/out", per_device_train_batch_size=args.micro_batch, num_iterations=1, max_steps=1,
        gradient_accumulation_steps=rows // args.micro_batch, steps_per_generation=rows // args.micro_batch,
        max_completion_length=args.completion, generation_kwargs={"min_new_tokens": args.completion},
        report_to=[], save_strategy="no", use_cpu=is_cpu, bf16=not is_cpu, gradient_checkpointing=args.checkpointing,
        disable_tqdm=True, response_separator="", reward_adapter=rm if adapter else None, check_numerics=False,
        optim="adamw_torch" if is_cpu or setup != "one_backbone_4bit" else "paged_adamw_8bit", logging_steps=10**6,
        model_init_kwargs={"dtype": str(dtype).removeprefix("torch.")},
    )  # fmt: skip
    return PPOTrainer(
        base, None if adapter else rm, options,
        train_dataset=Dataset.from_dict({"prompt": ["w5 " * args.prompt] * rows}),
        peft_config=None if setup == "full" else LoraConfig(r=RANK, target_modules="all-linear"),
        quantization_config=four_bit(dtype) if setup == "one_backbone_4bit" else None,
    )  # fmt: skip


def work(folder: str, setup: str, rows: int, args: argparse.Namespace) -> None:
    """Run one iteration; write its peak, and on a GPU those of its phases, to standard output."""
    answers, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(1)  # memory does not depend on it, and threads wait for one another on a busy machine
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    trainer = make_trainer(folder, setup, rows, args)
    loaded = torch.cuda.max_memory_allocated() if args.device != "cpu" else 0
    clock, loading = Clock(args.device), time.perf_counter() - start
    watch(trainer, clock)
    clock.reset()
    trainer.train()
    clock.lap()
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    facts = {"seconds": {"load": loading, **{name: clock.figures[name]["wall"] for name in PHASES}}}
    if args.device != "cpu":
        peaks = {"load": loaded, **{name: clock.figures[name]["peak"] for name in PHASES}}
        peak, facts["peaks_gb"] = max(peaks.values()), {name: size / 1e9 for name, size in peaks.items()}
    answers.write(json.dumps({"peak_gb": peak / 1e9, "computed": False, **facts}) + "\n")


def compute(setup: str, size: str, bytes_per_weight: int) -> float:
    """Add up weights, gradients and Adam's states of one size, without activations, in GB."""
    shape = SHAPES[size]
    embeddings = shape.embedding * (1 if shape.tied else 2)
    adapter, head = shape.adapter_weights(RANK), shape.hidden * shape.hidden
    learns = (shape.block_weights + embeddings if setup == "full" else adapter) + head
    models = {"full": 3, "lora": 2, "one_backbone": 1, "one_backbone_4bit": 1}[setup]
    block_bytes = 0.5 + 4 / 64 / 8 if setup == "one_backbone_4bit" else bytes_per_weight
    adapters = {"full": 0, "lora": 1}.get(setup, 2)  # with one backbone, the reward model is an adapter too
    weights = models * (shape.block_weights * block_bytes + embeddings * bytes_per_weight) + adapters * adapter * 4
    return (weights + learns * (4 + 8)) / 1e9


def measure(size: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the set-ups of one size, each in a process of its own; another process writes their weights."""
    found, shape = [], SHAPES[size]
    for setup in args.setups:
        with folder_for_weights(2 * size_in_bytes(shape, args.device)) as folder:  # a policy and a reward model
            command = [sys.executable, *sys.argv, "--sizes", size, "--setups", setup, "--folder", folder]
            subprocess.run([*command, "--write"], check=True, stdout=subprocess.DEVNULL)
            for rows in args.rows:
                done = subprocess.run(
                    [*command, "--work", "--rows", str(rows)], check=True, stdout=subprocess.PIPE, text=True
                )
                found.append({"setup": setup, "size": size, "rows": rows, **json.loads(done.stdout)})
                print(found[-1], flush=True)
    return found


def table(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """Return the peaks by set-up and size, and those of phases."""
    columns = list(dict.fromkeys((row["size"], row["rows"]) for row in rows))
    titles = [f"{size}, {n} rows" if n else f"{size} (computed, bfloat16)" for size, n in columns]
    found = {(row["setup"], row["size"], row["rows"]): row for row in rows}
    lines = [
        f"Peak memory, GB; prompts of {args.prompt}, completions of {args.completion} tokens, micro-batch "
        f"{args.micro_batch}; {date.today()}, {args.device}",
        "",
        "| set-up | " + " | ".join(titles) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for setup in args.setups:
        cells = [f"{found[setup, *column]['peak_gb']:.2f}" for column in columns]
        lines.append(f"| {SETUPS[setup]} | " + " | ".join(cells) + " |")
    if any("peaks_gb" in row for row in rows):
        names = ("load", *PHASES)
        lines += ["", "| set-up | size | rows | " + " | ".join(names) + " |", "|---" * (len(names) + 3) + "|"]
        for row in rows:
            if "peaks_gb" in row:
                cells = [f"{row['peaks_gb'][name]:.2f} GB, {row['seconds'][name]:.1f} s" for name in names]
                lines.append(f"| {row['setup']} | {row['size']} | {row['rows']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", choices=SHAPES, default=["tiny", "smollm2_135m"])
    parser.add_argument("--computed", nargs="*", choices=SHAPES, default=["qwen2.5_1.5b", "llama3.1_8b"])
    parser.add_argument("--setups", nargs="+", choices=SETUPS, default=list(SETUPS))
    parser.add_argument("--rows", nargs="+", type=int, default=[8], help="completions of the rollout")
    parser.add_argument("--micro_batch", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--completion", type=int, default=32, help="tokens of a completion")
    parser.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing")
    parser.add_argument("--device", default="cpu", help="cpu (float32) or cuda (bfloat16)")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"))
    for name in ("write", "work"):
        parser.add_argument(f"--{name}", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure, compute and write the table."""
    args = parse()
    if args.write:
        write_models(args.folder, args.setups[0], args.sizes[0], args.device)
        return
    if args.work:
        work(args.folder, args.setups[0], args.rows[0], args)
        return
    args.output.mkdir(parents=True, exist_ok=True)
    rows = [row for size in args.sizes for row in measure(size, args)]
    rows += [
        {"setup": setup, "size": size, "rows": None, "peak_gb": compute(setup, size, 2), "computed": True}
        for size in args.computed
        for setup in args.setups
    ]
    (args.output / "memory.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    text = table(rows, args)
    (args.output / "memory.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
