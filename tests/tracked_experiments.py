"""Write MLflow experiments without training: PPO runs and evaluations with random curves and scores."""

import json
import time
from pathlib import Path

import numpy as np
import yaml
from mlflow.entities import Metric
from mlflow.tracking import MlflowClient

SAMPLES_PER_STEP = 64


def learning_curves(seed, *, points=40, gain=2.0, kl=4.0, length=30.0, rising_length=0.0):
    """Return curves of an ordinary run: score and KL approach their final values, with noise."""
    rng = np.random.default_rng(seed)
    time = np.linspace(0.0, 1.0, points)
    progress = 1 - np.exp(-3.5 * time)
    return {
        "objective/scores": -0.5 + gain * progress + rng.normal(0, 0.12, points),
        "objective/kl": kl * progress * (1 + rng.normal(0, 0.06, points)),
        "entropy": 2.1 - 0.7 * progress + rng.normal(0, 0.03, points),
        "completions/mean_length": length * (1 + rising_length * time) + rng.normal(0, 0.8, points),
        "completions/clipped_ratio": np.clip(0.05 + rng.normal(0, 0.01, points), 0, 1),
        "val/explained_variance": 0.75 * progress - 0.1 + rng.normal(0, 0.05, points),
        "episode": SAMPLES_PER_STEP * np.arange(1, points + 1),
        "num_tokens": 3_000.0 * np.arange(1, points + 1),
    }


def log_ppo_run(uri, experiment, curves, options, *, seed=0, name="ppo", status="FINISHED", tags=None):
    """Record a PPO run and return its id. `options` is the part of the configuration that the test is about."""
    client = MlflowClient(uri)
    run_id = _create(client, experiment, name, {"stage": "ppo", "seed": str(seed), **(tags or {})})
    steps = [
        Metric(metric, float(value), 1_700_000_000_000 + step, step)
        for metric, values in curves.items()
        for step, value in enumerate(values, start=1)
    ]
    steps += [Metric("train_runtime", 120.0, 1_700_000_000_000, len(curves.get("episode", [0])))]
    steps += [
        Metric("system/system_memory_usage_megabytes", value, 1_700_000_000_000 + step, step)
        for step, value in enumerate((2_100.0, 3_400.0, 2_900.0))
    ]
    for start in range(0, len(steps), 900):  # MLflow takes a thousand at a time
        client.log_batch(run_id, metrics=steps[start : start + 900])
    config = {
        "PPOArguments": {"reward_model_path": "runs/rm", "reward_functions": []},
        "PPOConfig": {"seed": seed, "output_dir": f"runs/seed-{seed}/{name}", "kl_controller": "fixed", **options},
        "ModelConfig": {"model_name_or_path": f"runs/seed-{seed}/sft"},
    }
    client.log_text(run_id, yaml.safe_dump(config), "config.yaml")
    client.set_terminated(run_id, status)
    return run_id


def log_evaluation(uri, experiment, policy_run, rows, metrics, *, tags=None):
    """Record an evaluation of a PPO run, with its completions."""
    client = MlflowClient(uri)
    tags = {"stage": "evaluation", "lineage.policy": policy_run, **(tags or {})}
    run_id = _create(client, experiment, "evaluation", tags)
    client.log_batch(run_id, metrics=[Metric(name, value, 1_700_000_000_000, 0) for name, value in metrics.items()])
    client.log_text(run_id, yaml.safe_dump({"EvaluationArguments": {"reward_model_path": "runs/rm"}}), "config.yaml")
    client.log_text(run_id, "".join(json.dumps(row) + "\n" for row in rows), "completions.jsonl")
    client.set_terminated(run_id, "FINISHED")
    return run_id


def evaluation_rows(seed, advantage, *, prompts=24, answer="An answer."):
    """Return rows like recipes/evaluate.py. The mean score of the policy is `advantage` above the baseline."""
    rng, common = np.random.default_rng(seed), np.random.default_rng(99)
    rows = []
    for number in range(prompts):
        difficulty, reference = common.normal(), common.normal()
        rows.append(
            {
                "prompt": f"Question {number}: what is a river?\n",
                "policy_completion": f"{answer} ({seed})",
                "baseline_completion": f"The first answer to {number}.",
                "policy_gold_score": difficulty + advantage + rng.normal(),
                "baseline_gold_score": difficulty + reference,
                "policy_reward_model": difficulty + 1.5 * advantage + rng.normal(),
                "baseline_reward_model": difficulty + reference,
            }
        )
    return rows


def evaluation_metrics(win_rate=0.65, *, judges=("gold_score", "reward_model")):
    """Return metrics of such an evaluation, with an interval of +- 0.06."""
    metrics = {"prompts": 24.0, "policy/kl": 4.0, "policy/length": 30.0, "baseline/length": 28.0}
    for judge in judges:
        metrics |= {
            f"{judge}/policy": 1.0,
            f"{judge}/baseline": 0.0,
            f"{judge}/win_rate": win_rate,
            f"{judge}/win_rate_low": win_rate - 0.06,
            f"{judge}/win_rate_high": win_rate + 0.06,
        }
    return metrics


def _create(client, experiment, name, tags):
    found = client.get_experiment_by_name(experiment)
    experiment_id = found.experiment_id if found else client.create_experiment(experiment, _artifacts(client))
    started = int(time.time() * 1000) - 9 * 60 * 1000
    return client.create_run(experiment_id, start_time=started, run_name=name, tags=tags).info.run_id


def _artifacts(client):
    """Return a directory beside a SQLite file, or None for a server, which chooses its own."""
    file = client.tracking_uri.removeprefix("sqlite:///")
    return None if file == client.tracking_uri else str(Path(file).parent / "artifacts")
