"""What the length of the answers explains of their labels."""

import torch
from torch import Tensor


def length_margins(length_gaps: Tensor) -> Tensor:
    """Return a margin for each pair, so that the score need not explain which answer is longer.

    The length alone predicts the label by a logistic regression without intercept, on the gaps `g_i` between the
    lengths of the chosen and the rejected answer, in units of their root mean square:
    `b = argmax sum_i log sigmoid(b g_i) - b^2 / 2`.
    With the margin `m_i = -b g_i` the Bradley-Terry loss `-log sigmoid(r+ - r- - m_i)` reads `r+ - r- + b g_i`. The
    second part is not a part of the score. So a constant score has no gradient along the length, and a score learns
    the rest of the label. The term `b^2 / 2` keeps `b` finite if the chosen answer is always the longer one.

    The margins depend on the data alone, and not on how it is cut into batches or spread over processes.

    Args:
        length_gaps: `(N,)`, length of the chosen less length of the rejected answer, in tokens.

    Returns:
        `(N,)`, in logits. Zero if all gaps are zero.

    Source: the regression with a term for length, Dubois et al. 2024, arXiv:2404.04475, section 3. Differs: there it
    corrects win rates after the fact, and here it is fixed before training.
    """
    gaps = length_gaps.double()
    scale = gaps.square().mean().sqrt()
    if not scale > 0:
        return torch.zeros_like(gaps)
    gaps = gaps / scale
    return -_logistic_slope(gaps) * gaps


def _logistic_slope(gaps: Tensor) -> Tensor:
    """Return `b` by Newton's method. From 0 it cannot pass the root: the curvature falls with `|b|`."""
    slope = gaps.new_zeros(())
    for _ in range(100):
        wrong = torch.sigmoid(-slope * gaps)
        step = ((wrong * gaps).sum() - slope) / ((wrong * (1 - wrong) * gaps.square()).sum() + 1)
        slope = slope + step
        if abs(step) < 1e-10:
            break
    return slope
