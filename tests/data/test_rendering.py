"""A prompt is rendered for its answer: begun answers go on, nothing ends it, and nothing is read twice."""

import pytest
import tiny
from tokenizers.processors import ByteLevel, RobertaProcessing, Sequence, TemplateProcessing

from rlhf_recipes.data.rendering import answered_ids, for_training, prompt_ids

USER, ASSISTANT = {"role": "user", "content": "the fox"}, {"role": "assistant", "content": "is red"}
TURNS = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
HEADER = "{% if add_generation_prompt %}<|assistant|>{% endif %}"


def _tokenizer(single="<pad> $A <eos>", *, sequence=False, template=None):
    tok = tiny.tokenizer()
    special = [(token, tok.convert_tokens_to_ids(token)) for token in ("<pad>", "<eos>")]
    processor = TemplateProcessing(single=single, special_tokens=special)
    tok.backend_tokenizer.post_processor = Sequence([ByteLevel(), processor]) if sequence else processor
    tok.chat_template = template or tok.chat_template
    return tok


def _read(tok, prompts):
    return [tok.decode(ids) for ids in prompt_ids(tok, prompts)]


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("single", ["<pad> $A <eos>", "$A <eos>", "$A <eos> <eos>", "<pad> $A"])
def test_nothing_that_the_tokenizer_appends_ends_a_prompt(single, sequence):
    tok = _tokenizer(single, sequence=sequence)
    opener = "<pad>" if single.startswith("<pad>") else ""
    assert _read(tok, ["the fox", [USER], "red"]) == [
        opener + "the fox",
        "<|user|>the fox<|assistant|>",
        opener + "red",
    ]


@pytest.mark.parametrize("single", ["<pad> $A <eos>", "<pad> $A"])
def test_an_answer_has_one_eos_and_one_that_was_cut_off_has_none(single):
    tok = _tokenizer(single)
    read = [tok.decode(answered_ids(tok, "the fox", " is red", finished)) for finished in (True, False)]
    assert read == ["<pad>the fox is red<eos>", "<pad>the fox is red"]


def test_the_template_holds_the_special_tokens_of_a_chat():
    tok = _tokenizer(template="<pad>" + tiny.CHAT_TEMPLATE)
    assert _read(tok, [[USER]]) == ["<pad><|user|>the fox<|assistant|>"]
    assert tok.decode(answered_ids(tok, [USER], [ASSISTANT], True)) == "<pad><|user|>the fox<|assistant|>is red<eos>"


def test_a_prefill_is_continued_and_stands_beside_other_prompts():
    tok = tiny.tokenizer()
    prompts = [[USER, ASSISTANT], [USER], "the fox", [USER, {**ASSISTANT, "content": "is "}]]
    assert _read(tok, prompts) == [
        "<|user|>the fox<|assistant|>is red", "<|user|>the fox<|assistant|>", "the fox",
        "<|user|>the fox<|assistant|>is ",
    ]  # fmt: skip
    more = [{"role": "assistant", "content": " and big"}]
    assert tok.decode(answered_ids(tok, [USER, ASSISTANT], more, True)).endswith("<|assistant|>is red and big<eos>")


@pytest.mark.parametrize("prompt", [[USER], [USER, ASSISTANT], "the fox"])
def test_a_prompt_begins_what_the_reward_model_reads(prompt):
    tok = _tokenizer()
    answer = " today" if isinstance(prompt, str) else [{"role": "assistant", "content": " today"}]
    asked = prompt_ids(tok, [prompt])[0]
    assert answered_ids(tok, prompt, answer, True)[: len(asked)] == asked


def test_parts_are_read_as_their_text():
    tok = tiny.tokenizer()
    parts = [{"role": "user", "content": [{"type": "text", "text": "the fox", "image": None}]}]
    assert prompt_ids(tok, [parts]) == prompt_ids(tok, [[USER]])
    assert answered_ids(tok, parts, [ASSISTANT], True) == answered_ids(tok, [USER], [ASSISTANT], True)


@pytest.mark.parametrize(
    ("template", "read"),
    [
        (TURNS + HEADER + "{{ eos_token }}", "<|user|>the fox<|assistant|>"),  # it would end before the answer
        ("{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}", "the fox<eos>"),  # it ends each turn
        ("{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}" + HEADER,
         "<|user|>the fox<eos><|assistant|>"),
    ],
)  # fmt: skip
def test_an_eos_of_the_template_stays_only_where_an_answer_follows_it(template, read):
    assert _read(_tokenizer(template=template), [[USER], [USER]]) == [read, read]


@pytest.mark.parametrize("sequence", [False, True])
def test_training_gets_a_copy_that_appends_nothing(sequence):
    tok = _tokenizer(sequence=sequence)
    before = tok("the fox")["input_ids"]
    assert for_training(tok)("the fox")["input_ids"] == before[:-1]
    assert tok("the fox")["input_ids"] == before
    plain = _tokenizer("<pad> $A")
    assert for_training(plain) is plain


def test_what_cannot_be_switched_off_is_refused():
    tok = tiny.tokenizer()
    tok.backend_tokenizer.post_processor = RobertaProcessing(("<eos>", 1), ("<pad>", 0))
    with pytest.raises(ValueError, match="appends '<eos>' to every text.*`add_eos_token: false`"):
        for_training(tok)
