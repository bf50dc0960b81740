"""Pairs of answers: which ones, and in which split."""

from collections import Counter

import pytest

from rlhf_recipes.data.pairs import best_and_worst, divide, key_of, longer_chosen, pairs_at_random

TEXTS = [f"answer {number}" for number in range(12)]  # of 3 prompts


def row(prompt, number=0, **others):
    return {"prompt": prompt, "chosen": f"good {number}", "rejected": f"bad {number}", **others}


def test_each_answer_is_in_one_disjoint_pair_with_one_of_its_prompt():
    pairs, left_out = pairs_at_random(3, 4, "disjoint", 0, TEXTS)
    assert sorted(number for pair in pairs for number in pair) == list(range(12))
    assert all(first // 4 == second // 4 for first, second in pairs)
    assert left_out == {"duplicates": 0, "empty": 0}
    assert pairs == pairs_at_random(3, 4, "disjoint", 0, TEXTS)[0] != pairs_at_random(3, 4, "disjoint", 1, TEXTS)[0]


def test_all_pairs_of_a_prompt_once_in_random_order():
    pairs, _ = pairs_at_random(3, 4, "all", 0, TEXTS)
    assert Counter(map(frozenset, pairs)) == Counter(
        frozenset({4 * prompt + a, 4 * prompt + b}) for prompt in range(3) for a in range(4) for b in range(a)
    )
    assert {first < second for first, second in pairs} == {True, False}


def test_equal_and_empty_answers_make_no_pair_and_are_counted():
    pairs, left_out = pairs_at_random(3, 2, "all", 0, ["a", " a\n", "a", " ", "a", "b"])
    assert [sorted(pair) for pair in pairs] == [[4, 5]]
    assert left_out == {"duplicates": 1, "empty": 1}


def test_the_best_and_the_worst_answer_of_each_prompt():
    scores = [1.0, 3.0, float("nan"), 2.0, 5.0, 5.0, 5.0, 5.0, float("nan"), float("nan"), float("nan"), 1.0]
    pairs, left_out = best_and_worst(scores, 4, TEXTS)
    assert pairs == [(1, 0), (4, 5)]  # equal scores: a pair that will be a tie
    assert left_out == {"duplicates": 0, "empty": 0, "unlabelled": 1}


def test_no_prompt_is_in_both_splits_and_another_run_divides_in_the_same_way():
    train, test, counts = divide([], [row(f"prompt {number}", other) for number in range(200) for other in (1, 2)])
    prompts = [{each["prompt"] for each in rows} for rows in (train, test)]
    assert not prompts[0] & prompts[1]
    assert 8 <= len(prompts[1]) <= 32
    assert counts == {"new": 400, "moved": 0, "repeated": 0}
    again, others, _ = divide([], [row(f"prompt {number}") for number in range(100, 300)])
    assert not {each["prompt"] for each in again} & prompts[1]
    assert not {each["prompt"] for each in others} & prompts[0]


def test_the_splits_of_earlier_pairs_stay_and_training_comes_first():
    """Prompt b is evaluated on in one earlier set and trained on in another: it must not be evaluated on."""
    earlier = [([row("a")], [row("b"), row("c\n")]), ([row("b", 1), row("a")], [row("d")])]
    train, test, counts = divide(earlier, [row("a", 2), row("c", 2), row("a")])
    assert [(each["prompt"], each["chosen"][-1]) for each in train] == [("a", "0"), ("b", "0"), ("b", "1"), ("a", "2")]
    assert [(each["prompt"], each["chosen"][-1]) for each in test] == [("c\n", "0"), ("d", "0"), ("c", "2")]
    assert counts == {"earlier": 5, "new": 2, "moved": 1, "repeated": 2}


def test_two_prompts_are_enough_and_one_is_not():
    for names in (["a", "b"], ["x", "y"], ["hello", "world"]):
        train, test, _ = divide([], [row(name) for name in names])
        assert len(train) == len(test) == 1
    with pytest.raises(ValueError, match="All pairs are about 1 prompt"):
        divide([], [row("a"), row("a", 1)])


def test_margins_of_earlier_pairs_stay_and_new_pairs_have_none():
    train, test, _ = divide([([row("a", margin=2.0)], [row("b", margin=1.0)])], [row("a", 1)])
    assert [each["margin"] for each in (*train, *test)] == [2.0, 0.0, 1.0]


def test_a_prompt_is_the_same_with_a_separator_and_with_other_keys():
    assert key_of("hello\n\n") == key_of("hello") != key_of("Hello")
    chats = [[{"role": "user", "content": "hello", **other}] for other in ({}, {"name": None})]
    assert key_of(chats[0]) == key_of(chats[1])


def test_the_share_of_longer_chosen_answers():
    pairs = [("aaa", "b"), ("a", "bbb"), ("aaaa", "b"), ("a", "b")]
    assert longer_chosen([{"chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]) == 2 / 3
    assert longer_chosen([]) == 0.5
