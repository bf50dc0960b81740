"""Rows are read into one form, and what no model could read as it was meant is refused with its row."""

import json
from contextlib import nullcontext

import pytest
import tiny
from datasets import Dataset, IterableDataset
from tokenizers.processors import TemplateProcessing

from rlhf_recipes.data.loading import without_answers
from rlhf_recipes.data.rows import check_rendering, check_reward_columns, join_prefill, readable_rows

PAIRS = ("prompt", "chosen", "rejected")
LONG = "How long does the ferry to the island take?"


def _user(content):
    return {"role": "user", "content": content}


def _assistant(content):
    return {"role": "assistant", "content": content}


def _read(rows, columns=("prompt",), **options):
    return readable_rows(Dataset.from_list(rows), columns, "train_dataset", **options)


@pytest.mark.parametrize("value", [_user("a"), _user([{"type": "text", "text": "a", "image": None}])])
@pytest.mark.parametrize("as_json", [False, True])
def test_every_form_of_a_message_becomes_the_same(value, as_json):
    rows = [{"prompt": json.dumps([value]) if as_json else [value], "n": n} for n in range(3)]
    assert list(_read(rows)) == [{"prompt": [_user("a")], "n": n} for n in range(3)]


def test_rows_that_are_right_stay_the_same_dataset():
    for data in (tiny.preferences(), tiny.preferences(chat=True)):
        assert readable_rows(data, PAIRS, "train_dataset") is data
    assert readable_rows(None, PAIRS, "train_dataset") is None


def test_rows_with_and_without_parts(tmp_path):
    """`datasets` reads such a file, and gives the content as JSON."""
    rows = [{"prompt": [_user("a")]}, {"prompt": [_user([{"type": "text", "text": "b"}])]}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = Dataset.from_json(str(tmp_path / "train.jsonl"), cache_dir=str(tmp_path))
    assert list(without_answers(data)["prompt"]) == [[_user("a")], [_user("b")]]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (
            [_user([{"type": "image", "text": None}])],
            "'prompt' that cannot be read in row 2: message 0 holds a part of type",
        ),
        ([{"role": "user", "content": None}], "in row 2: message 0 .user. has no text"),
        ([], "empty 'prompt' in row 2"),
    ],
)
def test_a_bad_row_is_named(bad, reason):
    good = [_user([{"type": "text", "text": "a"}])]
    data = Dataset.from_list([{"prompt": good}, {"prompt": good}, {"prompt": bad}])
    with pytest.raises(ValueError, match=reason):
        readable_rows(data, ("prompt",), "train_dataset")


def test_text_after_messages_in_one_column():
    rows = [{"prompt": json.dumps([_user("a")])}] * 100 + [{"prompt": "plain text"}]
    with pytest.raises(ValueError, match="mixes text and messages in 'prompt': row 100 differs"):
        _read(rows)


@pytest.mark.parametrize("order", [1, -1])
def test_a_task_about_messages_is_text(order):
    rows = [{"prompt": "plain text"}, {"prompt": json.dumps([_user("a")])}][::order]
    assert list(_read(rows)) == rows


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        (str([_user("a")]), "it looks like a list of messages as text, but it is no JSON"),
        (_user("a"), "a dictionary with the keys 'role', 'content' as 'prompt' in row 0. Use text, or a list"),
    ],
)
def test_a_prompt_that_only_looks_like_messages(prompt, reason):
    with pytest.raises(ValueError, match=reason):
        _read([{"prompt": prompt}])


@pytest.mark.parametrize("asked", [[_user("q")], [_user("q"), _assistant("a"), _user("r")]])
def test_messages_of_the_prompt_are_taken_out_of_the_answers(asked):
    row = {"prompt": asked, "chosen": [*asked, _assistant("x")], "rejected": [*asked, _assistant("y")]}
    expected = {"prompt": asked, "chosen": [_assistant("x")], "rejected": [_assistant("y")]}
    assert list(_read([row], PAIRS)) == [expected]


