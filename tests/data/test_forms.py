"""Text and messages are accepted, and every other form is refused by its row."""

import pytest

from rlhf_recipes.data.forms import check_forms


def _chat(text="a", role="assistant"):
    return [{"role": role, "content": text}]


@pytest.mark.parametrize(
    "values",
    [
        ["a", "b"],
        [_chat(), _chat("b")],
        [[{"from": "gpt", "value": "a"}]],
        [[{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]],
    ],
)
def test_text_or_messages(values):
    check_forms(values, "chosen", "data")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a", 3], r"a number \(int\) as 'chosen' in row 1"),
        (["a", 2.5], r"a number \(float\) as 'chosen' in row 1"),
        ([True], r"a number \(bool\) as 'chosen' in row 0"),
        (["a", None], "an empty 'chosen' in row 1"),
        (["a", " "], "an empty 'chosen' in row 1"),
        ([_chat(), _chat("")], "an empty 'chosen' in row 1"),
        ([[]], "an empty 'chosen' in row 0"),
        ([{"role": "assistant", "content": "a"}], "a dictionary with the keys 'role', 'content' as 'chosen' in row 0"),
        ([{"from": "gpt", "value": "a"}], "a dictionary with the keys 'from', 'value' .* a list of messages"),
        ([_chat(), [{"speaker": "a"}]], "dictionaries with the keys 'speaker' instead of 'role' and 'content'"),
        ([_chat(), ["a"]], "a list of the type str as 'chosen' in row 1"),
        ([*[_chat()] * 9, "a"], "has text as 'chosen' in row 9, and messages before"),
        (["a", _chat()], "has messages as 'chosen' in row 1, and text before"),
    ],
)
def test_any_other_form_is_refused_by_its_row(values, message):
    with pytest.raises(ValueError, match=message):
        check_forms(values, "chosen", "data")
