"""Hypothesis strategies and seeded inputs shared by the unit tests."""

import torch
from hypothesis import strategies as st

seeds = st.integers(min_value=0, max_value=2**31 - 1)
unit_interval = st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.95, 0.99, 1.0])


@st.composite
def masks(draw, max_rows=4, max_columns=7):
    """Draw (B, T) int64 masks of all kinds: with holes, left padding, empty rows, or no valid cell."""
    rows, columns = draw(st.integers(1, max_rows)), draw(st.integers(1, max_columns))
    bits = draw(st.lists(st.integers(0, 1), min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(bits).view(rows, columns)


def gaussians(seed, shape, count):
    """Return `count` independent float64 N(0, 1) tensors of one shape."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def poison(tensor, mask, value=float("nan")):
    """Return a copy whose masked cells hold `value`, as padding is allowed to."""
    return torch.where(mask.bool(), tensor, torch.full_like(tensor, value))
