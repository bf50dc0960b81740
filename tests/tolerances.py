"""The only place where a test tolerance is a number (test_architecture.py enforces it).

Each constant is a pair for `torch.testing.assert_close`. Choose the tightest one that the arithmetic allows.
"""

import torch

EXACT = {"rtol": 0.0, "atol": 0.0}
"""Bit for bit: hand numbers that are binary fractions, round trips, unchanged cells."""
FP64 = {"rtol": 1e-10, "atol": 1e-10}
"""The same formula with another order of operations, both in float64."""
FP32 = {"rtol": 1e-5, "atol": 1e-6}
"""Computed in float32, compared with float64."""
FIRST_UPDATE = {"rtol": 0.0, "atol": 4e-6}
"""Log-probabilities of one float32 model, computed in batches of different size: 8 units in the last place of -5."""
NO_KL = {"rtol": 0.0, "atol": 1e-6}
"""Policy and reference in the same batches, and averages over many tokens."""
SCORES = {"rtol": 0.0, "atol": 1e-5}
"""Scores of order 1 of one float32 model, computed in batches of different width."""
SPLIT = {"rtol": 1e-4, "atol": 1e-6}
"""One float32 loss or gradient, summed over micro-batches in another order."""
MERGED = {"rtol": 1e-4, "atol": 1e-5}
"""Logits of order 1 in float32, with an adapter beside the weights and added to them."""
BF16 = {"rtol": 1.6e-2, "atol": 1e-2}
"""Computed in bfloat16 (8 bits of mantissa)."""
GPU_FP32 = {"rtol": 0.0, "atol": 1e-5}
"""Norm of the difference over the norm, GPU against CPU, both float32: only the order of the sums differs."""
GPU_BF16 = {"rtol": 0.0, "atol": 5e-2}
"""The same with bfloat16 on the GPU: 8 bits of mantissa, through two layers and back."""
EMA_STREAM = {"rtol": 1e-9, "atol": 1e-9}
"""A float64 recursion of a few hundred steps against exact rationals."""
FP32_LARGE_MEAN = {"rtol": 5e-3, "atol": 5e-2}
"""Whitened float32 N(1e4, 0.05): the spacing of the inputs is 1e-3 = sd/50. The raw-moment form is off by > 1."""
FP32_LARGE_VARIANCE = {"rtol": 5e-3, "atol": 0.0}
"""The variance of these inputs, 0.0025: an absolute tolerance would be larger than it."""
TABLE_3_DECIMALS = {"rtol": 0.0, "atol": 6e-4}
"""The notes' GAE table: three decimals, each row computed from the *rounded* row below it (so .114 for .11343)."""
FINITE_DIFFERENCE = {"rtol": 1e-6, "atol": 1e-7}
"""A central difference of step 1e-5 in float64."""
SAMPLED_STD = {"rtol": 0.05, "atol": 0.0}
"""The standard deviation of 1,280 draws: two standard errors are 4 %."""
SECOND_ORDER = {"rtol": 2e-2, "atol": 0.0}
"""k2 equals KL up to a relative error of the order of the log-ratio."""

ALL = {name: value for name, value in globals().items() if name.isupper()}


def assert_close(actual, expected, tolerance):
    """Compare in float64. Shapes must agree, dtypes and devices need not. NaN equals nothing, not even NaN."""
    actual, expected = (torch.as_tensor(x, dtype=torch.float64).detach().cpu() for x in (actual, expected))
    torch.testing.assert_close(actual, expected, **tolerance)