def test_an_answer_that_begins_with_the_user():
    row = {"prompt": [_user("p"), _assistant("a"), _user("q")], "completion": [_user("q"), _assistant("x")]}
    with pytest.raises(ValueError, match="a 'completion' in row 0 that begins with a message of the user"):
        _read([row], ("prompt", "completion"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("q?", "q? yes", "q? no")] * 3, "'chosen' and 'rejected' in row 0 and 2 others"),
        ([("a", "b", "c")] * 9 + [(LONG, f"{LONG} An hour.", f"{LONG} A day.")], None),  # a warning
        ([("a", "b", "c")] * 9 + [(LONG, f"{LONG} An hour.", "A day.")], None),
        ([("I", "I see", "Is it"), *[("a", "b", "c")] * 9], None),  # by chance
        ([("echo", "echo", "echo")] * 3, None),  # the answer is the prompt and nothing more
    ],
)
def test_text_that_repeats_its_prompt(rows, message):
    data = [dict(zip(PAIRS, row, strict=True)) for row in rows]
    if message is None:
        assert len(_read(data, PAIRS)) == len(rows)
        return
    with pytest.raises(ValueError, match=f"holds the prompt again at the beginning of .*{message}"):
        _read(data, PAIRS)


def test_a_stream_is_read_row_by_row():
    rows = [{"prompt": [_user([{"type": "text", "text": "a"}])]}, {"prompt": [_user([{"type": "image"}])]}]
    stream = iter(readable_rows(IterableDataset.from_generator(lambda: iter(rows)), ("prompt",), "train_dataset"))
    assert next(stream) == {"prompt": [_user("a")]}
    with pytest.raises(ValueError, match="cannot be read in row 1: message 0 holds a part of type 'image'"):
        next(stream)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prefill_moves_into_both_answers(stream):
    data = tiny.preferences(chat=True, count=2)
    begun = data.map(lambda row: {"prompt": [*row["prompt"], _assistant("Well, ")]})
    rows = list(join_prefill(begun.to_iterable_dataset() if stream else begun))
    for row, plain in zip(rows, data, strict=True):
        assert row["prompt"] == plain["prompt"]
        for side in ("chosen", "rejected"):
            assert row[side] == [_assistant("Well, " + plain[side][0]["content"])]
    assert join_prefill(data) is data


def test_a_prompt_of_a_prefill_alone():
    data = Dataset.from_list(
        [{"prompt": [_assistant("a")], "chosen": [_assistant("b")], "rejected": [_assistant("c")]}]
    )
    with pytest.raises(ValueError, match="row 0 holds nothing but the beginning of the answer"):
        join_prefill(data)


SYSTEM = {"role": "system", "content": "be short"}
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
ALTERNATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)
DROPS = tiny.CHAT_TEMPLATE.replace("messages %}", "messages if m['role'] != 'system' %}")


@pytest.mark.parametrize(
    ("template", "prompt", "message"),
    [
        (NO_SYSTEM + tiny.CHAT_TEMPLATE, [SYSTEM, _user("a")], r"refused by .* \(System role not supported\)"),
        (ALTERNATE + tiny.CHAT_TEMPLATE, [_user("a"), _user("b")], r"\(roles must alternate\). .* user, user"),
        (DROPS, [SYSTEM, _user("a")], r"has a message 0 \(system\) that the chat template leaves out"),
        (tiny.CHAT_TEMPLATE, [{"role": "bot", "content": "a"}, _user("a")], "has the unknown role 'bot'"),
        (None, [_user("a")], "holds messages, but the tokenizer has no chat template"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("columns", [("prompt",), ("messages",), PAIRS])
def test_a_chat_that_the_template_cannot_render(template, prompt, message, columns):
    tok = tiny.tokenizer()
    tok.chat_template = template
    answers = {"chosen": [_assistant("x")], "rejected": [_assistant("y")]}
    rows = [{columns[0]: chat, **answers} for chat in ([_user("a")], [_user("b")], prompt)]
    row = 0 if template is None else 2
    with pytest.raises(ValueError, match=f"Row {row} of `train_dataset` .*{message}"):
        check_rendering(Dataset.from_list(rows), columns, "train_dataset", tok)


def test_an_answer_that_the_template_refuses():
    tok = tiny.tokenizer()
    tok.chat_template = ALTERNATE + tok.chat_template
    rows = [{"prompt": [_user("a")], "completion": [_assistant("x")] * n} for n in (1, 2)]
    with pytest.raises(ValueError, match="Row 1 of `d` is refused .*Its roles are user, assistant, assistant"):
        check_rendering(Dataset.from_list(rows), ("prompt", "completion"), "d", tok)


def test_a_role_of_the_template_is_known():
    tok = tiny.tokenizer()
    tok.chat_template += "{# knows the role 'critic' #}"
    data = Dataset.from_list([{"prompt": [{"role": "critic", "content": "a"}]}])
    check_rendering(data, ("prompt",), "train_dataset", tok)


def test_a_message_that_the_template_rewrites_is_read():
    """Some templates take a switch such as `/no_think` from the message of the system."""
    tok = tiny.tokenizer()
    switch = "{% if '/no_think' in messages[0]['content'] %}<eos>{% endif %}"
    tok.chat_template = switch + tok.chat_template.replace(
        "m['content'] }}", "m['content'].replace('/no_think', '') }}"
    )
    rows = [{"prompt": [{**SYSTEM, "content": text}, _user("a")]} for text in ("/no_think", "be short. /no_think")]
    for row in rows:
        check_rendering(Dataset.from_list([row]), ("prompt",), "train_dataset", tok)


def test_the_template_renders_one_row_of_a_kind(monkeypatch):
    tok = tiny.tokenizer()
    asked = []
    real = tok.apply_chat_template
    monkeypatch.setattr(tok, "apply_chat_template", lambda *a, **k: asked.append(a) or real(*a, **k))
    check_rendering(tiny.prompts(chat=True, count=64), ("prompt",), "train_dataset", tok)
    assert len(asked) == 2


def test_a_text_that_holds_the_bos_of_the_tokenizer():
    tok = tiny.tokenizer()
    data = Dataset.from_dict({"prompt": ["a", "<pad>b"]})
    tok.bos_token = "<pad>"
    check_rendering(data, ("prompt",), "train_dataset", tok)
    tok.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 0)])
    with pytest.raises(ValueError, match="'prompt' in row 1 that begins with '<pad>', which the tokenizer writes too"):
        check_rendering(data, ("prompt",), "train_dataset", tok)


