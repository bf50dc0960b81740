"""Draw a plot of one training run."""

import json
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt

matplotlib.use("Agg")
PANELS = {
    "objective/scores": "score (raw)",
    "objective/kl": "KL to reference (nats per completion)",
    "completions/mean_length": "length (tokens)",
    "val/explained_variance": "explained variance of the critic",
}


def plot_training(state_file: str | Path, output: str | Path) -> Path:
    """Draw score, KL, length and explained variance over optimiser steps, and evaluations during training as points.

    Args:
        state_file: `trainer_state.json` of a PPO run.
        output: Path of the PNG.

    Returns:
        `output`.
    """
    history = json.loads(Path(state_file).read_text(encoding="utf-8"))["log_history"]
    figure, axes = plt.subplots(2, 2, figsize=(9, 5.5), sharex=True, layout="constrained")
    for axis, (metric, label) in zip(axes.flat, PANELS.items(), strict=True):
        for name, style in ((metric, {}), (f"eval_{metric}", {"marker": "o", "linestyle": ":", "label": "held out"})):
            points = [(entry["step"], entry[name]) for entry in history if name in entry]
            axis.plot(*zip(*points, strict=True) if points else ([], []), linewidth=1.5, **style)
        axis.set_title(label, fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("optimiser step")
    if any("eval_loss" in entry for entry in history):
        axes[0, 0].legend(frameon=False, fontsize=9)
    figure.savefig(output, dpi=110)
    plt.close(figure)
    return Path(output)
