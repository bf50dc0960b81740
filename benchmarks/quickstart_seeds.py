"""Run the quickstart with several seeds, and a control whose advantages are zero.

    python benchmarks/quickstart_seeds.py
    python benchmarks/quickstart_seeds.py --seeds 0 1 --directory runs/seeds

Each seed trains its own SFT policy, reward model and PPO policy. The world and the held-out prompts are the same.
Writes `results.json` and `results.md` (the table of recipes/README.md).
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path

import pandas as pd
import torch

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "recipes" / "configs" / "quickstart"
CONTROL = "runs/quickstart/control"
RESULTS = "runs/quickstart/evaluate/results.json"


def run(directory: Path, *command: str) -> None:
    """Run a script in `directory`, which then holds `runs/`."""
    subprocess.run([sys.executable, *command], cwd=directory, check=True)


def run_seed(directory: Path, seed: int, *, with_control: bool) -> None:
    """Run the quickstart of one seed, and its control. Existing results are kept."""
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / RESULTS).exists():
        run(directory, str(ROOT / "recipes" / "quickstart.py"), "--seed", str(seed))
    if with_control and not (directory / CONTROL / "evaluate" / "results.json").exists():
        run(directory, str(Path(__file__).resolve()), "--control", "--seeds", str(seed))
        script, config = str(ROOT / "recipes" / "evaluate.py"), str(CONFIGS / "evaluate.yaml")
        options = ["--model_name_or_path", CONTROL, "--output_dir", f"{CONTROL}/evaluate", "--seed", str(seed)]
        run(directory, script, "--config", config, *options)


def read_row(directory: Path, seed: int) -> dict[str, float]:
    """Return the results of one seed."""
    ppo = json.loads((directory / RESULTS).read_text(encoding="utf-8"))
    control_file = directory / CONTROL / "evaluate" / "results.json"
    control = json.loads(control_file.read_text(encoding="utf-8")) if control_file.exists() else {}
    state = json.loads((directory / "runs/quickstart/ppo/trainer_state.json").read_text(encoding="utf-8"))
    kl = [entry["objective/kl"] for entry in state["log_history"] if "objective/kl" in entry]
    return {
        "seed": seed,
        "gold SFT": ppo["gold_score/baseline"],
        "gold PPO": ppo["gold_score/policy"],
        "gold win rate": ppo["gold_score/win_rate"],
        "low": ppo["gold_score/win_rate_low"],
        "high": ppo["gold_score/win_rate_high"],
        "proxy SFT": ppo["reward_model/baseline"],
        "proxy PPO": ppo["reward_model/policy"],
        "KL (last 5 rollouts)": sum(kl[-5:]) / 5,
        "KL (held out)": ppo["policy/kl"],
        "length SFT": ppo["baseline/length"],
        "length PPO": ppo["policy/length"],
        "gold control": control.get("gold_score/policy", float("nan")),
    }


def train_control(seed: int) -> None:
    """Train the PPO stage with every advantage set to zero after its computation."""
    from trl import ModelConfig, TrlParser

    from rlhf_recipes import PPOConfig, PPOTrainer
    from rlhf_recipes.console import quiet_start
    from rlhf_recipes.data.loading import load_split
    from rlhf_recipes.options.recipes import PPOArguments, TrackingArguments

    class WithoutAdvantages(PPOTrainer):
        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            return batch | {"advantages": torch.zeros_like(batch["advantages"])}

    quiet_start()
    arguments = ["--config", str(CONFIGS / "ppo.yaml"), "--seed", str(seed), "--output_dir", CONTROL]
    parser = TrlParser((PPOArguments, PPOConfig, ModelConfig, TrackingArguments))
    script_args, training_args, model_args, _ = parser.parse_args_and_config(arguments)
    prompts = load_split(script_args, script_args.dataset_train_split)
    trainer = WithoutAdvantages(
        model_args.model_name_or_path, script_args.reward_model_path, training_args, train_dataset=prompts
    )
    trainer.train()
    trainer.save_model()


def main() -> None:
    """Run all seeds and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--control_seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--directory", type=Path, default=Path("runs", "seeds"))
    parser.add_argument("--control", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.control:
        train_control(args.seeds[0])
        return
    directories = {seed: (args.directory / str(seed)).resolve() for seed in args.seeds}
    for seed, directory in directories.items():
        run_seed(directory, seed, with_control=seed in args.control_seeds)
    table = pd.DataFrame([read_row(directory, seed) for seed, directory in directories.items()])
    table.to_json(args.directory / "results.json", orient="records", indent=2)
    header = "| " + " | ".join(table.columns) + " |\n|" + "---|" * len(table.columns)
    rows = [
        "| " + " | ".join(f"{x:.0f}" if i == 0 else f"{x:.2f}" for i, x in enumerate(row)) + " |"
        for row in table.values
    ]
    machine = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}, {date.today()}"
    text = "\n".join([header, *rows, "", f"{len(table)} seeds; {machine}.", ""])
    (args.directory / "results.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
