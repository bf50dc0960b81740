"""Measure one PPO iteration against its floor: this trainer, TRL's GRPO on the same batch, and TRL's last PPO.

    python benchmarks/ppo_iteration.py --output runs/benchmark
    python benchmarks/ppo_iteration.py --output runs/benchmark --trainers ours reward_critic adapter_critic
    pip install --no-deps --target build/trl-1.12 trl==1.12.0
    python benchmarks/ppo_iteration.py --output runs/benchmark --trl_1_12 build/trl-1.12
    python benchmarks/ppo_iteration.py --output runs/benchmark --device cuda --scenarios qwen2.5_0.5b --profile

Every trainer is a process of its own with the same random weights, LoRA, prompts, completion lengths, epochs and
micro-batches. The processes start side by side, and then take turns, one iteration each. Every round has another
order. So a busy machine slows all of them, and the ratios within a round are the result: of CPU seconds on a CPU, of
seconds on a GPU. Random weights do not change the speed. A logits processor forces the lengths, so that all trainers
get the same number of tokens. Writes `<scenario>.json`, after each round, and `.md`. The same command, on the same
commit, continues after the last round in the file. Several trainers give the memory of a GPU back after each
iteration, and allocate it anew in the next: for the fastest iteration and its MFU, run one trainer.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from floors import measure_machine
from ppo_iteration_report import report
from ppo_iteration_trainers import CRITICS, SCENARIOS, TRAINERS, TRL_1_12, Scenario
from ppo_iteration_worker import work

from rlhf_recipes.durability.origin import git_tags

OVERRIDES = ("rows", "micro_batch", "epochs", "prompt", "completion")


def scenario_of(args: argparse.Namespace, name: str) -> Scenario:
    """Return a scenario with the changes of the command line."""
    changes = {option: getattr(args, option) for option in OVERRIDES if getattr(args, option) is not None}
    switches = {option: True for option in ("quantize", "one_backbone") if getattr(args, option)}
    return replace(SCENARIOS[name], **changes, **switches)


def trainers_of(args: argparse.Namespace) -> list[str]:
    """Return the trainers of the command line, without those whose code was not given."""
    left_out = {"before": not args.before, **dict.fromkeys(TRL_1_12, not args.trl_1_12)}
    return [kind for kind in args.trainers if not left_out.get(kind)]


def facts_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return what must be the same in all rounds of a file, beside the scenario."""
    names = ("device", "threads", "epochs_run", "before", "trl_1_12")
    facts = {name: getattr(args, name) for name in names}
    return {**facts, "trainers": trainers_of(args), "commit": git_tags().get("git.commit")}


class Worker:
    """A trainer in a process of its own."""

    def __init__(self, kind: str, name: str, args: argparse.Namespace) -> None:
        self.kind, self.log = kind, args.output / f"{name}.{kind}.log"
        threads = {"OMP_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "false"}
        quiet = {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
        first = {"before": args.before, **dict.fromkeys(TRL_1_12, args.trl_1_12)}.get(kind)
        paths = [str(Path(first).resolve())] if first else []
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


def measure(name: str, kinds: list[str], done: int, args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Let the trainers take turns after rounds of warm-up, and yield the figures of each further round.

    Args:
        name: Scenario.
        kinds: Trainers.
        done: Number of rounds that an earlier call has measured.
        args: Command line.
    """
    workers = {kind: Worker(kind, name, args) for kind in kinds}
    alive = [kind for kind in kinds if workers[kind].read()]
    turns = [("warm up", done)] * args.warm_up + [("go", number) for number in range(done, args.rounds)]
    turns += [("profile", args.rounds)] * args.profile
    for turn, (word, number) in enumerate(turns, done):
        first, rows = turn % max(len(alive), 1), []
        for kind in alive[first:] + alive[:first]:
            answer = workers[kind].ask(word)
            if answer is None:
                alive = [other for other in alive if other != kind]
                continue
            cpu, wall = (sum(f[unit] for f in answer["phases"].values()) for unit in ("cpu", "wall"))
            print(name, kind, word, number, f"{cpu:.1f} CPU s, {wall:.1f} s", flush=True)
            rows.append({"trainer": kind, "round": number, "profiled": word == "profile", **answer})
        if word != "warm up":
            yield rows
    for worker in workers.values():
        worker.stop()


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=["even", "long_tail", "large_vocabulary"])
    parser.add_argument("--trl_1_12", help="directory with TRL 1.12.0, whose PPO is then measured too")
    default = [kind for kind in TRAINERS if kind not in ("padded", "compiled", *CRITICS)]
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=default)
    parser.add_argument("--before", help="checkout of another commit, whose PPO is then measured too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm_up", type=int, default=1, help="iterations before the first that counts")
    parser.add_argument("--profile", action="store_true", help="profile one more iteration of each trainer")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="threads of a trainer; default: 1 on a CPU, 8 beside a GPU")
    parser.add_argument("--epochs_run", type=int, help="run so many epochs and scale the update; at least 2")
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
        scenario, shares_memory = scenario_of(args, args.scenarios[0]), len(trainers_of(args)) > 1
        work(args.worker, scenario, args.device, args.threads, args.epochs_run, shares_memory=shares_memory)
        return
    args.output.mkdir(parents=True, exist_ok=True)
    kinds, facts = trainers_of(args), facts_of(args)
    for name in args.scenarios:
        path, scenario = args.output / f"{name}.json", scenario_of(args, name)
        settings = {"name": name, **asdict(scenario)}
        if path.exists():
            result = json.loads(path.read_text(encoding="utf-8"))
            if (found := {**result["scenario"], **result.get("facts", {})}) != {**settings, **facts}:
                raise SystemExit(f"{path} holds {found}, not {settings | facts}. Choose another --output.")
        else:
            machine = measure_machine(scenario, args.device, args.threads)
            result = {"scenario": settings, "facts": facts, "machine": asdict(machine), "rows": []}
        done = max((row["round"] + 1 for row in result["rows"] if not row["profiled"]), default=0)
        for rows in measure(name, kinds, done, args) if done < args.rounds else ():
            result["rows"] += rows
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        text = report(result)
        path.with_suffix(".md").write_text(text, encoding="utf-8")
        print(text, flush=True)


if __name__ == "__main__":
    main()
