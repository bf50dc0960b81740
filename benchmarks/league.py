"""Compare PPO with what a user would choose instead: TRL's RLOO, GRPO and DPO, and best-of-n.

    python benchmarks/league.py --world quickstart --directory runs/league
    python benchmarks/league.py --world quickstart --methods ppo rloo --seeds 0 1 2 --jobs 2
    python benchmarks/league.py --world instructions --methods ppo rloo --seeds 0 1 2 --tuning_seeds \
        --model runs/smollm2_135m/base --data DIRECTORY
    pip install --no-deps --target build/trl-1.12 trl==1.12.0

In the world of the quickstart each seed has its own SFT policy, preferences and reward model, built by its recipe. In
the other worlds all seeds share one base, and there is no reward model: the true score is the reward. Instructions are
for the chat model that `--model` names. Every method has the same number of completions and of optimiser steps, and is
tuned over the same number of settings, on seeds that are not tested on. The held-out prompts are the same for all.
After each quarter of a run the policy is measured on held-out prompts, by the same code for all methods: gold score,
score of the reward model, KL to the SFT policy on fresh samples, length, and win rate over the SFT policy.

A run whose `result.json` exists is not repeated, so the command goes on where it was stopped. Every run is tracked in
`mlflow.db` in the directory: `recipes/compare.py` ranks those of the recipes. The PPO that TRL had until 1.12 runs in
processes of its own, from the directory `--trl_1_12`. Without it the method is left out. Writes `league.json`,
`league.md` and `league.png`.
"""

import argparse
import json
import multiprocessing
import os
import resource
import runpy
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import Dataset
from instruction_base import RECIPES, as_arguments
from league_methods import METHODS, TRL_1_12, WORLDS, Method, World
from league_report import gold_at, write_report

from rlhf_recipes.algorithm.best_of_n import best_of_n_weights
from rlhf_recipes.console import quiet_start
from rlhf_recipes.data.prompts import add_separator
from rlhf_recipes.evaluation.policies import eos_token_ids, sample_answers, sequence_kl
from rlhf_recipes.evaluation.statistics import compare_scores
from rlhf_recipes.models.loading import load_policy, load_tokenizer
from rlhf_recipes.rewards.scorer import RewardModelScorer

BEST_OF = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Cell:
    """One run: a method with one of its settings, on one seed of a world."""

    world: World
    method: Method
    setting: int
    seed: int
    root: Path
    trl_1_12: Path = Path("build", "trl-1.12")

    @property
    def base(self) -> Path:
        """Return the folder of the seed's SFT policy, reward model and data."""
        return self.root / self.world.name / "bases" / (f"seed-{self.seed}" if self.world.own_bases else "shared")

    @property
    def folder(self) -> Path:
        """Return the folder of the run."""
        return self.root / self.world.name / f"{self.method.name}-{self.setting}" / f"seed-{self.seed}"

    @property
    def options(self) -> dict[str, Any]:
        """Return the options that this run is tuned by."""
        return self.world.settings_of(self.method)[self.setting]

    def result(self) -> dict[str, Any] | None:
        """Return the result, or `None` if the run has not ended."""
        file = self.folder / "result.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


class Judge:
    """Measure a policy on the held-out prompts of a base: the same for all methods."""

    def __init__(self, world: World, base: Path) -> None:
        self.world = world
        self.tokenizer = load_tokenizer(str(base / "sft"), padding_side="left")
        self.sft = load_policy(str(base / "sft"), dtype=world.dtype).eval()
        self.reward_model: Any = None  # the true score is the reward
        if world.has_reward_model:
            self.reward_model = RewardModelScorer.from_pretrained(str(base / "reward_modeling"), dtype=world.dtype)
            self.reward_model.batch_size = 64
            self.reward_model.policy_eos_token_ids = eos_token_ids(self.sft, self.tokenizer)
        prompts = Dataset.from_json(str(base / "prompts" / "test.jsonl"))
        self.prompts = list(add_separator(prompts, world.separator)["prompt"])[: world.held_out]

    def sample(self, policy: Any, count: int, seed: int) -> tuple[list[Any], list[list[int]], dict[str, np.ndarray]]:
        """Return `count` completions of each prompt, and their figures, each `(prompts, count)`."""
        torch.manual_seed(seed)
        asked = [prompt for prompt in self.prompts for _ in range(count)]
        options = {"max_completion_length": self.world.max_completion_length, "temperature": self.world.temperature}
        ids, _, answers = sample_answers(policy, self.tokenizer, asked, batch_size=160, **options)
        gold = self.world.gold(prompts=asked, completions=answers)
        figures = {
            "gold": gold,
            "proxy": self.reward_model(asked, answers, completion_ids=ids) if self.reward_model else gold,
            "length": [len(row) for row in ids],
        }
        return asked, ids, {name: np.reshape(values, (-1, count)) for name, values in figures.items()}

    def measure(self, policy: Any, count: int, theirs: np.ndarray) -> dict[str, float]:
        """Return the figures of a policy.

        Args:
            policy: Trained policy.
            count: Completions per prompt.
            theirs: Gold scores of the SFT policy, `(prompts, count)` or more columns.
        """
        asked, ids, figures = self.sample(policy, count, seed=1)
        means = {name: float(values.mean()) for name, values in figures.items()}
        outcome = compare_scores(figures["gold"], theirs[:, :count])
        means |= {
            "win_rate": outcome["win_rate"],
            "gold_se": float(figures["gold"].mean(axis=1).std() / len(theirs) ** 0.5),
        }
        return means | {"kl": sequence_kl(policy, self.sft, self.tokenizer, asked, ids, self.world.temperature)}


