"""Compare PPO with a reward for each sentence and PPO with one score for the answer, in the world of reports.

    python benchmarks/dense_rewards.py --directory runs/dense
    python benchmarks/dense_rewards.py --directory runs/dense --seeds 0 1 --rewards dense --jobs 1

The judge is the same: `report_sentence_scores` gives the parts of `report_score`. So are the SFT policy, the prompts
and the settings. `--dense_steps 30` ends the dense runs at half of the completions. After every tenth step the policy
is measured on held-out prompts, as in `league.py`. A run whose `result.json` exists is not repeated. Writes
`dense.json` and `dense.md`. They hold for each seed the completions after which the dense run has the gold score with
which the sparse run ends, and the gold scores at equal KL and at the end. Below are the means of the paired
differences with their t intervals over seeds. The share of completions has a mean only if every dense run gets there.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from league import Cell, build_base, measure_base, run_cells
from league_methods import WORLDS, Method
from league_report import gold_at
from paired_differences import INTERVALS, as_cell, paired_difference

from rlhf_recipes.console import quiet_start
from rlhf_recipes.evaluation.statistics import crossed_mean

COMPLETIONS = 32  # per optimiser step: a rollout has 128, and is used for 4 steps
WORLD = replace(WORLDS["report"], parts=6)
REWARDS = {"sparse": "report_score", "dense": "report_sentence_scores"}


def cell_of(rewards: str, seed: int, args: argparse.Namespace) -> Cell:
    """Return a run of PPO. The two kinds of rewards have all other options in common."""
    lam, steps = args.lam, args.dense_steps if rewards == "dense" else WORLD.steps
    world = replace(WORLD, steps=steps, parts=steps // (WORLD.steps // WORLD.parts))
    function = f"rlhf_recipes.quickstart.report_world:{REWARDS[rewards]}"
    options = {"kl_coef": 0.05, "lam": lam, "missing_eos_penalty": 1.0, "reward_functions": [function]}
    return Cell(world, Method(f"{rewards}-{lam:g}-{steps}", "ppo", "ppo.yaml", [options]), 0, seed, args.directory)


def gold_path(result: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Return the numbers of completions at which a run was measured, and its gold scores there."""
    points = [(0, result["sft"]["gold"]), *((COMPLETIONS * x["step"], x["gold"]) for x in result["path"])]
    completions, gold = zip(*points, strict=True)
    return list(completions), list(gold)


def completions_to(result: dict[str, Any], gold: float) -> float:
    """Return after how many completions a run first has a gold score; infinity if it never has.

    The path is linear between the points where it was measured.
    """
    counts, path = gold_path(result)
    for number in range(1, len(path)):
        if path[number] >= gold:
            return float(np.interp(gold, path[number - 1 : number + 1], counts[number - 1 : number + 1]))
    return float("inf")


def figures(dense: dict[str, Any], sparse: dict[str, Any]) -> dict[str, float]:
    """Return the figures of a pair of runs of one seed."""
    end, budget = sparse["path"][-1]["gold"], COMPLETIONS * sparse["path"][-1]["step"]
    row = {"sparse gold": end, "dense gold": dense["path"][-1]["gold"]}
    row |= {"completions": completions_to(dense, end), "share": completions_to(dense, end) / budget}
    row |= {"sparse KL": sparse["path"][-1]["kl"], "dense KL": dense["path"][-1]["kl"]}
    runs = {"sparse": sparse, "dense": dense}
    return row | {f"{name} gold@{kl:g}": gold_at(x, kl) for kl in WORLD.budgets for name, x in runs.items()}


def write_report(folder: Path, results: dict[int, tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """Write the figures of each seed, and below them the means over seeds."""
    rows = {seed: figures(*pair) for seed, pair in results.items()}
    columns = list(next(iter(rows.values())))
    lines = ["| seed | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {seed} | " + " | ".join(f"{row[name]:.4g}" for name in columns) + " |" for seed, row in rows.items()]
    gains = {}
    for what in ("gold", *(f"gold@{kl:g}" for kl in WORLD.budgets)):
        gains[what] = paired_difference(
            *([row[f"{name} {what}"] for row in rows.values()] for name in ("dense", "sparse"))
        )
    lines += ["", f"dense - sparse, {INTERVALS}:", *(f"\n{what}: {as_cell(gain)}" for what, gain in gains.items())]
    shares = [row["share"] for row in rows.values()]
    lines += ["", share_text(shares)]
    (folder / "dense.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = {"rows": rows, "gains": {what: asdict(gain) for what, gain in gains.items()}, "shares": shares}
    (folder / "dense.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines))


def share_text(shares: list[float]) -> str:
    """Return how many dense runs reach the gold score of their sparse run, and if all do, the mean share they need.

    A mean over those that get there would leave out the bad ones.
    """
    reached = sum(np.isfinite(shares))
    text = f"share of the completions: {reached} of {len(shares)} seeds reach the gold score of the sparse run"
    if reached < len(shares):
        return f"{text}, so there is no mean"
    mean = crossed_mean(shares)
    interval = "" if np.isnan(mean.low) else f" [{mean.low:.3g}, {mean.high:.3g}]"
    return f"{text}; mean {mean.mean:.3g}{interval}"


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--rewards", nargs="+", choices=list(REWARDS), default=list(REWARDS))
    parser.add_argument("--lam", type=float, default=0.98, help="GAE's lambda, of both")
    parser.add_argument("--directory", type=Path, default=Path("runs", "dense"))
    parser.add_argument("--dense_steps", type=int, default=WORLD.steps, help="of the dense runs, a multiple of 10")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    args = parser.parse_args()
    args.directory = root = args.directory.resolve()
    (root / WORLD.name / "bases").mkdir(parents=True, exist_ok=True)
    cells = [cell_of(rewards, seed, args) for seed in args.seeds for rewards in args.rewards]
    build_base(cells[0], None, None)
    measure_base(cells[0])
    run_cells(cells, args.jobs)
    pairs = {seed: tuple(cell_of(name, seed, args).result() for name in ("dense", "sparse")) for seed in args.seeds}
    if known := {seed: pair for seed, pair in pairs.items() if all(pair)}:
        write_report(root, known)  # type: ignore[arg-type]


if __name__ == "__main__":
    quiet_start()
    main()
