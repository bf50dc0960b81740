"""The counts of the preflight over a dataset, with one defect in each test."""

import time

import pytest
from datasets import Dataset

from rlhf_recipes.preflight.dataset import check_preferences, check_prompts


def _prompts(*texts, chat=False):
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": t}] for t in texts] if chat else list(texts)})


def _pairs(rows, chat=False):
    names = ("prompt", "chosen", "rejected")
    role = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    columns = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    if chat:
        columns = {n: [[{"role": role[n], "content": t}] for t in texts] for n, texts in columns.items()}
    return Dataset.from_dict(columns)


def _said(findings):
    assert {finding.level for finding in findings} <= {"warning"}
    return [finding.message for finding in findings]


GOOD = [("p", "yes", "no"), ("q", "no", "never"), ("r", "a", "bc"), ("s", "abc", "d")]


@pytest.mark.parametrize("chat", [False, True])
def test_repeated_prompts(chat):
    assert _said(check_prompts(_prompts("a", "b", "a", "c", "a", chat=chat), None)) == [
        "2 of 5 prompts are repeated: they are drawn more often. Drop duplicates (for example row 2)."
    ]


@pytest.mark.parametrize("chat", [False, True])
def test_held_out_prompts_that_are_not(chat):
    (message,) = _said(check_prompts(_prompts("a", "b", chat=chat), _prompts("c", "b", chat=chat)))
    assert message.startswith("1 of 2 evaluation prompts are in the training data")
    assert "row 1" in message


def test_a_prompt_far_longer_than_the_others():
    (message,) = _said(check_prompts(_prompts("a" * 10, "b" * 10, "c" * 4_001), None))
    assert message.startswith("The prompt in row 2 has 4,001 characters, the median 10")
    assert _said(check_prompts(_prompts("a" * 10, "b" * 10, "c" * 4_000), None)) == []
    assert _said(check_prompts(_prompts("a" * 300, "b" * 300, "c" * 6_000), None)) == []


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("t", "same", "same"), "1 of 5 pairs have the same text as `chosen` and `rejected`"),
        (("p", "yes", "no"), "1 of 5 pairs are repeated"),
        (("p", "no", "yes"), "2 of 5 pairs contradict another one"),
    ],
)
def test_a_bad_pair_is_counted(row, message, chat):
    (said,) = _said(check_preferences(_pairs([*GOOD, row], chat), None))
    assert said.startswith(message)
    assert f"row {0 if 'contradict' in message else 4}" in said


@pytest.mark.parametrize("row", [("t", "yes", "no"), ("t", "no", "yes")])
def test_the_same_answers_to_another_prompt_are_another_pair(row):
    assert check_preferences(_pairs([*GOOD, row]), None) == []


def test_pairs_without_a_prompt_column():
    pairs = _pairs([*GOOD, GOOD[0]], chat=True).remove_columns("prompt")
    (message,) = _said(check_preferences(pairs, pairs))
    assert message.startswith("1 of 5 pairs are repeated")


@pytest.mark.parametrize(("longer", "word"), [(3, "longer"), (1, "shorter")])
def test_length_that_decides(longer, word):
    rows = [(str(i), "long text" if i < longer else "x", "x" if i < longer else "long text") for i in range(4)]
    (message,) = _said(check_preferences(_pairs(rows), None))
    assert message.startswith(f"The {word} answer is chosen in 75% of the pairs")


def test_what_is_rare_is_not_worth_a_line():
    rows = [(str(i), "ab" if i % 2 else "a", "a" if i % 2 else "bc") for i in range(199)]
    assert check_preferences(_pairs([*rows, rows[0]]), None) == []
    assert len(check_preferences(_pairs([*rows, *rows[:3]]), None)) == 1


def test_time_is_linear_in_rows_and_small():
    rows = [(f"prompt {i} " * 10, f"chosen {i} " * 20, f"rejected {i} " * 20) for i in range(20_000)]
    data = _pairs(rows, chat=True)
    start = time.process_time()
    check_preferences(data, data)
    assert time.process_time() - start < 10  # 1.3 s on the machine of recipes/README.md; 6.2 s for 100,000
