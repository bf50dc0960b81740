"""Measure time and memory of one PPO iteration: this trainer, TRL's GRPO on the same batch, and TRL's last PPO.

    python benchmarks/ppo_iteration.py --output runs/benchmark
    python benchmarks/ppo_iteration.py --output runs/benchmark --trainers ours reward_critic
    pip install --no-deps --target build/trl-1.12 trl==1.12.0
    python benchmarks/ppo_iteration.py --output runs/benchmark --trl_1_12 build/trl-1.12

Every trainer is a process of its own with the same random weights, LoRA, prompts, completion lengths, epochs and
micro-batches. Each iteration uses all 32 prompts. The trainers take turns, one iteration each, and every round has
another order. So a busy machine slows all of them, and the ratios within a round are the result. Random weights do not
change the speed. A logits processor forces the lengths, so that all trainers get the same number of tokens. Writes
`<scenario>.json`, `.md` and `.png`.
"""

import argparse
import itertools
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager
from datetime import date
from pathlib import Path

TRAINERS = {
    "ours": "rlhf_recipes PPO",
    "padded": "rlhf_recipes PPO, not trimmed",
    "reward_critic": "rlhf_recipes PPO, critic: reward",
    "grpo": "TRL 1.16 GRPO",
    "trl_1_12": "TRL 1.12 PPO",
}
# hidden size, layers, heads, vocabulary, prompt and completion tokens, whether completions have a long tail
SCENARIOS = {
    "even": {"hidden": 512, "layers": 8, "heads": 8, "vocabulary": 8_192, "prompt": 32, "completion": 48},
    "long_tail": {
        "hidden": 512, "layers": 8, "heads": 8, "vocabulary": 8_192, "prompt": 32, "completion": 192, "tail": True,
    },
    "large_vocabulary": {
        "hidden": 256, "layers": 4, "heads": 4, "vocabulary": 32_768, "prompt": 32, "completion": 48,
    },
    "qwen2.5_0.5b": {
        "hidden": 896, "layers": 24, "heads": 14, "vocabulary": 151_936, "prompt": 128, "completion": 256,
        "tail": True,
    },
    "qwen2.5_1.5b": {
        "hidden": 1_536, "layers": 28, "heads": 12, "vocabulary": 151_936, "prompt": 128, "completion": 256,
        "tail": True,
    },
}  # fmt: skip
ROWS, MICRO_BATCH, EPOCHS = 32, 8, 4
FIRST_TOKEN = 10  # prompt i consists of the token 10 + i


def completion_lengths(scenario: dict) -> list[int]:
    """Return the length of each completion: the limit, or log-normal around an eighth of it with one at the limit."""
    import numpy as np

    limit = scenario["completion"]
    if not scenario.get("tail"):
        return [limit] * ROWS
    draws = np.random.default_rng(0).lognormal(np.log(limit / 8), 0.8, ROWS)
    return [limit, *np.clip(draws[1:].round(), 2, limit).astype(int).tolist()]


def build(scenario: dict, device: str) -> dict:
    """Return tokenizer, prompts, policy, classifier factory and the forced lengths."""
    import torch
    from datasets import Dataset
    from random_models import llama_config, word_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    shape = [scenario[name] for name in ("hidden", "layers", "heads", "vocabulary")]
    config = llama_config(*shape, max_position_embeddings=1_024, tie_word_embeddings=False)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    policy = LlamaForCausalLM(config).to(device, dtype)
    prompts = [" ".join([f"w{FIRST_TOKEN + i}"] * scenario["prompt"]) for i in range(ROWS)]
    force_lengths(policy, completion_lengths(scenario))

    def classifier() -> LlamaForSequenceClassification:
        torch.manual_seed(1)
        return LlamaForSequenceClassification(LlamaConfig(**{**config.to_dict(), "num_labels": 1})).to(device, dtype)

    return {
        "tokenizer": word_tokenizer(config.vocab_size),
        "policy": policy,
        "classifier": classifier,
        "dataset": Dataset.from_dict({"prompt": prompts}),
    }


def force_lengths(policy, lengths: list[int]) -> None:
    """Let `policy.generate` end the completion of prompt i after `lengths[i]` tokens, EOS included."""
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList

    limits = torch.tensor(lengths, device=policy.device)

    class Length(LogitsProcessor):
        def __init__(self, prompt_length: int) -> None:
            self.prompt_length = prompt_length

        def __call__(self, input_ids, scores):
            rows = input_ids[:, self.prompt_length - 1] - FIRST_TOKEN
            ends = input_ids.size(1) - self.prompt_length + 1 >= limits[rows]
            scores = scores.clone()
            scores[:, 1] = -torch.inf
            scores[ends] = -torch.inf
            scores[ends, 1] = 0
            return scores

    generate = policy.generate

    def with_lengths(*args, **kwargs):
        ids = kwargs.get("input_ids", args[0] if args else None)
        return generate(*args, logits_processor=LogitsProcessorList([Length(ids.size(1))]), **kwargs)

    policy.generate = with_lengths


