"""Lists of rewards in place of a score: what is read, where steps go among the tokens, and what is refused."""

import asyncio
import pickle

import numpy as np
import pytest
import tiny
import torch

from rlhf_recipes.rewards.attempts import RewardCallError
from rlhf_recipes.rewards.calls import RewardCalls
from rlhf_recipes.rewards.dense import DenseReward, with_kept_answer

pytestmark = pytest.mark.tiny

GIVEN = {"prompts": ["p", "q"], "completions": ["One. Two.", ""], "completion_ids": [[5, 6, 7], [8]]}
CHAT = [[{"role": "assistant", "content": text}] for text in GIVEN["completions"]]


def _returns(value):
    def judge(**kwargs):
        return value

    return judge


@pytest.mark.parametrize(
    ("answer", "rewards", "ends"),
    [
        ([[(4, 1.0), (9, -0.25)], [(0, 2)]], (1.0, -0.25), (4, 9)),
        ([[[4, 1.0], [9, -0.25]], None], (1.0, -0.25), (4, 9)),  # as JSON has it
        ([[1, 2.0, -3.5], [1]], (1.0, 2.0, -3.5), None),
        ([torch.tensor([1.0, 2.0, -3.5]), 4.0], (1.0, 2.0, -3.5), None),
        ([np.array([[4, 1.0], [9, 2.0]]).tolist(), 4.0], None, None),  # 4.0 is no whole number
        ([[(np.int64(4), np.float32(1.0)), (9, 0.5)], 4.0], (1.0, 0.5), (4, 9)),
        ([[], 4.0], (), ()),
    ],
)
def test_the_score_is_the_sum_of_what_a_list_holds(answer, rewards, ends):
    call = RewardCalls(retries=0).guard(_returns(answer))
    if rewards is None:
        with pytest.raises(RewardCallError, match=r"the end 4\.0 for step 0 of completion 0, not a whole number"):
            call(**GIVEN)
        return
    (score, _) = call(**GIVEN)
    assert (score, score.rewards, score.ends) == (sum(rewards), rewards, ends)
    assert call(**{**GIVEN, "completions": CHAT})[0] == score
    assert type(pickle.loads(pickle.dumps(score))) is float


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1.0, 2.0], r"it returned \[1.0, 2.0\] for completion 0: 2 rewards for its 3 tokens"),
        ([1.0, 2.0, None], "holds None in place of a number"),
        ([1.0, 2.0, float("nan")], "holds nan in place of a number"),
        ([(4, float("nan"))], "holds nan in place of a number"),
        ([1.0, 2.0, "3"], "returned '3' for completion 0, not a number"),
        ([1.0, (4, 2.0), 3.0], r"holds \(4, 2.0\) in place of a number"),
        (
            [(4, 1.0), (4, 2.0)],
            "the end 4 for step 1 of completion 0, which is not behind the end 4 of the step",
        ),
        ([(-1, 1.0)], "the end -1 for step 0 of completion 0, which is negative"),
        ([(4, 1.0), (10, 2.0)], "the end 10 for step 1 of completion 0, whose text has only 9 characters"),
        ([("4", 1.0)], "the end '4' for step 0 of completion 0, not a whole number of characters"),
        ([(4, 1e39)], r"it returned 1e\+39 for completion 0"),
    ],
)
def test_a_list_that_breaks_a_rule_is_an_error_that_names_function_row_and_rule(row, reason):
    with pytest.raises(RewardCallError, match=f"`judge` failed at the first attempt: .*{reason}"):
        RewardCalls(retries=0).guard(_returns([row, 1.0]))(**GIVEN)
    with pytest.raises(RewardCallError, match=f"`judge` failed: .*{reason}"):  # a scorer with a model has no guard
        with_kept_answer(_returns([row, 1.0]))(**GIVEN)


def test_steps_need_one_message_of_text():
    tools = [[*CHAT[0], {"role": "tool", "content": "4"}], CHAT[1]]
    call = RewardCalls(retries=0).guard(_returns([[(4, 1.0)], 1.0]))
    with pytest.raises(RewardCallError, match="completion 0, which is not one message of text: return one number per"):
        call(**{**GIVEN, "completions": tools})
    assert RewardCalls(retries=0).guard(_returns([[1, 2, 3], 1.0]))(**{**GIVEN, "completions": tools}) == [6.0, 1.0]


def test_a_judge_may_return_lists_in_a_model_or_async():
    class Model(torch.nn.Module):
        def forward(self, **kwargs):
            return [[(4, 1.0), (9, 2.0)], 0.5]

    async def patient(**kwargs):
        return [[1.0, 2.0, 3.0], None]

    judges = RewardCalls(retries=0).guard_judges({"model": Model(), "patient": patient})
    assert judges["model"](**GIVEN) == [3.0, 0.5]
    assert str(judges["patient"](**GIVEN)) == "[6.0, nan]"
    kept = with_kept_answer(patient)
    asyncio.run(kept(**GIVEN))
    assert kept.rewards_by_token(GIVEN["completions"], GIVEN["completion_ids"], str) == [[1.0, 2.0, 3.0], None]


def _by_token(text, ids, ends, tok):
    reward = DenseReward([float(2**i) for i in range(len(ends))], ends)
    return reward.by_token(text, ids, lambda some: tok.decode(some, skip_special_tokens=True))


def test_a_step_belongs_to_the_token_in_which_it_ends():
    tok = tiny.tokenizer()
    ids = [*tok.encode("the fox is"), tok.convert_tokens_to_ids("<|user|>"), *tok.encode(" red"), tok.eos_token_id]
    text = tok.decode(ids, skip_special_tokens=True)
    pieces = [tok.decode([token], skip_special_tokens=True) for token in ids]
    assert text == "the fox is red" == "".join(pieces)
    assert len(pieces) < len(text), "some tokens hold several characters"
    owner = [token for token, piece in enumerate(pieces) for _ in piece]
    for end in range(1, len(text)):
        expected = [float(token == owner[end - 1]) for token in range(len(ids))]
        assert _by_token(text, ids, [end], tok) == expected
    # A step that ends with the text is over when the answer is: at the EOS.
    expected = [0.0] * len(ids)
    expected[owner[2]], expected[-1] = 1.0, 2.0
    assert _by_token(text, ids, [3, len(text)], tok) == expected
    assert _by_token(text, ids, list(range(1, len(text) + 1)), tok)[owner[0]] >= 1.0


def test_a_character_of_several_tokens_ends_at_its_last_one():
    tok = tiny.tokenizer()
    ids = tok.encode("é☃ x")
    assert len(ids) > 4, "a byte a token"
    assert _by_token("é☃ x", ids, [1, 2], tok) == [0.0, 1.0, 0.0, 0.0, 2.0, *[0.0] * (len(ids) - 5)]


def test_steps_of_a_content_are_found_behind_the_thoughts():
    tok = tiny.tokenizer()
    ids = tok.encode("so red? the fox is red")
    place = len(tok.encode("so red? the fox"))
    assert _by_token("the fox is red", ids, [7], tok).index(1.0) == place - 1
    with pytest.raises(ValueError, match="its tokens do not spell its text"):
        _by_token("a bear", ids, [2], tok)
