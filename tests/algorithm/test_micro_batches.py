"""The cut into micro-batches is the best one, and needs no more memory than equal micro-batches."""

import random

import oracles
import pytest
import torch

from rlhf_recipes.algorithm.micro_batches import BLOCK, computed_tokens, cut_rows, cut_together


def _equal(columns, size):
    return columns[columns.sum(dim=1).argsort(stable=True)].split(size)


def _check(columns, size):
    """Check that a cut holds every row once, in as many micro-batches as the equal cut, and return its tokens."""
    parts, equal = cut_rows(columns, size), _equal(columns, size)
    assert sorted(torch.cat(parts).tolist()) == list(range(len(columns)))
    assert len(parts) == len(equal)
    assert all(len(part) > 0 for part in parts)
    tokens = [computed_tokens(columns[part]) for part in parts]
    assert max(tokens) <= max(map(computed_tokens, equal))
    assert sum(tokens) <= sum(map(computed_tokens, equal))
    return sum(tokens)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("seed", range(6))
def test_the_cut_is_the_best_of_all_cuts(seed, size):
    draw = random.Random(seed)
    rows = [[draw.randint(1, 6), draw.choice([1, 2, draw.randint(1, 20), 20])] for _ in range(9)]
    assert _check(torch.tensor(rows), size) == oracles.least_tokens(rows, size)
    lengths = [[sum(row)] for row in rows]
    assert _check(torch.tensor(lengths), size) == oracles.least_tokens(lengths, size)


def test_a_long_tail_costs_what_it_needs():
    """Thirty short rows take three micro-batches, and the two long ones the fourth."""
    columns = torch.tensor([[2, 8]] * 30 + [[2, 198]] * 2)
    assert [len(part) for part in _equal(columns, 8)] == [8] * 4
    assert _check(columns, 8) == 30 * 10 + 2 * 200


def test_memory_does_not_rise():
    """Without the limit, 29 rows of 100 tokens would share a micro-batch: 2,900 tokens instead of 8 x 130."""
    columns = torch.tensor([[100]] * 29 + [[130]] + [[120]] * 2)
    assert max(map(len, cut_rows(columns, 8))) <= 10
    _check(columns, 8)


def test_logits_do_not_rise():
    """By tokens alone, the eight short prompts would share a micro-batch of 8 x 250 logits instead of 4 x 250."""
    columns = torch.tensor([[10, 250]] * 8 + [[1000, 10], [900, 10], [500, 10], [400, 10]])
    assert max(len(part) * int(columns[part, 1].max()) for part in cut_rows(columns, 4)) <= 4 * 250
    _check(columns, 4)


def test_rows_of_one_length_keep_the_equal_cut():
    assert [part.tolist() for part in cut_rows(torch.full((6, 2), 7), 2)] == [[0, 1], [2, 3], [4, 5]]


def test_a_last_micro_batch_can_have_fewer_rows():
    columns = torch.tensor([[3], [9], [3], [3], [3]])
    assert sorted(part.tolist() for part in cut_rows(columns, 4)) == [[0, 2, 3, 4], [1]]


def test_many_rows_are_cut_in_blocks():
    draw = random.Random(0)
    columns = torch.tensor([[draw.randint(1, 50), draw.randint(1, 500)] for _ in range(BLOCK + 100)])
    _check(columns, 3)


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows_need_no_cut(rows):
    assert [len(part) for part in cut_rows(torch.ones(rows, 2, dtype=torch.long), 4)] == ([1] if rows else [0])


def test_processes_cut_into_the_same_sizes():
    """The cut is the best for both together: the first process has rows of one length, the second one long row."""
    columns = torch.tensor([[[10]] * 8, [[1]] * 4 + [[100]] + [[1]] * 3])
    parts = cut_together(columns, 4)
    assert [part.shape for part in parts] == [(2, 7), (2, 1)]
    assert parts[1][1].tolist() == [4]
    assert sorted(torch.cat(parts, dim=1)[0].tolist()) == list(range(8))
