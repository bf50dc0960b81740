"""Measure the peak memory of one PPO iteration in four set-ups, from full models to one 4-bit backbone.

    python benchmarks/memory.py --output runs/benchmark
    python benchmarks/memory.py --sizes smollm2_135m qwen2.5_0.5b --device cuda

Every set-up is a process of its own with random weights of the given shape. The result is the process's peak memory
minus the memory after the imports (on a GPU: the peak of the allocator). Sizes of `--computed` do not run: their
weights, gradients and Adam states are added up, without activations. Writes `memory.json` and `memory.md`.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

SETUPS = {
    "full": "full fine-tuning: policy, reference, reward model",
    "lora": "LoRA, reward model beside it",
    "one_backbone": "LoRA, reward adapter on one backbone",
    "one_backbone_4bit": "4-bit LoRA, reward adapter on one backbone",
}
# hidden size, layers, heads, vocabulary
SIZES = {
    "tiny": (256, 4, 4, 4_096),
    "smollm2_135m": (576, 30, 9, 49_152),
    "qwen2.5_0.5b": (896, 24, 14, 151_936),
    "qwen2.5_1.5b": (1_536, 28, 12, 151_936),
    "llama3.1_8b": (4_096, 32, 32, 128_256),
}
RANK = 16


def write_models(setup: str, size: str, dtype: str, bits, base: str, rm: str) -> None:
    """Write a random policy and a reward model, which is a whole model or an adapter on the policy's base."""
    import torch
    from peft import LoraConfig, get_peft_model
    from random_models import llama_config, word_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    from rlhf_recipes.models.quantization import save_quantization

    torch.set_num_threads(1)
    config = llama_config(*SIZES[size], tie_word_embeddings=True)
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(base)
    classifier = LlamaForSequenceClassification(LlamaConfig(**{**config.to_dict(), "num_labels": 1}))
    if setup == "full":
        classifier.to(getattr(torch, dtype)).save_pretrained(rm)
    else:
        classifier.name_or_path = base
        adapter = get_peft_model(classifier, LoraConfig(r=RANK, target_modules="all-linear", task_type="SEQ_CLS"))
        adapter.save_pretrained(rm)
        if setup == "one_backbone_4bit":
            adapter.config.quantization_config = bits
            save_quantization(adapter, rm)
    for directory in (base, rm):
        word_tokenizer(config.vocab_size).save_pretrained(directory)


def work(setup: str, size: str, device: str) -> None:
    """Run one iteration; write its peak to standard output."""
    answers, sys.stdout = sys.stdout, sys.stderr
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

    from rlhf_recipes import PPOConfig, PPOTrainer

    dtype = "float32" if device == "cpu" else "bfloat16"
    bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        base, rm = f"{folder}/base", f"{folder}/rm"
        if os.fork() == 0:  # the memory of a process of its own does not count here
            write_models(setup, size, dtype, bits, base, rm)
            os._exit(0)
        os.wait()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        adapter = setup.startswith("one_backbone")
        trainer = PPOTrainer(
            base,
            None if adapter else rm,
            PPOConfig(
                f"{folder}/out", per_device_train_batch_size=2, gradient_accumulation_steps=4, num_iterations=1,
                steps_per_generation=4, max_completion_length=32, max_steps=1, report_to=[], save_strategy="no",
                use_cpu=device == "cpu", bf16=device != "cpu", gradient_checkpointing=False, disable_tqdm=True,
                response_separator="", reward_adapter=rm if adapter else None, model_init_kwargs={"dtype": dtype},
            ),
            train_dataset=Dataset.from_dict({"prompt": ["w5 " * 32] * 8}),
            peft_config=None if setup == "full" else LoraConfig(r=RANK, target_modules="all-linear"),
            quantization_config=bits if setup == "one_backbone_4bit" else None,
        )  # fmt: skip
        trainer.train()
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if device != "cpu":
        peak = torch.cuda.max_memory_allocated()
    answers.write(json.dumps({"setup": setup, "size": size, "peak_gb": peak / 1e9, "computed": False}) + "\n")


def compute(setup: str, size: str, bytes_per_weight: int) -> dict:
    """Add up weights, gradients and Adam's states of one size, without activations."""
    hidden, layers, _, vocabulary = SIZES[size]
    projections = layers * (4 * hidden * hidden + 3 * hidden * (hidden * 8 // 3))
    embedding = vocabulary * hidden
    adapter = layers * RANK * (4 * 2 * hidden + 3 * (hidden + hidden * 8 // 3))
    head = hidden * hidden
    learns = (projections + embedding if setup == "full" else adapter) + head
    models = {"full": 3, "lora": 2, "one_backbone": 1, "one_backbone_4bit": 1}[setup]
    projection_bytes = 0.5 + 4 / 64 / 8 if setup == "one_backbone_4bit" else bytes_per_weight
    weights = models * (projections * projection_bytes + embedding * bytes_per_weight) + 2 * adapter * 4
    return {"setup": setup, "size": size, "peak_gb": (weights + learns * (4 + 8)) / 1e9, "computed": True}


def main() -> None:
    """Measure, compute and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=["tiny", "smollm2_135m"])
    parser.add_argument("--computed", nargs="*", choices=SIZES, default=["qwen2.5_1.5b", "llama3.1_8b"])
    parser.add_argument("--device", default="cpu", help="cpu (float32) or cuda (bfloat16)")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--worker", choices=SETUPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.sizes[0], args.device)
        return
    args.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for size in args.sizes:
        for setup in SETUPS:
            command = [sys.executable, __file__, "--worker", setup, "--sizes", size, "--device", args.device]
            rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
            print(rows[-1], flush=True)
    rows += [compute(setup, size, 2) for size in args.computed for setup in SETUPS]
    (args.output / "memory.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    sizes = [*args.sizes, *args.computed]
    found = {(row["setup"], row["size"]): row for row in rows}
    titles = [f"{size} (computed, bfloat16)" if size in args.computed else size for size in sizes]
    lines = [f"Peak memory, GB; {date.today()}, {args.device}", "", "| set-up | " + " | ".join(titles) + " |"]
    lines.append("|---" * (len(sizes) + 1) + "|")
    for setup, title in SETUPS.items():
        lines.append(f"| {title} | " + " | ".join(f"{found[setup, size]['peak_gb']:.2f}" for size in sizes) + " |")
    (args.output / "memory.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
