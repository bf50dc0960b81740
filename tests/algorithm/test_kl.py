"""estimate_kl: k1, k2, k3 of Schulman's note "Approximating KL Divergence", as expectations by enumeration."""

import math

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import gaussians, seeds
from tolerances import EXACT, FP32, FP64, SECOND_ORDER, assert_close

from rlhf_recipes.algorithm.kl import estimate_kl, full_kl

KINDS = ["k1", "k2", "k3"]
VOCABULARY = 7


def two_policies(seed, distance=1.0):
    """Return log-probabilities over a small vocabulary. `distance` scales the logit difference."""
    logits, step = gaussians(seed, (VOCABULARY,), 2)
    return torch.log_softmax(logits + distance * step, -1), torch.log_softmax(logits, -1)


def expectation(logps, ref_logps, kind):
    """Return E_{v ~ pi} of the estimate, without sampling: each vocabulary entry has the weight of its probability."""
    estimates = estimate_kl(logps[None], ref_logps[None], kind)[0]
    return math.fsum((logps.exp() * estimates).tolist())


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("k1", [[2.0, -2.0, 0.0]]),
        ("k2", [[2.0, 2.0, 0.0]]),
        ("k3", [[0.1353352832366127 - 1 + 2, 7.38905609893065 - 1 - 2, 0.0]]),  # e^-2, e^2
    ],
)
def test_hand_numbers(kind, expected):
    logps, ref_logps = torch.tensor([[-1.0, -3.0, -0.5]]), torch.tensor([[-3.0, -1.0, -0.5]])
    estimate = estimate_kl(logps, ref_logps, kind)
    assert_close(estimate, expected, FP32)
    assert estimate.dtype == torch.float32


@pytest.mark.parametrize("kind", ["k1", "k3"])
@given(seed=seeds, distance=st.sampled_from([0.01, 0.3, 1.0, 3.0]))
def test_the_mean_of_k1_and_k3_is_the_exact_kl(kind, seed, distance):
    logps, ref_logps = two_policies(seed, distance)
    exact = oracles.exact_kl(logps.tolist(), ref_logps.tolist())
    assert_close(expectation(logps, ref_logps, kind), exact, FP64)
    # The direction counts: KL(ref || pi) is another number.
    if distance >= 1.0:
        reverse = oracles.exact_kl(ref_logps.tolist(), logps.tolist())
        assert abs(expectation(logps, ref_logps, kind) - exact) < abs(reverse - exact)


@given(seed=seeds)
def test_the_mean_of_k2_is_the_kl_to_second_order(seed):
    logps, ref_logps = two_policies(seed, 0.005)
    exact = oracles.exact_kl(logps.tolist(), ref_logps.tolist())
    assert_close(expectation(logps, ref_logps, "k2"), exact, SECOND_ORDER)


@pytest.mark.parametrize("kind", ["k1", "k3"])
@given(seed=seeds)
def test_per_token_estimates_sum_to_the_sequence_kl(kind, seed):
    """E[sum_t k_t] over every two-token sequence = KL of the joint distributions (chain rule)."""
    first, first_ref = two_policies(seed)
    pairs = [two_policies(seed + 1 + token) for token in range(VOCABULARY)]
    second, second_ref = (torch.stack(side) for side in zip(*pairs, strict=True))
    logps = torch.stack([first.repeat_interleave(VOCABULARY), second.flatten()], dim=1)
    ref_logps = torch.stack([first_ref.repeat_interleave(VOCABULARY), second_ref.flatten()], dim=1)

    estimates = estimate_kl(logps, ref_logps, kind)

    assert estimates.shape == (VOCABULARY**2, 2)
    exact = oracles.exact_sequence_kl(*(x.tolist() for x in (first, first_ref, second, second_ref)))
    assert_close((logps.sum(1).exp() * estimates.sum(1)).sum(), exact, FP64)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_policies_have_exactly_zero_kl(kind):
    logps = torch.tensor([[-0.1, -2.345678, -30.0]])
    assert_close(estimate_kl(logps, logps.clone(), kind), torch.zeros(1, 3), EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_cell_stays_in_its_cell(kind):
    logps, ref_logps = (x.clone() for x in gaussians(0, (2, 3), 2))
    clean = estimate_kl(logps, ref_logps, kind)
    logps[1, 2] = ref_logps[0, 0] = float("nan")
    dirty = estimate_kl(logps, ref_logps, kind)
    assert dirty.isnan().nonzero().tolist() == [[0, 0], [1, 2]]
    kept = ~dirty.isnan()
    assert_close(dirty[kept], clean[kept], EXACT)


@pytest.mark.parametrize("kind", ["k4", "K1", "", None])
def test_an_unknown_kind_is_refused_with_the_known_ones(kind):
    with pytest.raises(ValueError, match=r"k1.*k2.*k3"):
        estimate_kl(torch.zeros(1, 1), torch.zeros(1, 1), kind)


@given(seed=seeds, distance=st.sampled_from([0.01, 1.0, 3.0]))
def test_the_full_kl_is_the_exact_one(seed, distance):
    pairs = [two_policies(seed + i, distance) for i in range(2)]
    ours, theirs = (torch.stack(rows) for rows in zip(*pairs, strict=True))
    expected = [oracles.exact_kl(row.tolist(), ref_row.tolist()) for row, ref_row in pairs]
    assert_close(full_kl(ours, theirs), expected, FP64)
    assert_close(full_kl(ours, ours), [0.0, 0.0], EXACT)


def test_a_token_that_is_never_chosen_adds_nothing():
    never = torch.tensor([[0.0, -math.inf]])
    assert_close(full_kl(never, never), [0.0], EXACT)
    assert_close(full_kl(never, torch.tensor([[0.5, 0.5]]).log()), [math.log(2)], FP32)
