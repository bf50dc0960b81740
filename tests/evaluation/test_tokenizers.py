"""A baseline with another tokenizer is refused: its KL to the policy would mean nothing."""

import pytest
import tiny
from tokenizers.normalizers import Lowercase

from rlhf_recipes.evaluation.tokenizers import check_baseline

CONFIG = tiny.policy(tiny.tokenizer()).config


def _check(tmp_path, baseline, policy=None, config=CONFIG, **data):
    baseline.save_pretrained(tmp_path)
    check_baseline(policy or tiny.tokenizer(), str(tmp_path), config, tiny.prompts(**data))


@pytest.mark.parametrize("chat", [False, True])
def test_the_same_tokenizer_passes_also_with_other_settings(tmp_path, chat):
    baseline = tiny.tokenizer(pad_is_eos=True)
    baseline.chat_template, baseline.padding_side = None, "right"
    _check(tmp_path, baseline, chat=chat)


def test_a_directory_without_a_tokenizer_has_nothing_to_compare(tmp_path):
    check_baseline(tiny.tokenizer(), str(tmp_path), CONFIG, tiny.prompts())


def test_a_token_of_another_id_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"`baseline_path` \S+ has another tokenizer than the policy: token 300 is '"):
        _check(tmp_path, _swapped(300, 301))


def _swapped(first, second):
    tok = tiny.tokenizer()
    text = tok.backend_tokenizer.to_str()
    one, other = (tok.convert_ids_to_tokens(i) for i in (first, second))
    marked = text.replace(f'"{one}":{first}', f'"{one}":{second}').replace(f'"{other}":{second}', f'"{other}":{first}')
    return tok.__class__(tokenizer_object=tok.backend_tokenizer.from_str(marked), pad_token="<pad>", eos_token="<eos>")


def test_a_token_that_the_baseline_does_not_have_is_named(tmp_path):
    policy = tiny.tokenizer()
    policy.add_tokens(["<|call|>"])
    with pytest.raises(ValueError, match=r"the baseline has no token 307 \('<\|call\|>'\)"):
        _check(tmp_path, tiny.tokenizer(), policy)
    padded = type(CONFIG)(**CONFIG.to_dict() | {"vocab_size": 320})
    _check(tmp_path, tiny.tokenizer(), policy, padded)  # a padded embedding has a row for it


def test_the_same_tokens_by_another_rule_are_noticed(tmp_path):
    baseline = tiny.tokenizer()
    baseline.backend_tokenizer.normalizer = Lowercase()
    _check(tmp_path, baseline)  # these prompts have no capitals
    prompts = tiny.prompts().map(lambda row: {"prompt": row["prompt"].upper()})
    with pytest.raises(ValueError, match="they split 'HELLO' into other tokens"):
        check_baseline(tiny.tokenizer(), str(tmp_path), CONFIG, prompts)
