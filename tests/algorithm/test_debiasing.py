"""What length explains of the labels, as a margin of each pair."""

import numpy as np
import pytest
import scipy.optimize
import torch
from tolerances import EXACT, FINITE_DIFFERENCE, FP64, assert_close
from torch.nn.functional import logsigmoid

from rlhf_recipes.algorithm.debiasing import length_margins


def _gaps(seed, slope, count=400):
    rng = np.random.default_rng(seed)
    gaps = rng.normal(0, 30, count).round()
    swapped = rng.random(count) > 1 / (1 + np.exp(-slope * gaps))
    return torch.tensor(np.where(swapped, -gaps, gaps))


@pytest.mark.parametrize("slope", [-0.2, -0.01, 0.0, 0.05])
def test_the_margins_are_those_of_a_regression_by_scipy(slope):
    gaps = _gaps(0, slope)
    units = (gaps / gaps.square().mean().sqrt()).numpy()
    loss = lambda b: np.logaddexp(0, -b * units).sum() + b * b / 2  # noqa: E731
    best = scipy.optimize.minimize_scalar(loss, bracket=(-5, 5), tol=1e-12).x
    assert_close(length_margins(gaps), torch.tensor(-best * units), FINITE_DIFFERENCE)


def test_a_score_gains_nothing_from_length():
    """The derivative of the loss along the length is that of the ridge, which many pairs outweigh."""
    gaps = _gaps(1, 0.05, count=100_000)
    margins = length_margins(gaps)
    units = gaps / gaps.square().mean().sqrt()
    per_unit = torch.zeros((), dtype=torch.double, requires_grad=True)
    loss = lambda offset: -logsigmoid(per_unit * units - offset).mean()  # noqa: E731
    (with_margins,) = torch.autograd.grad(loss(margins), per_unit)
    (without,) = torch.autograd.grad(loss(0), per_unit)
    assert abs(with_margins) < 1e-4 * abs(without)


def test_pairs_that_length_separates_have_finite_margins():
    margins = length_margins(torch.tensor([5, 10, 15, 20]))
    assert margins.isfinite().all()
    assert (margins < 0).all()  # the longer one was chosen anyway, so the score need not reach zero


def test_pairs_of_equal_length_have_no_margin():
    assert_close(length_margins(torch.tensor([0, 0, 0])), torch.zeros(3, dtype=torch.double), EXACT)


def test_exchanging_the_answers_exchanges_the_sign_of_the_margin():
    """Rows that are mirrored in length and label say the same about length."""
    gaps = torch.tensor([30, -10, 4, 8, -7])
    assert_close(length_margins(torch.cat([gaps, -gaps])), torch.zeros(10, dtype=torch.double), FP64)
