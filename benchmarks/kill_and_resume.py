"""Check that nothing is lost: kill runs at random events, resume them, and compare them with runs left alone.

    python benchmarks/kill_and_resume.py
    python benchmarks/kill_and_resume.py --kills 20 --kinds ppo "ppo one backbone" --processes 1

Each run has random options (`kill_cases.py`): full fine-tuning, LoRA, one backbone, 4-bit; evaluations, early
stopping, best checkpoint, workers, schedules, epochs; SFT, reward modelling and PPO; one or two processes. SIGKILL
ends it at an exact event of a random phase (`killed_run.py`): start, resume, sampling, update, optimiser step, each
file of a checkpoint, evaluation, each statement to MLflow, upload, final save. The same command,
`--resume_from_checkpoint true`, starts it again until it ends, and once more after its end. Then these must be the
same as in the run left alone: every tensor of the model and of the last checkpoint, every figure of its log except
times, every table of completions, and the record in MLflow: one FINISHED run, none that is RUNNING, no value missing
or twice.

Writes `kill_and_resume.md` into the directory, and exits with 1 if there is a difference.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

import mlflow
import torch
from kill_cases import KINDS, Case, build_world, draw_case
from killed_run import PHASES, Kill, draw_kill, run_recipe
from safetensors.torch import load_file

from rlhf_recipes.durability.checkpoints import checkpoints_by_age

TIMES = ("step_time", "runtime", "per_second", "seconds")
OWN = {
    "manifest.json",
    "mlflow_run.json",
    "training_args.bin",
    "README.md",
}  # times, ids and paths, or none of the run
TENSORS = {".pt", ".pth", ".bin"}
SECONDS = 180  # for one start
SECONDS_TO_END = 0.5  # between the signals of a launcher whose other process has died
forkserver = multiprocessing.get_context("forkserver")


def start(job: dict[str, Any], world_size: int, kill: Kill | None) -> tuple[int, bool]:
    """Start or resume a run. Return its exit code, and whether it was killed.

    Raises:
        TimeoutError: If it does not end.
    """
    port, deadline = random.randrange(20_000, 30_000), time.monotonic() + SECONDS
    arguments = (world_size, port, kill)
    processes = [forkserver.Process(target=run_recipe, args=(job, rank, *arguments)) for rank in range(world_size)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes) and all(
        process.exitcode in (None, 0) for process in processes
    ):
        if time.monotonic() > deadline:
            end(processes, signal.SIGKILL)
            raise TimeoutError(f"{job['name']} does not end: {kill}")
        time.sleep(0.01)
    end(processes, signal.SIGTERM)
    deadline = time.monotonic() + SECONDS_TO_END
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        time.sleep(0.01)
    end(processes, signal.SIGKILL)
    codes = [process.exitcode for process in processes]
    victim = 0 if kill is None else kill.rank
    return next((code for code in codes if code), 0), kill is not None and codes[victim] == -signal.SIGKILL


def end(processes: list[Any], number: int) -> None:
    """Send a signal to every process that runs."""
    for process in processes:
        with suppress(ProcessLookupError):
            if process.is_alive():
                os.killpg(process.pid, number)
        if number == signal.SIGKILL:
            process.join()


def log_of(directory: Path, name: str) -> str:
    """Return the last lines of a run."""
    return (directory / f"{name}.log").read_text(encoding="utf-8", errors="replace")[-2000:]


def tensors(file: Path) -> Any:
    """Return what a file of a checkpoint holds."""
    if file.suffix == ".safetensors":
        return load_file(file)
    if file.suffix in TENSORS:
        return torch.load(file, weights_only=False)  # written by this benchmark
    if file.suffix == ".json":
        return json.loads(file.read_text(encoding="utf-8"))
    return file.read_bytes()


def without_times(value: Any, output_dir: str) -> Any:
    """Return nested results without the figures that are times, and with one name for the output directory."""
    if isinstance(value, dict):
        return {
            name: without_times(entry, output_dir) for name, entry in value.items() if not str(name).endswith(TIMES)
        }
    if isinstance(value, list | tuple):
        return [without_times(entry, output_dir) for entry in value]
    return value.replace(output_dir, "output_dir") if isinstance(value, str) else value


def results(directory: Path, output_dir: str) -> dict[str, Any]:
    """Return all files of a run that must be equal: of the model, the tables, and the last checkpoint."""
    folder = directory / output_dir
    last = checkpoints_by_age(folder)[-1:]
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in OWN]
    files = [path for path in files if not path.relative_to(folder).parts[0].startswith("checkpoint-")]
    files += [path for checkpoint in last for path in checkpoint.rglob("*") if path.is_file() and path.name not in OWN]
    found = {str(path.relative_to(folder)): without_times(tensors(path), output_dir) for path in files}
    return found | {"checkpoints": sorted(path.name for path in folder.glob("checkpoint-*"))}


def recorded(directory: Path, output_dir: str) -> dict[str, Any]:
    """Return the record of a run in MLflow.

    A start that was killed before its first checkpoint has a run of its own, which the next start closes as KILLED.
    """
    client = mlflow.MlflowClient(f"sqlite:///{directory}/mlflow.db")
    experiment = client.get_experiment_by_name("rlhf_recipes")
    runs = client.search_runs([experiment.experiment_id], f"tags.mlflow.runName = '{output_dir}'")
    status = Counter(run.info.status for run in runs)
    found: dict[str, Any] = {"finished": status.pop("FINISHED", 0), "open": status.pop("RUNNING", 0)}
    for run in (run for run in runs if run.info.status == "FINISHED"):
        histories = {
            name: sorted((metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name))
            for name in run.data.metrics
            if not name.startswith("system/") and not name.endswith(TIMES)
        }
        files = sorted(entry.path for entry in client.list_artifacts(run.info.run_id))
        tables = sorted(entry.path for entry in client.list_artifacts(run.info.run_id, "samples"))
        models = len(run.outputs.model_outputs) if run.outputs else 0
        found["run"] = {"values": histories, "files": files, "tables": tables, "models": models}
    versions = client.search_model_versions(f"name = '{output_dir}'")
    return found | {"versions": len(versions)}


def differences(left: Any, right: Any, path: str = "") -> list[str]:
    """Return the paths at which two nested results differ."""
    if isinstance(left, dict) and isinstance(right, dict):
        if left.keys() != right.keys():
            return [f"{path}: only one has {sorted(map(str, left.keys() ^ right.keys()))[:4]}"]
        return [found for name in left for found in differences(left[name], right[name], f"{path}/{name}")]
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        if len(left) != len(right):
            return [f"{path}: {len(left)} and {len(right)} entries"]
        pairs = enumerate(zip(left, right, strict=True))
        return [found for i, pair in pairs for found in differences(*pair, f"{path}/{i}")]
    if isinstance(left, torch.Tensor):
        return [] if torch.equal(left, right) else [f"{path}: tensors"]
    same = left is right or bool((left == right) if not hasattr(left, "all") else (left == right).all())
    return [] if same or (left != left and right != right) else [f"{path}: {str(left)[:40]} and {str(right)[:40]}"]


def compare(directory: Path, whole: str, killed: str) -> list[str]:
    """Return the differences of two runs."""
    pairs = [(read(directory, whole), read(directory, killed)) for read in (results, recorded)]
    return [found for left, right in pairs for found in differences(left, right)]


def measure(
    directory: Path, name: str, case: Case, draw: random.Random, kills: int, phases: tuple[str, ...]
) -> Iterator[Kill | str]:
    """Kill a run several times, and let it end. Yield each kill and each difference to the run left alone."""
    whole, killed = f"{name}-whole", f"{name}-killed"
    job = {"directory": str(directory), "recipe": case.recipe}
    jobs = {run: {**job, "name": run, "arguments": case.arguments(run)} for run in (whole, killed)}
    code, _ = start(jobs[whole], case.world_size, None)
    if code:
        yield f"{name} failed without a kill: {log_of(directory, whole)}"
        return
    counts = json.loads((directory / f"{whole}.counts.json").read_text(encoding="utf-8"))
    resumed = {"resume": 6}
    for _ in range(kills):
        kill = draw_kill(draw, counts, case.world_size, phases)
        code, is_killed = start(jobs[killed], case.world_size, kill)
        if is_killed:
            yield kill
            counts = resumed | counts
        elif code:
            yield f"{name} failed after a kill: {log_of(directory, killed)}"
            return
        else:
            break
    for attempt in ("after the kills", "after its end"):
        code, _ = start(jobs[killed], case.world_size, None)
        if code:
            yield f"{name} failed {attempt}: {log_of(directory, killed)}"
            return
        if found := compare(directory, whole, killed):
            yield from (f"{name} differs {attempt}: {each}" for each in found)
            return


def main() -> int:
    """Draw runs, kill and resume them until there were enough kills, and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=150, help="number of kills at least")
    parser.add_argument("--kills_a_run", type=int, default=4)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES)
    parser.add_argument(
        "--processes", nargs="+", type=int, default=[1, 1, 2], help="one of these numbers for each run"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, default=Path("runs/kill_and_resume"))
    options = parser.parse_args()
    draw = random.Random(options.seed)
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", MLFLOW_DISABLE_TELEMETRY="true")
    os.environ["MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING"] = "false"
    forkserver.set_forkserver_preload(["rlhf_recipes.trainers.ppo", "rlhf_recipes.tracking.session", "killed_run"])
    directory = options.directory.resolve()
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for case in build_world(directory):
        code, _ = start({"directory": str(directory), "recipe": case.recipe, "name": case.kind,
                         "arguments": case.arguments(case.kind)}, 1, None)  # fmt: skip
        if code:
            print(log_of(directory, case.kind))
            return 1
    kills: Counter[tuple[str, str]] = Counter()
    runs: Counter[str] = Counter()
    faults: list[str] = []
    while sum(kills.values()) < options.kills:
        kind = options.kinds[sum(runs.values()) % len(options.kinds)]
        case = draw_case(draw, kind, draw.choice(options.processes))
        name = f"{sum(runs.values()):03d}-{kind.replace(' ', '-')}"
        label = kind + (", 2 processes" if case.world_size > 1 else "")
        runs[label] += 1
        for outcome in measure(directory, name, case, draw, options.kills_a_run, tuple(options.phases)):
            if isinstance(outcome, Kill):
                kills[label, outcome.phase] += 1
            else:
                faults.append(outcome)
            print(outcome, flush=True)
    table = write_table(directory, kills, runs, faults, options.seed)
    print(table)
    return 1 if faults else 0


def write_table(
    directory: Path, kills: Counter[tuple[str, str]], runs: Counter[str], faults: list[str], seed: int
) -> str:
    """Write the table of kills and differences, and return it."""
    lines = ["| runs | number | kills | in the phases |", "|---|---|---|---|"]
    for label in sorted(runs):
        own = {phase: kills[label, phase] for phase in PHASES if kills[label, phase]}
        phases = ", ".join(f"{phase} {number}" for phase, number in own.items())
        lines.append(f"| {label} | {runs[label]} | {sum(own.values())} | {phases} |")
    total = f"{sum(runs.values())} runs, {sum(kills.values())} kills, {len(faults)} differences"
    lines += ["", f"{total} (seed {seed}, {os.cpu_count()} cores, {date.today()}).", *faults, ""]
    (directory / "kill_and_resume.md").write_text("\n".join(lines), encoding="utf-8")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
