"""PPO's formulas, a page each: PyTorch and nothing else."""