class Clock:
    """Add up the seconds in named phases. Nested calls count in the innermost phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.stack: list[str] = []
        self.since = 0.0

    def lap(self) -> None:
        """Add the time since the last lap to the current phase."""
        synchronize()
        now = time.perf_counter()
        self.seconds[self.stack[-1] if self.stack else "update"] += now - self.since
        self.since = now

    @contextmanager
    def phase(self, name: str):
        """Time the block inside."""
        self.lap()
        self.stack.append(name)
        yield
        self.lap()
        self.stack.pop()

    def wrap(self, target, method: str, name) -> None:
        """Time a method; `name` may depend on its arguments."""
        original = getattr(target, method)

        def timed(*args, **kwargs):
            label = name(*args) if callable(name) else name
            if label is None:
                return original(*args, **kwargs)
            with self.phase(label):
                return original(*args, **kwargs)

        setattr(target, method, timed)


def synchronize() -> None:
    """Wait for the device."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def make_trainer(kind: str, scenario: dict, device: str, folder: str):
    """Return a trainer of the kind with an endless training, its clock, and its optimiser steps per iteration."""
    import torch
    from peft import LoraConfig

    parts = build(scenario, device)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    common = {
        "per_device_train_batch_size": MICRO_BATCH, "gradient_accumulation_steps": ROWS // MICRO_BATCH,
        "learning_rate": 1e-6, "report_to": [], "use_cpu": device == "cpu", "bf16": device != "cpu",
        "gradient_checkpointing": False, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 10**6,
    }  # fmt: skip
    clock = Clock()
    if kind == "trl_1_12":
        from trl.experimental.ppo import PPOConfig, PPOTrainer

        dataset = parts["dataset"].map(lambda row: {"input_ids": parts["tokenizer"](row["prompt"])["input_ids"]})
        args = PPOConfig(
            folder, **common, num_ppo_epochs=EPOCHS, num_mini_batches=1, total_episodes=10**6,
            response_length=scenario["completion"], local_rollout_forward_batch_size=MICRO_BATCH, stop_token="eos",
            temperature=1.0, num_sample_generations=0,
        )  # fmt: skip
        trainer = PPOTrainer(
            args, parts["tokenizer"], parts["policy"], None, parts["classifier"](),
            dataset.select_columns(["input_ids"]), parts["classifier"](), peft_config=lora,
        )  # fmt: skip
        return trainer, clock, 1
    common |= {
        "max_steps": 10**6, "steps_per_generation": ROWS // MICRO_BATCH, "num_iterations": EPOCHS,
        "max_completion_length": scenario["completion"],
    }  # fmt: skip
    model = parts["policy"]
    if kind in ("ours", "padded", "reward_critic"):
        from rlhf_recipes import PPOConfig, PPOTrainer
        from rlhf_recipes.models.forward import CompletionForward

        if kind == "padded":
            CompletionForward._columns = lambda self, attention_mask: (0, attention_mask.size(1))
        critic = "reward" if kind == "reward_critic" else "policy"

        trainer = PPOTrainer(
            model, parts["classifier"](), PPOConfig(folder, **common, critic=critic, response_separator=""),
            train_dataset=parts["dataset"], processing_class=parts["tokenizer"], peft_config=lora,
            reward_processing_classes=parts["tokenizer"],
        )  # fmt: skip
    else:
        from trl import GRPOConfig, GRPOTrainer

        args = GRPOConfig(folder, **common, num_generations=2, beta=0.01, scale_rewards="none")
        args.num_generations = 1  # GRPOConfig refuses it: a group of one learns nothing, but costs the same
        trainer = GRPOTrainer(
            model, parts["classifier"](), args,
            train_dataset=parts["dataset"], processing_class=parts["tokenizer"], peft_config=lora,
            reward_processing_classes=parts["tokenizer"],
        )  # fmt: skip
    passes = itertools.cycle(["policy forward", "reference forward"])

    def forward_phase(*args):
        return None if torch.is_grad_enabled() else next(passes)

    clock.wrap(trainer, "_generate", "generate")
    clock.wrap(trainer, "_calculate_rewards", "score")
    clock.wrap(trainer, "_get_per_token_logps_and_entropies", forward_phase)
    return trainer, clock, EPOCHS


def work(kind: str, scenario: dict, device: str) -> None:
    """Train. After each iteration, send its times to the driver and wait for the next `go`."""
    answers, sys.stdout = sys.stdout, sys.stderr
    import torch
    from transformers import TrainerCallback

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        trainer, clock, steps = make_trainer(kind, scenario, device, folder)

        class TakeTurns(TrainerCallback):
            def on_train_begin(self, args, state, control, **kwargs):
                self.wait()

            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step % steps == 0:
                    clock.lap()
                    used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
                    if device != "cpu":
                        used = torch.cuda.max_memory_allocated()
                    answers.write(json.dumps({"phases": dict(clock.seconds), "peak_bytes": used}) + "\n")
                    answers.flush()
                    self.wait()

            def wait(self):
                if sys.stdin.readline().strip() != "go":
                    os._exit(0)
                clock.seconds.clear()
                clock.since = time.perf_counter()

        trainer.add_callback(TakeTurns())
        answers.write("ready\n")
        answers.flush()
        trainer.train()


