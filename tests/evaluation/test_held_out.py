"""A policy is compared with its start, on answers whose outcome is known."""

import json
import math

import pytest

from rlhf_recipes.evaluation.held_out import HeldOutComparison

PROMPTS = ["p", "q", "r", "s"]


def _rows(prompts, scores, text="answer"):
    return [
        {"prompt": p, "completion": f"{text} {i}", "score": s, "kl": 0.0, "length": 3, "stop": "eos"}
        for i, (p, s) in enumerate(zip(prompts, scores, strict=True))
    ]


def _evaluate(comparison, scores, *, prompts=PROMPTS, is_start=False, text="answer"):
    rows = _rows(prompts, scores, text)
    completions = [row["completion"] for row in rows]
    comparison.add(
        rows, [{"prompt": p, "topic": p.upper()} for p in prompts], list(prompts), completions, [[1]] * len(rows)
    )
    return comparison.finish(is_start=is_start)


@pytest.fixture
def comparison():
    comparison = HeldOutComparison(None, None, seed=0)
    _evaluate(comparison, [0.0, 1.0, 2.0, 3.0], is_start=True)
    return comparison


def test_the_start_ties_with_itself():
    metrics, rows = _evaluate(HeldOutComparison(None, None, seed=0), [0.0, 1.0, 2.0, 3.0], is_start=True)
    assert metrics["score/win_rate"] == metrics["win_rate"] == metrics["win_rate_low"] == 0.5
    assert metrics["prompts"] == len(rows) == 4


def test_a_later_policy_is_compared_with_the_start(comparison):
    metrics, _ = _evaluate(comparison, [5.0, 0.0, 2.0, 4.0])
    assert metrics["score/win_rate"] == (1 + 0 + 0.5 + 1) / 4
    assert metrics["score/gain"] == (5 - 1 + 0 + 1) / 4
    assert (metrics["score/policy"], metrics["score/baseline"]) == (11 / 4, 6 / 4)
    assert _evaluate(comparison, [0.0, 1.0, 2.0, 3.0])[0]["win_rate"] == 0.5, "the start stays the baseline"


def test_rows_that_fill_up_the_last_batch_do_not_count(comparison):
    metrics, rows = _evaluate(comparison, [5.0, 0.0, 2.0, 4.0, 9.0], prompts=[*PROMPTS, "q"])
    assert metrics["score/win_rate"] == 0.625
    assert (metrics["prompts"], len(rows)) == (4, 5)


def test_samples_of_one_prompt_are_one_outcome():
    comparison = HeldOutComparison(None, None, seed=0)
    _evaluate(comparison, [0.0, 0.0, 0.0, 0.0], prompts=["p", "p", "q", "q"], is_start=True)
    metrics, _ = _evaluate(comparison, [1.0, 1.0, 1.0, -1.0], prompts=["p", "p", "q", "q"])
    assert (metrics["score/win_rate"], metrics["prompts"]) == (0.75, 2)


def test_a_judge_that_is_not_trained_on_chooses():
    def words(prompts, completions, completion_ids, topic, **kwargs):
        assert topic == [p.upper() for p in prompts]
        return [None if "0" in c else -float(len(c)) for c in completions]

    comparison = HeldOutComparison({"words": words}, None, seed=0)
    _evaluate(comparison, [0.0] * 4, is_start=True)
    metrics, rows = _evaluate(comparison, [1.0] * 4, text="a longer answer")
    assert (metrics["score/win_rate"], metrics["words/win_rate"], metrics["win_rate"]) == (1.0, 0.0, 0.0)
    assert math.isnan(rows[0]["judge/words"])
    assert [row["judge/words"] for row in rows[1:]] == [-17.0, -17.0, -17.0]


def test_a_judge_of_pairs_that_likes_the_first_place_likes_neither():
    def first(prompts, completions_a, completions_b, topic):
        return [1.0] * len(prompts)

    def longer(prompts, completions_a, completions_b, topic):
        return [float(len(a) > len(b)) for a, b in zip(completions_a, completions_b, strict=True)]

    comparison = HeldOutComparison(None, {"longer": longer, "first": first}, seed=0)
    metrics, _ = _evaluate(comparison, [0.0] * 4, is_start=True)
    assert (metrics["longer/win_rate"], metrics["first/win_rate"]) == (0.5, 0.5)
    metrics, _ = _evaluate(comparison, [0.0] * 4, text="a longer answer")
    assert (metrics["longer/win_rate"], metrics["first/win_rate"], metrics["win_rate"]) == (1.0, 0.5, 1.0)


def test_a_judge_of_pairs_compares_sample_with_sample():
    """The second answer to a prompt is compared with the second of the start. One that fills up a batch is ignored."""
    asked = []

    def judge(prompts, completions_a, completions_b, topic):
        asked.extend(zip(completions_a, completions_b, strict=True))
        return [1.0 if a.startswith("new") else 0.0 for a in completions_a]

    comparison = HeldOutComparison(None, {"judge": judge}, seed=0)
    _evaluate(comparison, [0.0] * 4, prompts=["p", "p", "q", "q"], is_start=True, text="old")
    metrics, _ = _evaluate(comparison, [0.0] * 5, prompts=["p", "p", "q", "q", "p"], text="new")
    assert asked[:4] == [("new 0", "old 0"), ("new 1", "old 1"), ("new 2", "old 2"), ("new 3", "old 3")]
    assert (metrics["judge/win_rate"], metrics["prompts"]) == (1.0, 2)


def test_a_judge_of_pairs_sees_messages_where_the_prompts_are_messages():
    seen = []

    def judge(prompts, completions_a, completions_b):
        seen.extend([*completions_a, *completions_b])
        return [0.5] * len(prompts)

    comparison = HeldOutComparison(None, {"judge": judge}, seed=0)
    prompt = [{"role": "user", "content": "p"}]
    for is_start in (True, False):
        answer = [{"role": "assistant", "content": "answer 0"}]
        comparison.add(_rows(["user: p"], [1.0]), [{"prompt": prompt}], [prompt], [answer], [[1]])
        comparison.finish(is_start=is_start)
    assert seen == [answer] * 4


def test_the_baseline_comes_back_from_a_checkpoint(comparison):
    state = json.loads(json.dumps(comparison.state_dict()))
    resumed = HeldOutComparison(None, None, seed=0)
    resumed.load_state_dict(state)
    resumed.check_baseline("checkpoint-4")
    assert _evaluate(resumed, [5.0, 0.0, 2.0, 4.0])[0] == _evaluate(comparison, [5.0, 0.0, 2.0, 4.0])[0]


def test_without_a_baseline_nothing_is_claimed():
    comparison = HeldOutComparison(None, None, seed=0)
    assert _evaluate(comparison, [1.0] * 4)[0] == {}
    with pytest.raises(ValueError, match=r"`eval_strategy` was `no` when checkpoint-4 was written"):
        comparison.check_baseline("checkpoint-4")


@pytest.mark.parametrize("name", ["score", "both"])
def test_a_name_that_is_taken_is_refused(name):
    pairwise = {"both": print} if name == "both" else {}
    with pytest.raises(ValueError, match=f"A judge cannot be named as another.*: {name}. Rename"):
        HeldOutComparison({name: print}, pairwise, seed=0)


def test_a_judge_may_be_named_as_a_column():
    comparison = HeldOutComparison({"length": lambda completions, **kwargs: [7.0] * len(completions)}, None, seed=0)
    metrics, rows = _evaluate(comparison, [0.0] * 4, is_start=True)
    assert metrics["length/policy"] == 7.0
    assert rows[0]["length"] == 3
