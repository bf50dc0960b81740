"""Completions are sampled from the policy itself, and the KL between two policies is exact."""

import math

import pytest
import tiny
import torch
from tolerances import FP32, FP64, assert_close

from rlhf_recipes.evaluation.policies import (
    best_of_n,
    compare_policies,
    eos_token_ids,
    generate_completions,
    sequence_kl,
)

pytestmark = pytest.mark.tiny

PROMPTS = ["hello", "is the hare in the cave?", "the fox"]


@pytest.fixture
def tok():
    """Return the tokenizer of the policies, with padding for generation."""
    tok = tiny.tokenizer()
    tok.padding_side = "left"
    return tok


def _sample(model, tok, prompts=PROMPTS, **kwargs):
    torch.manual_seed(0)
    return generate_completions(model.eval(), tok, prompts, **{"max_completion_length": 12, **kwargs})


def test_completions_end_at_the_first_eos(tok):
    ends = eos_token_ids(tiny.policy(tok), tok)
    completions = _sample(tiny.policy(tok), tok, PROMPTS * 20)
    for ids in completions:
        assert not any(token in ends for token in ids[:-1])
        assert ids[-1] in ends or len(ids) == 12
    assert {ids[-1] in ends for ids in completions} == {True, False}


def test_two_policies_draw_the_same_random_numbers(tok):
    """A policy with more ends gives the same answers up to the first of them: its ended rows move no other row."""
    prompts, sizes = PROMPTS * 4, {"max_completion_length": 40, "batch_size": 12}
    model, ends = tiny.policy(tok), [tok.eos_token_id, *range(20, 40)]
    model.generation_config.eos_token_id = tok.eos_token_id
    longer = _sample(model, tok, prompts, **sizes)
    model.generation_config.eos_token_id = ends
    shorter = _sample(model, tok, prompts, **sizes)
    assert shorter == [ids[: len(own)] for ids, own in zip(longer, shorter, strict=True)]
    assert sum(map(len, shorter)) < 0.8 * sum(map(len, longer))


def test_processors_of_the_generation_config_do_not_shape_samples(tok):
    plain, shaped = tiny.policy(tok), tiny.policy(tok)
    shaped.generation_config.update(top_k=1, repetition_penalty=9.0, no_repeat_ngram_size=1)
    config = shaped.generation_config
    assert _sample(shaped, tok) == _sample(plain, tok)
    assert shaped.generation_config is config


def test_padding_does_not_change_a_greedy_completion(tok):
    model = tiny.policy(tok)
    together = _sample(model, tok, temperature=0)
    assert together == [ids for prompt in PROMPTS for ids in _sample(model, tok, [prompt], temperature=0)]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sequence_kl_is_the_summed_log_ratio(tok, temperature):
    policy, reference = tiny.policy(tok, seed=0).eval(), tiny.policy(tok, seed=1).eval()
    completions = _sample(policy, tok)
    expected = 0.0
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        prompt_ids = tok(prompt)["input_ids"]
        for i, token in enumerate(completion):
            prefix = torch.tensor([prompt_ids + completion[:i]])
            with torch.no_grad():
                logits = [m(input_ids=prefix).logits[0, -1].double() / temperature for m in (policy, reference)]
            expected += (logits[0].log_softmax(-1)[token] - logits[1].log_softmax(-1)[token]).item() / len(PROMPTS)
    actual = sequence_kl(policy, reference, tok, PROMPTS, completions, temperature)
    assert_close(actual, expected, FP32)
    assert actual > 1


@pytest.mark.parametrize("chat", [False, True])
def test_a_policy_ties_with_itself(tok, chat):
    prompts = tiny.prompts(chat=chat)
    results, columns = compare_policies(
        tiny.policy(tok), tiny.policy(tok), tok, prompts, {"length": tiny.length_reward},
        num_samples=3, max_completion_length=8,
    )  # fmt: skip
    assert results["length/win_rate"] == 0.5
    assert results["length/policy"] == results["length/baseline"]
    assert results["policy/kl"] == 0
    assert columns["policy_completion"] == columns["baseline_completion"]
    assert len(columns["prompt"]) == 3 * len(prompts)


def test_the_longer_winded_policy_wins_on_length(tok):
    brief = tiny.policy(tok)
    brief.generation_config.eos_token_id = list(range(len(tok)))
    results, _ = compare_policies(
        tiny.policy(tok, seed=2), brief, tok, tiny.prompts(), {"length": tiny.length_reward}, max_completion_length=20
    )
    assert results["policy/length"] > results["baseline/length"] == 1
    assert results["length/win_rate"] > 0.7
    assert results["length/gain"] == results["length/policy"] - results["length/baseline"] > 0
    assert results["policy/kl"] > 0


def test_a_judge_sees_the_other_columns_and_may_have_nothing_to_say(tok):
    def judge(prompts, completions, answer, **kwargs):
        assert answer == ["a", "a", "b", "b"]
        return [1.0, None, 3.0, 4.0]

    dataset = tiny.prompts(count=2).add_column("answer", ["a", "b"])
    results, columns = compare_policies(
        tiny.policy(tok), tiny.policy(tok), tok, dataset, {"judge": judge}, num_samples=2, max_completion_length=4
    )
    assert results["judge/policy"] == (1 + 3 + 4) / 3
    assert results["judge/win_rate"] == 0.5
    assert columns["policy_judge"][1] is None


def test_the_best_of_n_answers_of_each_prompt(tok):
    """Prompt a scores (3, 1, nothing, 2), prompt b (0, 0, 4, 1); the figure is ten times the score."""
    calls = []

    def chooser(prompts, completions, completion_ids, answer, **kwargs):
        assert answer == ["a"] * 4 + ["b"] * 4
        calls.append(completion_ids)
        return [3.0, 1.0, None, 2.0, 0.0, 0.0, 4.0, 1.0]

    def gold(completions, **kwargs):
        return [30.0, 10.0, None, 20.0, 0.0, 0.0, 40.0, 10.0]

    dataset = tiny.prompts(count=2).add_column("answer", ["a", "b"])
    judges, given = {"reward_model": chooser, "gold": gold}, {"chooser": "reward_model", "max_completion_length": 4}
    results = best_of_n(tiny.policy(tok), tok, dataset, judges, [4, 2, 1], **given)
    (ids,) = calls  # sampled once
    lengths = torch.tensor([len(row) for row in ids]).double()
    pairs_a, pairs_b = (30 + 30 + 30 + 20 + 20 + 10) / 6, (40 + 40 + 40 + 10 + 10 + 0) / 6
    assert results["best_of_4/gold"] == (30 + 40) / 2
    assert_close(results["best_of_2/gold"], (pairs_a + pairs_b) / 2, FP64)
    assert_close(results["best_of_1/gold"], (30 + 10 + 20 + 0 + 0 + 40 + 10) / 7, FP64)
    assert_close(results["best_of_1/length"], lengths.mean(), FP64)
    assert_close(results["best_of_4/length"], (lengths[0] + lengths[6]) / 2, FP64)
    assert_close(results["best_of_4/kl_bound"], math.log(4) - 0.75, FP64)
    assert best_of_n(tiny.policy(tok), tok, dataset, judges, [], **given) == {}
