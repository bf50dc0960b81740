"""The weights of best of n are the mean over all subsets, by enumeration."""

from itertools import combinations
from math import comb, inf, log, nan

import pytest
import torch
from tolerances import FP64, assert_close

from rlhf_recipes.algorithm.best_of_n import best_of_n_kl_bound, best_of_n_weights


def _enumerated(scores, figures, n):
    """Return the mean figure of the best of n over all subsets; equally good ones are equally likely."""
    known = [-inf if score != score else score for score in scores]
    means = []
    for subset in combinations(range(len(scores)), n):
        best = [i for i in subset if known[i] == max(known[j] for j in subset)]
        means.append(sum(figures[i] for i in best) / len(best))
    assert len(means) == comb(len(scores), n)
    return sum(means) / len(means)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
@pytest.mark.parametrize(
    "scores",
    [
        pytest.param([0.3, -1.0, 2.0, 0.7, 1.1, -0.2], id="different"),
        pytest.param([1.0, 0.0, 1.0, 1.0, 0.0, -2.0], id="ties"),
        pytest.param([0.5] * 6, id="all equal"),
        pytest.param([0.3, nan, 2.0, nan, 1.1, -0.2], id="missing"),
    ],
)
def test_the_weighted_sum_is_the_mean_over_all_subsets(scores, n):
    figures = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6]
    weights = best_of_n_weights(torch.tensor([scores, scores[::-1]]), n)
    expected = [_enumerated(scores, figures, n), _enumerated(scores[::-1], figures, n)]
    assert_close((weights * torch.tensor(figures, dtype=torch.float64)).sum(dim=1), expected, FP64)
    assert_close(weights.sum(dim=1), [1.0, 1.0], FP64)


def test_hand_numbers():
    """Of three samples, the pairs are (low, mid), (low, high), (mid, high): the highest wins two of them."""
    assert_close(best_of_n_weights(torch.tensor([[7.0, 1.0, 3.0]]), 2), [[2 / 3, 0.0, 1 / 3]], FP64)
    assert_close(best_of_n_weights(torch.tensor([[7.0, 1.0, 3.0]]), 3), [[1.0, 0.0, 0.0]], FP64)


def test_the_bound_of_the_kl():
    assert best_of_n_kl_bound(1) == 0.0
    assert_close(best_of_n_kl_bound(4), log(4) - 0.75, FP64)
