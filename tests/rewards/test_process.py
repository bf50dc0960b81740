"""A process reward model as a scorer: the ends of steps, their rewards, and PPO with it."""

import pytest
import tiny
import torch
from tiny_steps import step_model
from tolerances import FP32, assert_close

from rlhf_recipes.algorithm.steps import step_rewards
from rlhf_recipes.data.steps import StepRule, step_token_ids
from rlhf_recipes.evaluation.evaluated_models import run_separator
from rlhf_recipes.models.process_reward_model import is_process_reward_model, refuse_process_reward_model
from rlhf_recipes.rewards.adapter import RewardAdapterScorer
from rlhf_recipes.rewards.card import RewardModelCard
from rlhf_recipes.rewards.functions import as_scorer
from rlhf_recipes.rewards.process import ProcessRewardModelCard, ProcessRewardModelScorer

pytestmark = pytest.mark.tiny
TEXTS = ["the fox is red\nthe bear eats", "berries", "", "is the hare\n\nin the cave\n", " \n"]
PROMPTS = ["hello\n\n"] * len(TEXTS)


@pytest.mark.parametrize(
    ("rule", "text", "steps"),
    [
        (StepRule(), "a\nb", ["a", "b"]),
        (StepRule(), "a\n\n b\n", ["a", " b"]),
        (StepRule(), " \n", []),
        (StepRule(" ", "sentence"), "One two. Three! Fo", ["One two.", "Three!", "Fo"]),
        (StepRule(" ", "sentence"), "One.Two. 3", ["One.Two.", "3"]),
        (StepRule("\n\n"), "a\nb\n\nc", ["a\nb", "c"]),
        (StepRule(".*"), "a.*b", ["a", "b"]),
    ],
)
def test_where_a_step_ends(rule, text, steps):
    bounds = rule.bounds(text)
    assert [text[start:end] for start, end in bounds] == steps
    assert all(before < after for (_, before), (_, after) in zip(bounds, bounds[1:], strict=False))


def test_each_step_gets_the_number_that_a_forward_of_its_own_gives():
    """A later step, another row and padding change nothing, and a later step is not known."""
    tok = tiny.tokenizer()
    model = step_model(tok)
    given = ProcessRewardModelScorer(model, tok)(PROMPTS, TEXTS)
    assert [[end for end, _ in steps] for steps in given] == [[14, 28], [7], [], [11, 24], []]
    for text, steps in zip(TEXTS, given, strict=True):
        for end, reward in steps:
            before = [part for part in text[:end].split("\n") if part]
            ids, _ = step_token_ids(tok, "hello\n\n", before, "\n")
            logit = model(input_ids=torch.tensor([ids])).logits[0, -1, 0]
            assert_close(torch.tensor(reward), 2 * logit.sigmoid() - 1, FP32)


def test_a_batch_is_one_forward(monkeypatch):
    tok = tiny.tokenizer()
    scorer, calls = ProcessRewardModelScorer(step_model(tok), tok), []
    scorer.model.register_forward_hook(lambda *call: calls.append(call))
    scorer.batch_size = len(TEXTS)
    scorer(PROMPTS, TEXTS)
    assert len(calls) == 1


def test_what_a_step_gives():
    odds = torch.tensor([0.0, 2.0, -1.0], dtype=torch.float64)
    p = [0.5, 0.8807970779778823, 0.2689414213699951]
    expected = {
        "probability": p,
        "signed": [2 * x - 1 for x in p],
        "log_odds": [0.0, 2.0, -1.0],
        "difference": [0.0, p[1] - p[0], p[2] - p[1]],
    }
    for kind, rewards in expected.items():
        assert_close(step_rewards(odds, kind), torch.tensor(rewards, dtype=torch.float64), FP32)


def _saved(directory, **card):
    path = tiny.save(step_model(tiny.tokenizer()), directory)
    if card:
        kinds = {"base_model": "x", "conversational": False, "tokenizer_fingerprint": "", "response_separator": "\n\n"}
        ProcessRewardModelCard(**kinds, chat_template_fingerprint=None, **card).save(path)
    return path


def test_the_card_says_how_an_answer_is_split(tmp_path, caplog):
    path = _saved(tmp_path / "prm", step_separator=" ", step_boundary="sentence", step_reward="log_odds")
    scorer = as_scorer(path)
    assert isinstance(scorer, ProcessRewardModelScorer)
    (steps,) = scorer(["hello\n\n"], ["the fox is red. the bear"])
    assert [end for end, _ in steps] == [15, 24]
    (log_odds,) = scorer.log_odds(["hello\n\n"], [["the fox is red.", "the bear"]])
    assert_close(torch.tensor([reward for _, reward in steps]), log_odds, FP32)
    as_scorer(_saved(tmp_path / "bare"))
    assert "Each line of an answer is a step." in caplog.text


def test_it_is_refused_where_only_whole_answers_are_scored(tmp_path):
    path = _saved(tmp_path / "prm")
    assert is_process_reward_model(path)
    assert not is_process_reward_model(tiny.save(tiny.reward_model(tiny.tokenizer()), tmp_path / "rm"))
    with pytest.raises(ValueError, match="is a process reward model, which judges steps, and the server takes only"):
        refuse_process_reward_model(path, "the server")
    with pytest.raises(ValueError, match="process reward model, which judges steps, and `reward_models` takes only"):
        run_separator(None, ["http://127.0.0.1:1", path])
    card = _saved(tmp_path / "with_card", step_separator=" ")
    with pytest.raises(ValueError, match="`step_separator`: it is the card of a process reward model, which judges"):
        RewardModelCard.load(card)
    with pytest.raises(ValueError, match="which is no adapter"):
        RewardAdapterScorer(path)


@pytest.mark.parametrize("chat", [False, True])
def test_ppo_follows_it(tmp_path, chat):
    """Each step has its own reward, and the score of a completion is the sum."""
    tok = tiny.tokenizer()
    path = _saved(tmp_path / "prm")
    trainer = tiny.ppo_trainer(tmp_path / "ppo", rewards=path, chat=chat, reward_norm=False, max_steps=4)
    trainer.train()
    scores = trainer.state.log_history[0]["objective/scores"]
    assert scores != 0
    assert_close(trainer.rollout.parts.sum(dim=1), trainer.rollout.scores, FP32)
    assert (trainer.rollout.parts != 0).sum(dim=1).max() > 1 or "\n" not in str(trainer.rollout.completions)
    own = ProcessRewardModelScorer(step_model(tok), tok)
    prompts = [[{"role": "user", "content": "hello"}]] if chat else ["hello\n\n"]
    answers = [[{"role": "assistant", "content": "the fox"}]] if chat else ["the fox"]
    (scorer,) = trainer.scorers
    ours, theirs = (torch.tensor([reward for _, reward in each(prompts, answers)[0]]) for each in (scorer, own))
    assert_close(ours, theirs, FP32)
