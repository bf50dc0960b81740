"""Plots of a training run.

Layer L2. Reads what the trainer wrote; trains and measures nothing.
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

PANELS = {
    "objective/scores": "score (raw)",
    "objective/kl": "KL to reference (nats per completion)",
    "completions/mean_length": "length (tokens)",
    "val/explained_variance": "explained variance of the critic",
}


def plot_training(state_file: str | Path, output: str | Path) -> Path:
    """Draw score, KL, length and explained variance over optimiser steps.

    Args:
        state_file: `trainer_state.json` of a PPO run.
        output: PNG to write.

    Returns:
        `output`.
    """
    history = json.loads(Path(state_file).read_text(encoding="utf-8"))["log_history"]
    figure, axes = plt.subplots(2, 2, figsize=(9, 5.5), sharex=True, layout="constrained")
    for axis, (metric, label) in zip(axes.flat, PANELS.items(), strict=True):
        points = [(entry["step"], entry[metric]) for entry in history if metric in entry]
        axis.plot(*zip(*points, strict=True) if points else ([], []), linewidth=1.5)
        axis.set_title(label, fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("optimiser step")
    figure.savefig(output, dpi=110)
    plt.close(figure)
    return Path(output)
