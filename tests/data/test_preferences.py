"""Preferences in every form that is read, and refusals that name the column or the row."""

import pytest
from datasets import Dataset

from rlhf_recipes.data.preferences import in_form_of, preference_set

PAIR = {"prompt": ["p", "q"], "chosen": ["a", "bb"], "rejected": ["c", "d"]}


def _user(text):
    return {"role": "user", "content": text}


def _assistant(text):
    return [{"role": "assistant", "content": text}]


def test_pairs_with_the_columns_of_reward_bench():
    read = preference_set(Dataset.from_dict(PAIR | {"subset": ["one", "two"], "id": [3, 4]}))
    assert (read.chosen, read.rejected) == ([["a"], ["bb"]], [["c"], ["d"]])
    assert (read.categories, read.ids, read.lengths) == (["one", "two"], ["3", "4"], [[1, 1], [2, 1]])
    assert read.is_pairs
    assert preference_set(Dataset.from_dict(PAIR | {"kind": ["x", "y"]}), "kind").categories == ["x", "y"]
    assert preference_set(Dataset.from_dict(PAIR)).categories is None


def test_rows_of_reward_bench_2():
    rows = {"prompt": ["p", "q"], "chosen": [["a"], ["b", "c"]], "rejected": [["x", "y", "z"], ["w"]]}
    read = preference_set(Dataset.from_dict(rows))
    assert read.answers == [["a", "x", "y", "z"], ["b", "c", "w"]]
    assert not read.is_pairs


def test_whole_chats_share_their_prompt():
    chats = {"chosen": [[_user("p"), *_assistant("a")]], "rejected": [[_user("p"), *_assistant("b")]]}
    read = preference_set(Dataset.from_dict(chats))
    assert read.prompts["prompt"][0] == [_user("p")]
    assert (read.chosen, read.rejected) == ([[_assistant("a")]], [[_assistant("b")]])


@pytest.mark.parametrize(
    ("changes", "column", "message"),
    [
        ({"rejected": None}, None, "`dataset_name` has no column 'rejected'; it has 'prompt', 'chosen'"),
        ({"prompt": None}, None, "`dataset_name` is plain text without a column 'prompt'"),
        ({}, "kind", r"`dataset_name` has no column 'kind' with categories \(`category_column`\); it has"),
        ({"subset": ["a", " "]}, None, r"`dataset_name` has no category in row 1 \(column 'subset'\)"),
        ({"chosen": ["a", ""]}, None, "`dataset_name` has an empty 'chosen' in row 1"),
        ({"chosen": [["a"], []], "rejected": [["b"], ["c"]]}, None, "no list of texts as 'chosen' in row 1"),
        ({"chosen": [["a"], ["b"]], "rejected": [["c", ""], ["d"]]}, None, "no list of texts as 'rejected' in row 0"),
        ({"chosen": [["a"], ["b"]], "rejected": None}, None, "`dataset_name` has no column 'rejected'; it has"),
        ({"prompt": None, "chosen": [["a"], ["b"]], "rejected": [["c"], ["d"]]}, None, "has no column 'prompt'"),
    ],
)
def test_refusals(changes, column, message):
    rows = {name: values for name, values in (PAIR | changes).items() if values is not None}
    with pytest.raises(ValueError, match=message):
        preference_set(Dataset.from_dict(rows), column)


def test_the_form_is_that_of_the_reader():
    prompts = Dataset.from_dict({"prompt": ["p"]})
    asked, answers = in_form_of(prompts, [["a", "b"]], "\n", conversational=False)
    assert (asked["prompt"][0], answers) == ("p\n", [["a", "b"]])
    asked, answers = in_form_of(prompts, [["a", "b"]], "\n", conversational=True)
    assert (asked["prompt"][0], answers) == ([_user("p")], [[_assistant("a"), _assistant("b")]])
    chats = Dataset.from_dict({"prompt": [[_user("p")]]})
    assert in_form_of(chats, [[_assistant("a")]], "\n", conversational=False)[0] is chats