def options_of(cell: Cell) -> dict[str, Any]:
    """Return the options that this run has beside those of its configuration; `None` takes one away."""
    options: dict[str, Any] = {
        "model_name_or_path": cell.base / "sft",
        "output_dir": cell.folder / "run",
        "run_name": f"{cell.world.name}-{cell.method.name}-{cell.setting}",
        "seed": cell.seed,
        "max_steps": cell.world.steps,
        "save_steps": cell.world.steps // cell.world.parts,
        "max_completion_length": cell.world.max_completion_length,
    }
    sampling = cell.world.sampling if cell.method.samples else {}
    options |= cell.method.paths(cell.base) | cell.world.options | sampling | cell.options
    return {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}


def run_recipe(cell: Cell) -> None:
    """Train by the method's recipe, as its own command would."""
    name, file = cell.method.recipe, cell.folder / "config.yaml"
    options = yaml.safe_load((RECIPES / "configs" / "quickstart" / cell.method.config).read_text(encoding="utf-8"))
    options |= {"save_total_limit": cell.world.parts, "eval_strategy": "no", "log_model": False} | options_of(cell)
    given = {name: value for name, value in options.items() if value is not None}
    cell.folder.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(given), encoding="utf-8")
    sys.argv = [f"{name}.py", *cell.method.arguments, "--config", str(file)]
    runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")


