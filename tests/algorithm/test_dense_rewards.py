"""onto_own_tokens, centered_parts."""

import pytest
import torch
from hypothesis import given
from strategies import gaussians, masks, poison, seeds
from tolerances import EXACT, FP64, assert_close

from rlhf_recipes.algorithm.advantages import last_valid_index
from rlhf_recipes.algorithm.dense_rewards import centered_parts, onto_own_tokens

# Rows: plain, right-padded, with a hole (tool tokens), left-padded with two holes, empty.
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 1], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0]])


def test_rewards_outside_of_the_mask_move_to_the_own_token_before_them():
    rewards = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0]]).repeat(5, 1)
    rewards[1, 3:] = 0.0  # padding
    expected = [
        [1.0, 2.0, 4.0, 8.0, 16.0],
        [1.0, 2.0, 4.0, 0.0, 0.0],
        [1.0, 14.0, 0.0, 0.0, 16.0],
        [0.0, 7.0, 0.0, 24.0, 0.0],
        [0.0, 0.0, 0.0, 0.0, 0.0],
    ]
    assert_close(onto_own_tokens(rewards, MASK), expected, EXACT)


def test_centered_parts_by_hand():
    parts = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0]]).repeat(5, 1) * torch.tensor([[1.0], [2.0], [3.0], [4.0], [9.0]])
    means = torch.tensor([2.0, 5.0, 4.0, 8.0, 0.0])  # of rows 0 to 2; of all but the last; of row 0; of row 0
    expected = parts.clone()
    for row, columns in enumerate(((0, 1, 2, 3), (0, 1), (0, 1), (1,), ())):
        for column in columns:
            expected[row, column] -= means[column]
    centered = centered_parts(parts, MASK)
    assert_close(centered * MASK, expected * MASK, EXACT)


@given(seed=seeds, mask=masks())
def test_centered_parts_have_mean_zero_at_every_place(seed, mask):
    (parts,) = gaussians(seed, mask.shape, 1)
    centered = centered_parts(poison(parts, mask, float("nan")), mask)
    earlier = mask.bool() & (torch.arange(mask.size(1)) < last_valid_index(mask).unsqueeze(1))
    assert_close(torch.where(earlier, centered, 0).sum(dim=0), torch.zeros(mask.size(1)), FP64)
    moved = torch.where(earlier, centered - parts, torch.nan).nanmean(dim=0, keepdim=True).nan_to_num()
    assert_close(torch.where(earlier, centered - parts - moved, 0), torch.zeros_like(parts), FP64)


@pytest.mark.parametrize("last", [0.0, 5.0])
def test_parts_of_nothing_before_the_last_token_stay_nothing(last):
    parts = torch.zeros(5, 5)
    parts[torch.arange(5), last_valid_index(MASK)] = last
    assert_close(centered_parts(parts, MASK), parts, EXACT)
