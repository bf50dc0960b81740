"""The mistakes between policy, sampler and reward model, one in each test."""

from types import SimpleNamespace

import pytest
import tiny
from datasets import Dataset
from transformers import GenerationConfig

from rlhf_recipes.preflight.policy import (
    answers_of,
    card_findings,
    end_findings,
    probe,
    sampling_findings,
    sampling_options,
    score_findings,
    turn_findings,
)
from rlhf_recipes.rewards.card import RewardModelCard
from rlhf_recipes.rewards.process import ProcessRewardModelCard

GIVEN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # set by TRL for its sampler


def _options(tmp_path, model=None, **options):
    return sampling_options(tiny.ppo_config(tmp_path, **options), GIVEN, model)


def test_the_defaults_sample_the_policy(tmp_path):
    assert _options(tmp_path, GenerationConfig()) == {}
    assert _options(tmp_path, temperature=0.7) == {}, "which TRL's log-probabilities know"
    assert _options(tmp_path, generation_kwargs={"min_new_tokens": 0, "max_time": 9.0}) == {}


@pytest.mark.parametrize(
    ("name", "value"), [("top_p", 0.9), ("top_k", 20), ("min_p", 0.1), ("repetition_penalty", 1.05)]
)
def test_an_option_of_the_run(tmp_path, name, value):
    options = _options(tmp_path, **{name: value})
    assert list(options) == [name]
    (finding,) = sampling_findings(options)
    assert finding.level == "warning"
    assert f"`{name}: {value}` (the options of this run)" in finding.message


def test_generation_kwargs_of_the_run(tmp_path):
    assert list(_options(tmp_path, generation_kwargs={"no_repeat_ngram_size": 3, "top_k": 5})) == [
        "no_repeat_ngram_size",
        "top_k",
    ]


def test_what_a_model_brings_counts_where_the_sampler_does_not_set_it(tmp_path):
    brought = GenerationConfig(repetition_penalty=1.05, top_k=20, no_repeat_ngram_size=3, suppress_tokens=[5])
    options = _options(tmp_path, brought)
    assert list(options) == ["no_repeat_ngram_size", "suppress_tokens"]
    assert "generation_config.json" in sampling_findings(options)[0].message
    assert _options(tmp_path, None) == {}, "vLLM does not ask the model"


@pytest.mark.parametrize(
    ("ids", "options", "level", "message"),
    [
        ([1], {}, None, ""),
        ([1, 9_999], {"suppress_tokens": [1]}, None, ""),
        ([1, 7], {"suppress_tokens": [1, 3]}, None, ""),
        ([1], {"min_new_tokens": 9}, None, ""),
        ([None], {}, "error", "no EOS token"),
        ([320, 321], {}, "error", "(320, 321) are outside the policy's vocabulary of 320"),
        ([1, 7], {"suppress_tokens": [7, 1]}, "warning", "are suppressed"),
        ([1], {"bad_words_ids": [[1], [3, 4]]}, "warning", "are suppressed"),
        ([1], {"min_new_tokens": 10}, "warning", "kept away by `min_new_tokens` (10)"),
    ],
)
def test_whether_an_answer_can_end(ids, options, level, message):
    found = end_findings(ids, 320, {name: (value, "x") for name, value in options.items()}, 10)
    assert [finding.level for finding in found] == ([level] if level else [])
    assert all(message in finding.message for finding in found)


def _scorer(**card):
    defaults = {"score_mean": 1.0, "score_std": 2.0, "eval_accuracy": 0.6}
    return SimpleNamespace(
        __name__="rm",
        card=RewardModelCard("base", False, "\n", "x", None, **{**defaults, **card}) if card != {"no": 1} else None,
    )


def _on_card(tmp_path, card, *, weight=1.0, alone=True, **options):
    found = card_findings(_scorer(**card), tiny.ppo_config(tmp_path, **options), weight, alone=alone)
    return " ".join(finding.message for finding in found)


def test_a_reward_model_no_better_than_chance(tmp_path):
    assert "ranks 50% of its evaluation pairs" in _on_card(tmp_path, {"eval_accuracy": 0.5})
    assert _on_card(tmp_path, {"eval_accuracy": 0.51}) == ""
    assert _on_card(tmp_path, {"eval_accuracy": None}) == ""
    assert card_findings(_scorer(no=1), tiny.ppo_config(tmp_path), 1.0, alone=True) == []
    steps = ProcessRewardModelCard("base", False, "\n", "x", None, eval_accuracy=0.5)  # a share of steps, not of pairs
    of_steps = SimpleNamespace(__name__="prm", card=steps)
    assert card_findings(of_steps, tiny.ppo_config(tmp_path), 1.0, alone=True) == []