def run_trl_1_12(cell: Cell) -> None:
    """Train by TRL 1.12, which needs a process of its own: this one has imported another TRL."""
    paths = [str(cell.trl_1_12), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TRL_EXPERIMENTAL_SILENCE": "1"}
    script = Path(__file__).with_name("league_trl_1_12.py")
    subprocess.run([sys.executable, str(script), *as_arguments(options_of(cell))], env=environment, check=True)


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def run_cell(
    cell: Cell,
    *,
    keeps_run: bool = False,
    build: Callable[[Cell], None] | None = None,
    measure: Callable[[Cell], dict[str, Any]] | None = None,
) -> str:
    """Train and measure one run, in a process of its own; its output goes into a file.

    Args:
        cell: Run.
        keeps_run: Whether another run needs the checkpoints, which else are deleted.
        build: Function that builds what the run needs, if that is not there.
        measure: Function that measures the policy. Default: `measure_path`.
    """
    cell.folder.mkdir(parents=True, exist_ok=True)
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{(cell.root / 'mlflow.db').resolve()}"
    os.environ["MLFLOW_EXPERIMENT_NAME"] = f"league-{cell.world.name}"
    with (cell.folder / "log.txt").open("w", encoding="utf-8") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        try:
            torch.set_num_threads(1)
            quiet_start()
            if build is not None:
                build(cell)
            train = run_trl_1_12 if cell.method.name == TRL_1_12 else run_recipe
            train(cell)
            result = {"setting": cell.options, "cpu_seconds": cpu_seconds()}
            result |= (measure or measure_path)(cell)
        except BaseException:
            traceback.print_exc()
            return f"{cell.folder} failed: see log.txt there"
    (cell.folder / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if not keeps_run:
        shutil.rmtree(cell.folder / "run", ignore_errors=True)
    end = result["path"][-1]
    return f"{cell.folder}: gold {end['gold']:.2f}, KL {end['kl']:.2f}, {result['cpu_seconds']:.0f} CPU seconds"


def measure_path(cell: Cell) -> dict[str, Any]:
    """Measure the policy after each part of the run; the last one on more completions."""
    judge, base = Judge(cell.world, cell.base), measure_base(cell)
    theirs, path = np.asarray(base["gold"]), []
    for part in range(1, cell.world.parts + 1):
        step = part * cell.world.steps // cell.world.parts
        policy = load_policy(str(cell.folder / "run" / f"checkpoint-{step}"), dtype=cell.world.dtype).eval()
        count = cell.world.samples[part == cell.world.parts]
        path.append({"step": step, **judge.measure(policy, count, theirs)})
    return {"sft": {"gold": float(theirs.mean()), "proxy": base["proxy_mean"], "length": base["length"]}, "path": path}


def measure_base(cell: Cell) -> dict[str, Any]:
    """Return what answers of the SFT policy score, and the curve of best-of-n by the reward model."""
    file = cell.base / "sft.json"
    if not file.exists() or '"proxy"' not in file.read_text(encoding="utf-8"):  # an earlier version had only its mean
        judge = Judge(cell.world, cell.base)
        _, _, figures = judge.sample(judge.sft, cell.world.best_of, seed=0)
        proxy, gold = (torch.tensor(figures[name]) for name in ("proxy", "gold"))
        curve = {
            n: (best_of_n_weights(proxy, n) * gold).sum(dim=1).mean().item()
            for n in BEST_OF
            if n <= cell.world.best_of
        }
        content = {"gold": figures["gold"].tolist(), "proxy": figures["proxy"].tolist()}
        content |= {"proxy_mean": float(figures["proxy"].mean())}
        content |= {"length": float(figures["length"].mean()), "best_of": curve}
        scratch = file.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(content), encoding="utf-8")
        scratch.replace(file)
    return json.loads(file.read_text(encoding="utf-8"))


def build_base(cell: Cell, model: Path | None, data: Path | None) -> None:
    """Build the SFT policy, the preferences and the reward model of a seed."""
    if not cell.base.exists():
        scratch = cell.base.with_name(f"building-{cell.base.name}")
        cell.world.build(scratch, cell.seed, model, data)
        scratch.rename(cell.base)


def run_cells(cells: list[Cell], jobs: int, **options: Any) -> None:
    """Run what has no result yet, each run in a forked process, `jobs` at a time.

    Args:
        cells: Runs.
        jobs: Number of processes.
        options: Options of `run_cell`.
    """
    due = [cell for cell in cells if cell.result() is None]
    with multiprocessing.get_context("fork").Pool(jobs, maxtasksperchild=1) as pool:
        for number, line in enumerate(pool.imap_unordered(partial(run_cell, **options), due), start=1):
            print(f"[{number}/{len(due)}] {line}", flush=True)


def best_setting(cells: list[Cell]) -> int:
    """Return the setting with the highest gold score at equal KL, the mean over its tuning seeds."""

    def merit(setting: int) -> float:
        results = [cell.result() for cell in cells if cell.setting == setting]
        return float(np.mean([gold_at(result, kl) for result in results if result for kl in cells[0].world.budgets]))

    return max(sorted({cell.setting for cell in cells}), key=merit)


def methods_of(names: list[str], trl_1_12: Path) -> list[str]:
    """Return the methods that can run: that of TRL 1.12 needs its directory."""
    if TRL_1_12 not in names or (trl_1_12 / "trl" / "experimental" / "ppo").is_dir():
        return names
    print(f"{TRL_1_12} is left out, because {trl_1_12} does not hold TRL 1.12.")
    return [name for name in names if name != TRL_1_12]


def main() -> None:
    """Tune, test and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=list(WORLDS), default="quickstart")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="default: all that the world has")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4, 5], help="test seeds")
    parser.add_argument("--tuning_seeds", type=int, nargs="*", default=[10, 11], help="none: the first setting")
    parser.add_argument("--directory", type=Path, default=Path("runs", "league"))
    parser.add_argument("--model", type=Path, help="chat model of the world of instructions")
    parser.add_argument("--data", type=Path, help="directory with `train.jsonl` and `eval.jsonl`, for its questions")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--trl_1_12", type=Path, default=Cell.trl_1_12, help="directory with TRL 1.12")
    args = parser.parse_args()
    world, root = WORLDS[args.world], args.directory.resolve()
    if unable := sorted({*(args.methods or ())} - {*world.methods}):
        parser.error(f"the world {world.name} has no {', '.join(unable)}: choose from {', '.join(world.methods)}")
    args.methods = methods_of(args.methods or list(world.methods), args.trl_1_12)
    if not args.methods:
        return
    (root / world.name / "bases").mkdir(parents=True, exist_ok=True)

    def cell(method: str, setting: int, seed: int) -> Cell:
        return Cell(world, METHODS[method], setting, seed, root, args.trl_1_12.resolve())

    for seed in (*args.tuning_seeds, *args.seeds):
        build_base(cell(args.methods[0], 0, seed), args.model, args.data)
    tuning = {
        name: [cell(name, i, seed) for i in range(len(world.settings_of(METHODS[name]))) for seed in args.tuning_seeds]
        for name in args.methods
    }
    run_cells([each for cells in zip_longest(*tuning.values()) for each in cells if each], args.jobs)
    if not args.seeds:
        return
    chosen = {name: best_setting(cells) if cells else 0 for name, cells in tuning.items()}
    tests = {name: [cell(name, setting, seed) for seed in args.seeds] for name, setting in chosen.items()}
    run_cells([each for cells in zip(*tests.values(), strict=True) for each in cells], args.jobs)
    results = {name: {each.seed: each.result() for each in cells if each.result()} for name, cells in tests.items()}
    bases = [measure_base(cell(args.methods[0], 0, seed)) for seed in args.seeds]
    write_report(
        root / world.name,
        world,
        results,
        bases,
        {name: world.settings_of(METHODS[name])[i] for name, i in chosen.items()},
    )


if __name__ == "__main__":
    quiet_start()
    main()
