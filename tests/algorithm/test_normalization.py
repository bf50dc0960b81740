"""RewardNormalizer: the debiased moving mean and variance, the refused options, and the state."""

import json
import math

import oracles
import pytest
import torch
from strategies import gaussians
from tolerances import BF16, EMA_STREAM, EXACT, FP32, FP64, assert_close

from rlhf_recipes.algorithm.normalization import RewardNormalizer

NAN, INF = float("nan"), float("inf")
TINY = 1e-30  # an eps that is too small to change a variance here


def fed(*batches, **options):
    """Return a normaliser after `update` on each batch."""
    normalizer = RewardNormalizer(**options)
    for batch in batches:
        normalizer.update(torch.as_tensor(batch))
    return normalizer


def statistics(normalizer):
    return float(normalizer.mean), float(normalizer.std) ** 2


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 0.9999])
def test_one_update_is_that_batch(decay):
    """The bias correction is exact: even a slow average forgets the start. The variance is not the sample's."""
    normalizer = fed([1.0, 2.0, 6.0, 7.0], decay=decay, eps=TINY)
    assert_close(statistics(normalizer), (4.0, 6.5), FP64)


def test_two_updates_by_hand():
    # W = 3/4, a = 2/3, d = 3: m = 1 + 2, V = (1/3)(1 + (2/3) 9) + 0 = 7/3. Raw moments agree: 34/3 - 3^2.
    normalizer = fed([0.0, 2.0], [4.0, 4.0], decay=0.5, eps=TINY)
    assert_close(statistics(normalizer), (3.0, 7 / 3), FP64)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.99])
def test_a_drifting_stream_follows_the_exact_average(decay):
    """The mean of 150 batches rises from 0 to 75, while their spread falls to a tenth."""
    batches = [
        (0.5 * step + gaussians(step, (1 + step % 7,), 1)[0] * (3 - 0.018 * step)).tolist() for step in range(150)
    ]
    normalizer = RewardNormalizer(decay=decay, eps=TINY)
    for step, batch in enumerate(batches, start=1):
        normalizer.update(torch.tensor(batch, dtype=torch.float64))
        if step in (2, 10, 150):
            expected = oracles.debiased_ema_moments(batches[:step], decay)
            assert_close(statistics(normalizer), expected, EMA_STREAM)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mean_far_from_zero_does_not_cancel(dtype):
    batches = [(1e4 + 0.05 * gaussians(step, (64,), 1)[0]).to(dtype) for step in range(30)]
    normalizer = fed(*batches, eps=TINY)
    expected = oracles.debiased_ema_moments([batch.tolist() for batch in batches], 0.99)
    assert 0.04 < math.sqrt(expected[1]) < 0.06
    assert_close(statistics(normalizer), expected, EMA_STREAM)
    normalized = normalizer.normalize(batches[-1].double())
    assert_close(normalized, (batches[-1].double() - expected[0]) / math.sqrt(expected[1]), FP32)


def test_a_constant_stream_normalises_to_zero():
    normalizer = fed([3.0, 3.0], [3.0], [3.0, 3.0, 3.0])
    assert_close(float(normalizer.mean), 3.0, FP64)
    assert_close(normalizer.normalize(torch.tensor([3.0, 3.0])), [0.0, 0.0], EXACT)


def test_normalize_by_hand_and_clipped_on_both_sides():
    normalizer = fed([1.0, 3.0], clip=2.0)  # mean 2, sd 1
    normalized = normalizer.normalize(torch.tensor([2.0, 3.0, 0.5, 100.0, -100.0]))
    assert_close(normalized, [0.0, 1.0, -1.5, 2.0, -2.0], FP32)
    assert normalized.max() == 2.0
    assert normalized.min() == -2.0


def test_the_defaults():
    normalizer = fed([1.0, 3.0])
    assert_close(normalizer.normalize(torch.tensor([1e6, -1e6])), [5.0, -5.0], EXACT)
    # decay 0.99: after the second batch the weights are .99 : 1.
    normalizer.update(torch.tensor([4.0]))
    assert_close(float(normalizer.mean), (0.99 * 2 + 4) / 1.99, FP64)


def test_eps_sits_under_the_root():
    normalizer = fed([1.0, 3.0], eps=3.0)
    assert_close(normalizer.normalize(torch.tensor([4.0], dtype=torch.float64)), [1.0], FP64)  # 2 / sqrt(1 + 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4,), (2, 2), (4, 1)])
def test_dtype_and_shape_survive(dtype, shape):
    normalizer = fed([1.0, 3.0])
    scores = torch.tensor([0.0, 1.0, 2.0, 3.5]).to(dtype).view(shape)
    normalized = normalizer.normalize(scores)
    assert normalized.dtype == dtype
    assert normalized.shape == shape
    assert_close(normalized.flatten(), [-2.0, -1.0, 0.0, 1.5], BF16)


def test_half_precision_scores_do_not_limit_the_statistics():
    """bfloat16 has no number for the mean of these scores, but the state is float64 for every input."""
    scores = torch.tensor([256.0, 258.0, 258.0], dtype=torch.bfloat16)
    assert_close(statistics(fed(scores, eps=TINY)), (772 / 3, 8 / 9), FP64)