@pytest.mark.parametrize(
    "column", ["prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments"]
)
def test_a_column_with_the_name_of_an_argument(column):
    data = Dataset.from_dict({"prompt": ["a"], column: ["b"]})
    with pytest.raises(ValueError, match=f"`train_dataset` has a column '{column}'.*rename_column"):
        check_reward_columns(data, "train_dataset")


@pytest.mark.parametrize(("image", "is_refused"), [("x.png", True), (None, False)])
def test_images_beside_the_prompts_of_a_model_for_text(image, is_refused):
    data = Dataset.from_dict({"prompt": ["a", "b"], "image": [None, image]})
    check_reward_columns(data, "train_dataset")
    with pytest.raises(ValueError, match="images in the column 'image'") if is_refused else nullcontext():
        check_reward_columns(data, "train_dataset", sees_images=False)


def test_arguments_of_a_judge_of_pairs():
    data = Dataset.from_dict({"prompt": ["a"], "completions_a": ["b"]})
    check_reward_columns(data, "eval_dataset")
    check_reward_columns(None, "eval_dataset")
    with pytest.raises(ValueError, match="a column 'completions_a'"):
        check_reward_columns(data, "eval_dataset", pairs=True)


@pytest.mark.parametrize(("column", "value"), [("tools", [{"name": "add"}]), ("chat_template_kwargs", {"style": "x"})])
def test_a_column_that_only_sft_gives_to_the_template(column, value):
    tok = tiny.tokenizer()
    data = Dataset.from_list([{"prompt": [_user("a")], column: value}])
    if column == "tools":
        check_rendering(data, ("prompt",), "train_dataset", tok)  # its template reads no tools
        tok.chat_template = "{% if tools %}{{ tools }}{% endif %}" + tok.chat_template
    with pytest.raises(ValueError, match=f"`train_dataset` has a column '{column}' for the chat template"):
        check_rendering(data, ("prompt",), "train_dataset", tok)
    check_rendering(data, ("prompt",), "train_dataset", tok, reads_options=True)
    check_rendering(data.map(lambda row: {column: None}), ("prompt",), "train_dataset", tok)


def test_a_prompt_of_the_system_alone_may_be_answered_by_the_user():
    system = [{"role": "system", "content": "s"}]
    row = {"prompt": system, "completion": [_user("q"), _assistant("a")]}
    assert list(_read([row], ("prompt", "completion"))) == [row]


def test_a_few_answers_may_repeat_their_prompt(caplog):
    rows = [{"prompt": f"def add_numbers(first, second, {i}):", "completion": " pass"} for i in range(10)]
    rows[4]["completion"] = rows[4]["prompt"] + " pass"
    assert list(_read(rows, ("prompt", "completion"))) == rows
    assert "in row 4. If they are not meant so" in caplog.text
