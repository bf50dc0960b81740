"""What users write as messages is read as plain messages, or refused with the message that is wrong."""

import json

import pytest

from rlhf_recipes.data.messages import conversation, ends_in_prefill, parsed_messages, plain_messages

USER = {"role": "user", "content": "hi"}


def _said(content, role="assistant"):
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ([{"type": "text", "text": "hi"}], "hi"),
        ([{"type": "text", "text": "hi "}, {"type": "text", "text": "you"}], "hi you"),
        ([{"type": "text", "text": "hi", "image": None}], "hi"),  # as Arrow fills it
        ([{"text": "hi"}, "!"], "hi!"),
        ([{"type": "input_text", "text": "hi"}], "hi"),
        ([], ""),
    ],
)
def test_parts_are_joined(parts, text):
    assert plain_messages([_said(parts, "user")]) == [_said(text, "user")]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (_said([{"type": "image", "image": "x.png", "text": None}]), "message 1 holds a part of type 'image'"),
        (_said([{"type": "audio", "text": "a"}]), "message 1 holds a part of type 'audio'"),
        (_said([{"type": "text", "text": None}]), "message 1 holds a part without text"),
        (_said(None), r"message 1 \(assistant\) has no text as its `content`, but None"),
        ({"role": "user"}, r"message 1 \(user\) has no text"),
        ({"content": "hi"}, "message 1 has no `role`, only 'content'"),
        ("hi", "message 1 is str and no dictionary"),
    ],
)
def test_a_message_that_cannot_be_read(message, reason):
    with pytest.raises(ValueError, match=reason):
        plain_messages([USER, message])


def test_a_call_of_a_tool_needs_no_content():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    assert plain_messages([USER, call]) == [USER, call]


def test_the_keys_of_sharegpt():
    chat = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert plain_messages(chat) == [_said("s", "system"), _said("q", "user"), _said("a")]


def test_parts_stay_for_a_model_that_sees_images():
    image = [_said([{"type": "image", "image": "x.png"}], "user")]
    assert plain_messages(image, keep_parts=True) == image
    assert plain_messages("text") == "text"


def test_messages_as_json_text():
    assert parsed_messages(json.dumps([USER])) == [USER]
    assert parsed_messages(json.dumps([{"from": "human", "value": "hi"}])) == [{"from": "human", "value": "hi"}]


@pytest.mark.parametrize(
    "text",
    [
        "hi",
        "[1, 2]",
        '{"role": "user"}',
        '[{"a": 1}]',
        '[{"role": "user"} and more',
        '[{"role": "admin", "name": "b"}]',
        None,
    ],
)
def test_other_text_is_no_json_of_messages(text):
    assert parsed_messages(text) == text


def test_python_is_no_json():
    with pytest.raises(ValueError, match="looks like a list of messages as text, but it is no JSON"):
        parsed_messages(str([USER]))


def test_an_answer_continues_a_prefill():
    prompt = [USER, _said("Sure, ")]
    assert ends_in_prefill(prompt)
    assert not ends_in_prefill([USER])
    assert not ends_in_prefill("text")
    assert conversation(prompt, [_said("here.")]) == [USER, _said("Sure, here.")]
    assert conversation([USER], [_said("here.")]) == [USER, _said("here.")]
    assert prompt == [USER, _said("Sure, ")]
