"""FixedKLController and AdaptiveKLController (Ziegler et al. 2019, section 2.2)."""

import json

import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tolerances import EXACT, FP64, assert_close

from rlhf_recipes.algorithm.kl_controller import AdaptiveKLController, FixedKLController

NAN, INF = float("nan"), float("inf")


def adaptive(kl_coef=0.1, target_kl=6.0, kl_horizon=10_000):
    return AdaptiveKLController(kl_coef, target_kl, kl_horizon)


def after(controller, kl, n_sequences):
    controller.update(kl, n_sequences)
    return controller.kl_coef


@pytest.mark.parametrize("kl", [0.0, 1e6, -3.0, NAN, INF])
def test_a_fixed_coefficient_never_moves(kl):
    assert after(FixedKLController(0.05), kl, 512) == 0.05


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.1),
        (6.6, 0.1 * (1 + 0.1 * 0.05)),  # 10 % over the target, 500 of 10000 sequences
        (5.4, 0.1 * (1 - 0.1 * 0.05)),
        (7.2, 0.1 * 1.01),  # the largest step, both ways
        (600.0, 0.1 * 1.01),
        (4.8, 0.1 * 0.99),
        (0.0, 0.1 * 0.99),
        (-2.0, 0.1 * 0.99),  # the k1 estimate of a KL can be negative
    ],
)
def test_one_step_by_hand(kl, expected):
    assert_close(after(adaptive(), kl, 500), expected, FP64)


@given(
    kl=st.floats(-20, 50), target_kl=st.floats(0.1, 20), n_sequences=st.integers(1, 512), kl_coef=st.floats(1e-3, 2)
)
def test_one_step_matches_the_definition(kl, target_kl, n_sequences, kl_coef):
    expected = oracles.adaptive_kl_coef(kl_coef, kl, target_kl=target_kl, kl_horizon=10_000, n_sequences=n_sequences)
    assert_close(after(adaptive(kl_coef, target_kl), kl, n_sequences), expected, FP64)


@pytest.mark.parametrize("start", [0.001, 5.0])
def test_it_drives_the_kl_to_the_target_from_both_sides(start):
    """The KL of this toy policy is 1 / kl_coef: it reaches the target 4 at coefficient 1/4."""
    controller = adaptive(start, target_kl=4.0, kl_horizon=1000)
    for _ in range(1000):
        controller.update(1 / controller.kl_coef, 64)
    assert_close(controller.kl_coef, 0.25, FP64)


@pytest.mark.parametrize("kl", [NAN, INF, -INF])
def test_a_non_finite_kl_leaves_it_alone(kl):
    controller = adaptive()
    controller.update(9.0, 500)
    before = controller.state_dict()
    controller.update(kl, 500)
    assert controller.state_dict() == before


@pytest.mark.parametrize("n_sequences", [10_000, 50_000, 100_000])
def test_it_stays_positive_however_low_the_kl_and_recovers(n_sequences):
    """e = -0.2 and n = 10 horizons make the raw factor 1 - 2 < 0; 0.8 ** 5000 is below the smallest double."""
    controller = adaptive()
    for _ in range(5000):
        controller.update(0.0, n_sequences)
        assert controller.kl_coef > 0
    low = controller.kl_coef
    controller.update(60.0, n_sequences)
    assert controller.kl_coef > low


@pytest.mark.parametrize("make", [adaptive, lambda kl_coef=0.1: FixedKLController(kl_coef)])
def test_state_round_trips_bit_for_bit_through_json(make):
    original, copy = make(0.1), make(7.0)
    for kl in (3.0, 7.7, 6.1):
        original.update(kl, 333)
    copy.load_state_dict(json.loads(json.dumps(original.state_dict(), allow_nan=False)))
    for kl in (1.0, 13.0):
        assert_close(copy.kl_coef, original.kl_coef, EXACT)
        assert copy.state_dict() == original.state_dict()
        original.update(kl, 333)
        copy.update(kl, 333)
    assert copy.kl_coef == original.kl_coef