def measure(name: str, kinds: list[str], args: argparse.Namespace) -> list[dict]:
    """Let the trainers take turns for some rounds, after one round of warm-up."""
    workers = {}
    for kind in kinds:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
        if kind == "trl_1_12":
            environment["PYTHONPATH"] = str(Path(args.trl_1_12).resolve())
        command = [sys.executable, __file__, "--worker", kind, "--scenarios", name, "--device", args.device]
        workers[kind] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert workers[kind].stdout.readline() == "ready\n", f"{kind} did not start"
    rows = []
    for round_number in range(args.rounds + 1):
        first = round_number % len(kinds)
        for kind in kinds[first:] + kinds[:first]:
            worker = workers[kind]
            worker.stdin.write("go\n")
            worker.stdin.flush()
            answer = json.loads(worker.stdout.readline())
            if round_number:
                rows.append({"trainer": kind, "round": round_number, **answer})
                print(name, kind, round_number, f"{sum(answer['phases'].values()):.1f} s", flush=True)
    for worker in workers.values():
        worker.communicate("stop\n")
    return rows


def summarize(name: str, rows: list[dict], device: str) -> str:
    """Return a table: phases, seconds per iteration, peak memory, and the ratio to our time in the same round."""
    import numpy as np

    seconds = {(row["trainer"], row["round"]): sum(row["phases"].values()) for row in rows}
    rounds = sorted({row["round"] for row in rows})
    kinds = [kind for kind in TRAINERS if (kind, rounds[0]) in seconds]
    phases = ["generate", "score", "policy forward", "reference forward", "update"]
    lines = [
        f"{name}: {json.dumps(SCENARIOS[name])}, {ROWS} prompts, {EPOCHS} epochs, micro-batch {MICRO_BATCH}, "
        f"LoRA r 16; {len(rounds)} rounds; {date.today()}, {device_name(device)}",
        "",
        "| trainer | " + " | ".join(phases) + " | s/iteration | time / ours | peak memory (GB) |",
        "|---" * (len(phases) + 4) + "|",
    ]
    for kind in kinds:
        mine = [row for row in rows if row["trainer"] == kind]
        cells = [np.median([row["phases"].get(phase, 0.0) for row in mine]) for phase in phases]
        ratios = [seconds[kind, r] / seconds["ours", r] for r in rounds]
        texts = [f"{cell:.1f}" if cell else "" for cell in cells]
        if kind == "trl_1_12":
            texts = [""] * len(phases)  # one method does all phases
        total, peak = np.median([seconds[kind, r] for r in rounds]), max(row["peak_bytes"] for row in mine) / 1e9
        spread = f"{np.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        lines.append(f"| {TRAINERS[kind]} | " + " | ".join(texts) + f" | {total:.1f} | {spread} | {peak:.2f} |")
    return "\n".join(lines) + "\n"


def device_name(device: str) -> str:
    """Return the name of the GPU, or the cores and the processor type."""
    import torch

    return torch.cuda.get_device_name() if device != "cpu" else f"{os.cpu_count()} cores, {platform.machine()}"


def plot(rows: list[dict], path: Path) -> None:
    """Draw the phases of each trainer as stacked bars."""
    import pandas as pd
    from matplotlib.figure import Figure

    table = pd.DataFrame([{"trainer": TRAINERS[row["trainer"]], **row["phases"]} for row in rows])
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.subplots()
    order = [name for name in TRAINERS.values() if name in set(table["trainer"])]
    medians = table.groupby("trainer").median().reindex(order)
    medians.plot.barh(stacked=True, ax=axes, ylabel="", xlabel="seconds per iteration")
    axes.invert_yaxis()
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure every scenario and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=["even", "long_tail", "large_vocabulary"])
    parser.add_argument("--trl_1_12", help="directory with TRL 1.12.0, whose PPO is then measured too")
    parser.add_argument("--padded", action="store_true", help="also measure this trainer without trimming")
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS), help="default: all of them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--worker", choices=TRAINERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, SCENARIOS[args.scenarios[0]], args.device)
        return
    args.output.mkdir(parents=True, exist_ok=True)
    left_out = {"trl_1_12": not args.trl_1_12, "padded": not args.padded}
    kinds = [kind for kind in TRAINERS if kind in args.trainers and not left_out.get(kind)]
    for name in args.scenarios:
        rows = measure(name, kinds, args)
        (args.output / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        table = summarize(name, rows, args.device)
        (args.output / f"{name}.md").write_text(table, encoding="utf-8")
        plot(rows, args.output / f"{name}.png")
        print(table)


if __name__ == "__main__":
    main()
