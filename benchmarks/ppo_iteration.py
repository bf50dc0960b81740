"""Measure one PPO iteration against its floor: this trainer, TRL's GRPO on the same batch, and TRL's last PPO.

    python benchmarks/ppo_iteration.py --output runs/benchmark
    python benchmarks/ppo_iteration.py --output runs/benchmark --trainers ours reward_critic
    pip install --no-deps --target build/trl-1.12 trl==1.12.0
    python benchmarks/ppo_iteration.py --output runs/benchmark --trl_1_12 build/trl-1.12
    python benchmarks/ppo_iteration.py --output runs/benchmark --device cuda --scenarios qwen2.5_0.5b --profile

Every trainer is a process of its own with the same random weights, LoRA, prompts, completion lengths, epochs and
micro-batches. The processes start side by side, and then take turns, one iteration each. Every round has another
order. So a busy machine slows all of them, and the ratios within a round are the result: of CPU seconds on a CPU, of
seconds on a GPU. Random weights do not change the speed. A logits processor forces the lengths, so that all trainers
get the same number of tokens. Writes `<scenario>.json` and `.md`; a scenario that has its file already is left out.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from floors import measure_machine
from ppo_iteration_report import report
from ppo_iteration_trainers import SCENARIOS, TRAINERS, TRL_1_12, Builder, Scenario
from profile_iteration import Profile
from random_models import folder_for_weights

OVERRIDES = ("rows", "micro_batch", "epochs", "prompt", "completion")


def scenario_of(args: argparse.Namespace, name: str) -> Scenario:
    """Return a scenario with the changes of the command line."""
    changes = {option: getattr(args, option) for option in OVERRIDES if getattr(args, option) is not None}
    switches = {option: True for option in ("quantize", "one_backbone") if getattr(args, option)}
    return replace(SCENARIOS[name], **changes, **switches)


def work(kind: str, scenario: Scenario, args: argparse.Namespace) -> None:
    """Train. After each iteration, send its figures to the driver and wait for the next word."""
    answers, sys.stdout = sys.stdout, sys.stderr
    import torch
    from transformers import TrainerCallback

    torch.set_num_threads(args.threads)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with folder_for_weights(4 * (scenario.sizes.block_weights + 2 * scenario.sizes.embedding)) as folder:
        builder = Builder(scenario, args.device, folder)
        trainer, clock = builder.build(kind), builder.clock
        steps = 1 if kind in TRL_1_12 else scenario.epochs
        profile = Profile(args.device)

        class TakeTurns(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                self.wait()

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step % steps == 0:
                    clock.lap()
                    self.answer()
                    self.wait()

            def answer(self) -> None:
                used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
                if clock.is_cuda:
                    used = max(figures["peak"] for figures in clock.figures.values())
                answers.write(json.dumps({"phases": clock.figures, "peak_bytes": used, **profile.stop()}) + "\n")
                answers.flush()

            def wait(self) -> None:
                if clock.is_cuda:
                    torch.cuda.empty_cache()  # another trainer needs the memory now
                word = sys.stdin.readline().strip()
                if word not in ("go", "profile"):
                    os._exit(0)
                if word == "profile":
                    profile.start()
                clock.reset()

        trainer.add_callback(TakeTurns())
        answers.write("ready\n")
        answers.flush()
        trainer.train()


class Worker:
    """A trainer in a process of its own."""

    def __init__(self, kind: str, name: str, args: argparse.Namespace) -> None:
        self.kind, self.log = kind, args.output / f"{name}.{kind}.log"
        threads = {"OMP_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "false"}
        quiet = {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
        paths = [str(Path(args.trl_1_12).resolve())] if kind in TRL_1_12 else []
        paths += filter(None, [os.environ.get("PYTHONPATH")])
        environment = {**os.environ, **threads, **quiet, "PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, *sys.argv, "--worker", kind, "--scenarios", name, "--threads", str(args.threads)]
        with self.log.open("w") as log:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
            self.process = subprocess.Popen(command, text=True, env=environment, **pipes)

    def read(self) -> str:
        """Return the next answer, or nothing if the process has ended."""
        answer = self.process.stdout.readline()
        if not answer:
            tail = "".join(self.log.read_text(errors="replace").splitlines(keepends=True)[-15:])
            print(f"{self.kind} has ended:\n{tail}", flush=True)
        return answer

    def ask(self, word: str) -> dict[str, Any] | None:
        """Let it run one iteration and return its figures, or None if the process has ended."""
        if self.process.poll() is None:
            self.process.stdin.write(f"{word}\n")
            self.process.stdin.flush()
        return json.loads(self.read() or "null")

    def stop(self) -> None:
        """End the process and, if all went well, remove its log."""
        if self.process.poll() is None:
            self.process.communicate("stop\n")
        if self.process.wait() == 0:
            self.log.unlink()


def measure(name: str, kinds: list[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Let the trainers take turns for some rounds, after rounds of warm-up."""
    workers = {kind: Worker(kind, name, args) for kind in kinds}
    alive = [kind for kind in kinds if workers[kind].read()]
    words = ["go"] * (args.warm_up + args.rounds) + ["profile"] * args.profile
    rows = []
    for turn, word in enumerate(words):
        first = turn % max(len(alive), 1)
        for kind in alive[first:] + alive[:first]:
            answer = workers[kind].ask(word)
            if answer is None:
                alive = [other for other in alive if other != kind]
                continue
            wall = sum(figures["wall"] for figures in answer["phases"].values())
            print(name, kind, word, turn, f"{wall:.1f} s", flush=True)
            if turn >= args.warm_up:
                rows.append({"trainer": kind, "round": turn, "profiled": word == "profile", **answer})
    for worker in workers.values():
        worker.stop()
    return rows


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=["even", "long_tail", "large_vocabulary"])
    parser.add_argument("--trl_1_12", help="directory with TRL 1.12.0, whose PPO is then measured too")
    default = [kind for kind in TRAINERS if kind not in ("padded", "reward_critic")]
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=default)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm_up", type=int, default=1, help="iterations before the first that counts")
    parser.add_argument("--profile", action="store_true", help="profile one more iteration of each trainer")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="threads of a trainer; default: 1 on a CPU, 8 beside a GPU")
    for option in OVERRIDES:
        parser.add_argument(f"--{option}", type=int, help="instead of the scenario's")
    parser.add_argument("--quantize", action="store_true", help="put the policy's base into 4 bit")
    parser.add_argument("--one_backbone", action="store_true", help="our reward model: an adapter on that base")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--worker", choices=TRAINERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.threads = args.threads or (1 if args.device == "cpu" else 8)
    return args


def main() -> None:
    """Measure every scenario and write the results."""
    args = parse()
    if args.worker:
        work(args.worker, scenario_of(args, args.scenarios[0]), args)
        return
    args.output.mkdir(parents=True, exist_ok=True)
    kinds = [kind for kind in args.trainers if args.trl_1_12 or kind not in TRL_1_12]
    for name in args.scenarios:
        path = args.output / f"{name}.json"
        if path.exists():
            print(f"{name}: {path} exists")
            continue
        scenario = scenario_of(args, name)
        machine = measure_machine(scenario, args.device, args.threads)
        rows = measure(name, kinds, args)
        result = {"scenario": {"name": name, **asdict(scenario)}, "machine": asdict(machine), "rows": rows}
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        text = report(result)
        path.with_suffix(".md").write_text(text, encoding="utf-8")
        print(text, flush=True)


if __name__ == "__main__":
    main()
