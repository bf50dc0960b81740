"""Token ids against the vocabulary and the context, for prompts of every form."""

import pytest
import tiny
from datasets import Dataset

from rlhf_recipes.data import tokens
from rlhf_recipes.data.prompts import check_prompts_fit

CONFIG = tiny.policy(tiny.tokenizer()).config  # 307 tokens, 128 positions


def _check(texts, *, chat=False, tok=None, config=CONFIG):
    prompts = [[{"role": "user", "content": text}] for text in texts] if chat else texts
    check_prompts_fit(Dataset.from_dict({"prompt": prompts}), tok or tiny.tokenizer(), config, 8, "eval_dataset")


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("batch", [1, 2, 1_000])
def test_the_longest_prompt_is_named_by_its_row(monkeypatch, chat, batch):
    monkeypatch.setattr(tokens, "BATCH", batch)
    message = r"prompt in row 3 of `eval_dataset` has \d+ tokens; .* exceeds the model's 128 positions. So do 1 others"
    with pytest.raises(ValueError, match=message):
        _check(["a", "word " * 150, "b", "word " * 200], chat=chat)
    _check(["a", "b"], chat=chat)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("batch", [1, 2, 1_000])
def test_a_token_without_a_row_in_the_embedding_is_named(monkeypatch, chat, batch):
    monkeypatch.setattr(tokens, "BATCH", batch)
    tok = tiny.tokenizer()
    tok.add_tokens(["<x>", "<y>"])
    _check(["a", "b"], chat=chat, tok=tok)
    with pytest.raises(ValueError, match=r"`eval_dataset` has the token '<y>' \(id 308\) in row 2, but the model's"):
        _check(["a", "b", "c <y>", "<x>"], chat=chat, tok=tok)


def test_a_padded_vocabulary_has_room():
    tok = tiny.tokenizer(vocab_size=280)
    tok.add_tokens(["<x>"])
    _check(["a <x>"], tok=tok)
