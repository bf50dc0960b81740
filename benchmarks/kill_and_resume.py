"""Check that nothing is lost: kill the quickstart's PPO with SIGKILL many times, and compare it with a run left alone.

    make demo
    python benchmarks/kill_and_resume.py

A run is killed at random moments while it samples, while it updates and while it writes a checkpoint. The same
command, `--resume_from_checkpoint true`, starts it again until it ends. Then these are compared bit for bit with an
uninterrupted run: weights, value head, moving statistics, KL coefficient, optimiser, and every logged figure except
times. The variants are full fine-tuning, LoRA, and two processes. Writes `kill_and_resume.md`, and exits with 1 if
there is a difference.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import runpy
import shutil
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from rlhf_recipes.durability.checkpoints import checkpoints_by_age

ROOT = Path(__file__).resolve().parents[1]
PHASES = ("sampling", "updating", "saving")
LONGEST_SECONDS = (0.5, 0.2, 0.06)  # rough length of one piece of each phase
TIMES = ("step_time", "runtime", "per_second")
VARIANTS: dict[str, tuple[int, list[str]]] = {
    "full": (1, []),
    "LoRA": (1, ["--use_peft", "true", "--lora_r", "8", "--lora_target_modules", "all-linear"]),
    "full, 2 processes": (2, ["--per_device_train_batch_size", "32"]),
}


def recipe(rank: int, world_size: int, port: int, arguments: list[str], log: str, phase: Any) -> None:
    """Run `recipes/ppo.py` like its command. Note its phase and the number of checkpoints that it has written."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(ROOT)
    if world_size > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)

    from rlhf_recipes import PPOTrainer

    def noting(method: Any, number: int) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            phase[0] = number
            result = method(*args, **kwargs)
            phase[0] = 0
            phase[1] += number == 1 + PHASES.index("saving")
            return result

        return noted

    for number, name in enumerate(("_generate", "_compute_loss", "_save_checkpoint"), start=1):
        setattr(PPOTrainer, name, noting(getattr(PPOTrainer, name), number))
    sys.argv = ["recipes/ppo.py", *arguments]
    runpy.run_path(str(ROOT / "recipes" / "ppo.py"), run_name="__main__")


def start(variant: str, output_dir: Path, steps: int) -> tuple[list[Any], Any]:
    """Start or resume a run."""
    world_size, options = VARIANTS[variant]
    arguments = [
        "--config", "recipes/configs/quickstart/ppo.yaml", "--max_steps", str(steps), "--save_strategy", "steps",
        "--save_steps", "3", "--save_total_limit", "2", "--logging_steps", "2", "--eval_steps", "10", "--tracking",
        "false", "--resume_from_checkpoint", "true", "--output_dir", str(output_dir), "--disable_tqdm", "true",
        *options,
    ]  # fmt: skip
    context = multiprocessing.get_context("forkserver")
    phase = context.RawArray("i", 2)
    port, log = random.randrange(20_000, 30_000), str(output_dir.with_suffix(".log"))
    job = (world_size, port, arguments, log)
    processes = [context.Process(target=recipe, args=(rank, *job, phase)) for rank in range(world_size)]
    for process in processes:
        process.start()
    return processes, phase


def kill_in(processes: list[Any], phase: Any, wanted: int) -> bool:
    """Kill a run at a random moment of the wanted phase, after a few checkpoints. Return whether it was alive."""
    checkpoints = random.randint(0 if wanted == 1 else 1, 2)
    while all(process.is_alive() for process in processes):
        if phase[0] == wanted and phase[1] >= checkpoints:
            time.sleep(random.uniform(0, LONGEST_SECONDS[wanted - 1]))
            break
        time.sleep(0.001)
    alive = all(process.is_alive() for process in processes)
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        process.join()
    return alive


def results(output_dir: Path) -> dict[str, Any]:
    """Return all results that must be equal."""
    checkpoint = checkpoints_by_age(output_dir)[-1]
    history = json.loads((output_dir / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    figures = [entry for entry in history if "train_runtime" not in entry]
    state = json.loads((checkpoint / "ppo_state.json").read_text(encoding="utf-8"))
    return {
        "weights": {file.name: load_file(file) for file in sorted(output_dir.glob("*.safetensors"))},
        "optimiser": torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"],
        "state": state,
        "figures": [{k: v for k, v in entry.items() if not k.endswith(TIMES)} for entry in figures],
    }


def differences(left: Any, right: Any, path: str = "") -> list[str]:
    """Return the paths at which two nested results differ."""
    if isinstance(left, dict):
        if left.keys() != right.keys():
            return [path]
        return [found for name in left for found in differences(left[name], right[name], f"{path}/{name}")]
    if isinstance(left, list):
        if len(left) != len(right):
            return [path]
        return [
            found
            for i, pair in enumerate(zip(left, right, strict=True))
            for found in differences(*pair, f"{path}/{i}")
        ]
    if isinstance(left, torch.Tensor):
        return [] if torch.equal(left, right) else [path]
    return [] if left == right else [path]


def measure(variant: str, kills: int, steps: int, directory: Path) -> tuple[str, bool]:
    """Return a row of the table, and whether nothing was lost."""
    whole, killed = directory / f"{variant}-whole", directory / f"{variant}-killed"
    processes, phase = start(variant, whole, steps)  # a process reads its arguments later: `phase` must stay alive
    for process in processes:
        process.join()
    died: Counter[str] = Counter()
    while True:
        wanted = 1 + sum(died.values()) % 3
        processes, phase = start(variant, killed, steps)
        if sum(died.values()) >= kills:
            for process in processes:
                process.join()
            break
        if kill_in(processes, phase, wanted):
            died[PHASES[wanted - 1]] += 1
        else:  # the run ended first: start another one
            if found := differences(results(whole), results(killed)):
                return f"| {variant} | differs | {found[:3]} |", False
            shutil.rmtree(killed)
    found = differences(results(whole), results(killed))
    said = killed.with_suffix(".log").read_text(encoding="utf-8", errors="replace")
    passed_over = said.count("it is passed over")
    counts = ", ".join(f"{died[phase]} {phase}" for phase in PHASES)
    return f"| {variant} | {counts} | {passed_over} | {len(found)} {found[:3] or ''} |", not found


def main() -> int:
    """Kill, resume and compare the variants, and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=21, help="kills of full fine-tuning; others get a quarter")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, default=Path("runs/kill_and_resume"))
    options = parser.parse_args()
    random.seed(options.seed)
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["rlhf_recipes.trainers.ppo", "rlhf_recipes.tracking.session"]
    )
    directory = options.directory.resolve()
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    rows, is_exact = [], True
    for variant in VARIANTS:
        kills = options.kills if variant == "full" else max(1, round(options.kills / 4))
        row, same = measure(variant, kills, options.steps, directory)
        print(row, flush=True)
        rows.append(row)
        is_exact &= same
    head = ["| variant | kills | checkpoints passed over | differences |", "|---|---|---|---|"]
    where = (
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {date.today()}, seed {options.seed}"
    )
    (directory / "kill_and_resume.md").write_text("\n".join([*head, *rows, "", where, ""]), encoding="utf-8")
    return 0 if is_exact else 1


if __name__ == "__main__":
    sys.exit(main())