def test_denormalize_inverts_what_is_not_clipped():
    normalizer = fed([10.0, 14.0, 30.0], [11.0, 13.0])
    scores = torch.linspace(5, 40, 8, dtype=torch.float64)
    normalized = normalizer.normalize(scores)
    assert normalized.abs().max() < 5.0
    assert_close(normalizer.denormalize(normalized), scores, FP64)
    hand = fed([1.0, 3.0], eps=TINY)
    assert_close(hand.denormalize(torch.tensor([0.0, -1.5], dtype=torch.float64)), [2.0, 0.5], FP64)


def test_normalize_does_not_learn():
    normalizer = fed([1.0, 3.0])
    before = normalizer.state_dict()
    normalizer.normalize(torch.tensor([50.0, NAN]))
    normalizer.denormalize(torch.tensor([1.0]))
    assert normalizer.state_dict() == before


def test_normalize_before_the_first_update_is_finite_and_bounded():
    normalized = RewardNormalizer(clip=5.0).normalize(torch.tensor([-2.0, 0.0, 2.0]))
    assert normalized.isfinite().all()
    assert normalized.abs().max() <= 5.0


def test_the_scores_are_left_alone():
    scores = torch.tensor([1.0, NAN, INF])
    normalizer = RewardNormalizer()
    normalizer.update(scores)
    normalizer.normalize(scores)
    assert scores.tolist()[0] == 1.0
    assert scores[1].isnan()
    assert scores[2].isinf()


def test_unscorable_scores_become_nan_and_the_others_do_not_notice():
    normalizer = fed([1.0, 3.0])
    normalized = normalizer.normalize(torch.tensor([3.0, NAN, INF, -INF, 1.0]))
    assert normalized.isnan().tolist() == [False, True, True, True, False]
    assert_close(normalized[[0, 4]], [1.0, -1.0], FP32)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_non_finite_scores_are_left_out_of_the_statistics(bad):
    clean, dirty = fed([0.0, 1.0], [2.0, 6.0]), fed([0.0, 1.0], [2.0, bad, 6.0])
    assert dirty.state_dict() == clean.state_dict()


@pytest.mark.parametrize("nothing", [[], [NAN], [NAN, INF, -INF]])
def test_a_batch_without_a_finite_score_does_not_move_it(nothing):
    normalizer = fed([0.0, 1.0])
    before = normalizer.state_dict()
    normalizer.update(torch.tensor(nothing))
    assert normalizer.state_dict() == before
    # The weight of the past does not move either: the next real batch is the second one.
    normalizer.update(torch.tensor([4.0]))
    assert normalizer.state_dict() == fed([0.0, 1.0], [4.0]).state_dict()


def test_a_first_batch_without_a_finite_score_leaves_it_new():
    assert fed([NAN]).state_dict() == RewardNormalizer().state_dict()
    assert_close(statistics(fed([NAN], [1.0, 3.0], eps=TINY)), (2.0, 1.0), FP64)


@pytest.mark.parametrize(
    "options", [{"decay": 1.0}, {"decay": -0.1}, {"decay": 1.5}, {"decay": NAN}, {"clip": 0.0}, {"clip": -1.0}]
)
def test_impossible_settings_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        RewardNormalizer(**options)


def through_json(state):
    return json.loads(json.dumps(state, allow_nan=False))


@pytest.mark.parametrize("n_updates", [0, 1, 7])
def test_state_round_trips_bit_for_bit_through_json(n_updates):
    batches = [batch * 3 + 100 for batch in gaussians(0, (5,), 12)]
    original = fed(*batches[:n_updates], decay=0.97)
    copy = RewardNormalizer(decay=0.97)
    copy.update(torch.tensor([-1e3, 1e3]))  # loading replaces this
    copy.load_state_dict(through_json(original.state_dict()))
    assert copy.state_dict() == original.state_dict()
    for batch in batches[n_updates:]:
        assert_close(copy.normalize(batch), original.normalize(batch), EXACT)
        original.update(batch)
        copy.update(batch)
        assert copy.state_dict() == original.state_dict()
    assert (copy.mean, copy.std) == (original.mean, original.std)


def test_the_saved_state_is_a_snapshot():
    normalizer = fed([1.0, 3.0])
    state = normalizer.state_dict()
    kept = through_json(state)
    normalizer.update(torch.tensor([50.0]))
    assert state == kept
    assert normalizer.state_dict() != kept


def test_it_is_outside_the_module_tree():
    """The buffers of a module would be cast to bf16 and sharded with the model."""
    assert not isinstance(RewardNormalizer(), torch.nn.Module)


def test_warm_start_sets_fully_trusted_statistics():
    normalizer = RewardNormalizer(decay=0.5, eps=TINY)
    normalizer.warm_start(4.0, 2.0)
    assert_close(statistics(normalizer), (4.0, 4.0), FP64)
    assert_close(normalizer.normalize(torch.tensor([7.0])), [1.5], FP32)


def test_an_update_after_a_warm_start_has_weight_one_minus_decay():
    # W = 1, a = 1/2, d = 4: m = 2, V = (1/2)(1 + (1/2) 16) + 1/2 = 5.
    normalizer = RewardNormalizer(decay=0.5, eps=TINY)
    normalizer.warm_start(0.0, 1.0)
    normalizer.update(torch.tensor([3.0, 5.0]))
    assert_close(statistics(normalizer), (2.0, 5.0), FP64)


def test_warm_start_forgets_the_past():
    fresh, used = RewardNormalizer(), fed([100.0, 200.0])
    for normalizer in (fresh, used):
        normalizer.warm_start(1.0, 2.0)
    assert used.state_dict() == fresh.state_dict()