@pytest.mark.parametrize(
    ("std", "options", "word"),
    [
        (4.1, {}, "lag"),
        (0.2, {}, "overshoot"),
        (3.9, {}, None),
        (4.1, {"cliprange_value": 0.3}, None),
        (4.1, {"reward_norm": True}, None),
        (4.1, {"weight": -0.9}, None),
        (2.1, {"weight": -2.0}, "lag"),
        (4.1, {"alone": False}, None),
    ],
)
def test_a_score_far_from_the_value_clip(tmp_path, std, options, word):
    said = _on_card(tmp_path, {"score_std": std}, **{"reward_norm": False, **options})
    assert (word in said) if word else said == ""
    assert word is None or "`reward_norm: true`" in said


def test_what_is_scored():
    prompts, answers, own = probe(["p", "q", "r"], ["1", "2", "3"])
    assert (prompts, answers, own) == (["p", "q", "r"] * 2, ["1", "2", "3", "2", "3", "1"], True)
    assert probe(["p", "q"], None) == (["p", "q"], ["q", "p"], False)
    assert len(probe(["p"] * 100, ["a"] * 100)[0]) == 16
    chat = [[{"role": "user", "content": "p"}], [{"role": "user", "content": "q"}]]
    _, answers, own = probe(chat, None)
    assert answers == [[{"role": "assistant", "content": "q"}], [{"role": "assistant", "content": "p"}]]
    assert probe(chat, chat)[2] is False, "a conversation that holds the prompt is no answer"
    assert probe(["p", "q"], chat)[2] is False


def test_where_answers_come_from():
    data = Dataset.from_dict({"prompt": ["p"], "chosen": ["good"], "rejected": ["bad"]})
    assert answers_of(data) == ["good"]
    assert answers_of(data.rename_column("chosen", "completion")) == ["good"]
    assert answers_of(data.select_columns("prompt")) is None


NAN = float("nan")


@pytest.mark.parametrize(
    ("scores", "own", "level", "message"),
    [
        ([1.0, 2.0, 0.0, 0.0], True, None, ""),
        ([1.0, 0.0, 0.0, 2.0], True, None, ""),
        ([0.0, 0.0, 1.0, 2.0], True, "warning", "in only 0 of 2 cases (mean 0.00 and 1.50)"),
        ([0.0, 0.0, 1.0, 2.0], False, None, ""),
        ([NAN, 2.0], False, "warning", "no finite score to 1 of 2"),
        ([NAN, NAN], True, "error", "no finite score to 2 of 2"),
        ([0.5, 0.5], False, "warning", "gives 0.5 to 2 different answers"),
        ([12.0, 13.0, 0.0, 0.0], True, "warning", "12.50 by rm, 6 deviations from the mean of its card (1.00)"),
        ([10.0, 11.0, 0.0, 0.0], True, None, ""),
    ],
)
def test_what_scores_say(scores, own, level, message):
    found = score_findings(_scorer(score_mean=1.0), scores, own, 5.0)
    assert [finding.level for finding in found] == ([level] if level else [])
    assert all(message in finding.message for finding in found)


def test_without_a_normaliser_there_is_no_clip():
    assert score_findings(_scorer(score_mean=1.0), [12.0, 13.0, 0.0, 0.0], True, None) == []


@pytest.mark.parametrize(("ends", "is_said"), [([1], True), ([1, 4], False)])
def test_a_template_whose_answers_end_with_another_token(ends, is_said):
    tok = tiny.tokenizer()
    tok.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tok.chat_template = tiny.CHAT_TEMPLATE.replace("eos_token", "'<|end|>'")
    end = tok.convert_tokens_to_ids("<|end|>")
    found = turn_findings(tok, [end if token == 4 else token for token in ends])
    assert [finding.level for finding in found] == ["warning"] * is_said
    assert all("ends an answer with '<|end|>'" in finding.message for finding in found)


def test_a_template_whose_answers_end_with_the_eos():
    assert not turn_findings(tiny.tokenizer(), [tiny.tokenizer().eos_token_id])
