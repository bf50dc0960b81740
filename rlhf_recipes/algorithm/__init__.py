"""PPO's formulas, one page each. Imports only PyTorch and the standard library."""
