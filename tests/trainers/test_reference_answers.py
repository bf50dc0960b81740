"""PPO on a reward that is bounded by reference answers: what it is, what it costs, how it resumes, what it refuses."""

import math

import pytest
import tiny
import torch
from accelerate import PartialState
from datasets import Dataset
from processes import run_in_processes
from tiny_steps import step_model
from tolerances import FP32, SPLIT, assert_close

from rlhf_recipes.evaluation import reference_answers
from rlhf_recipes.evaluation.reference_answers import add_reference_answers
from rlhf_recipes.rewards.attempts import RewardCallError
from rlhf_recipes.rewards.protocol import Scorer
from rlhf_recipes.trainers.reference_answers import ReferenceAnswers

pytestmark = pytest.mark.tiny
PAR = {"reward_shaping": "par", "reward_norm": False}


def _with_references(data, count=2):
    return data.add_column(
        "reference_answers", [[f"the hare {i} {k}" for k in range(count)] for i in range(len(data))]
    )


def _with_nothing(data):
    texts = _with_references(data)["reference_answers"]
    return data.add_column("reference_answers", [None if i == 3 else row for i, row in enumerate(texts)])


def _trainer(directory, **options):
    tok = tiny.tokenizer()
    given = {"data": _with_references(tiny.prompts(count=16)), "rewards": tiny.reward_model(tok), "reward_tok": tok}
    return tiny.ppo_trainer(directory, tok=tok, **{**PAR, **given, **options})


def _record(scorer):
    """Return a list that gets the answers of every later call of a scorer."""
    asked, score = [], type(scorer).__call__

    class Recorded(type(scorer)):
        def __call__(self, prompts, completions, *args, **kwargs):
            asked.append(list(completions))
            return score(self, prompts, completions, *args, **kwargs)

    scorer.__class__ = Recorded
    return asked


class _Judge(Scorer):
    """Give points."""

    __name__ = "judge"

    def __call__(self, prompts, completions, **kwargs):
        return [5.0] * len(prompts)


def _probability(score, references):
    return sum(1 / (1 + math.exp(reference - score)) for reference in references) / len(references)


@pytest.mark.parametrize("chat", [False, True])
def test_an_answer_gets_the_probability_that_it_beats_the_reference_answers(tmp_path, chat):
    trainer = _trainer(tmp_path, data=_with_references(tiny.prompts(chat=chat, count=16)), reward_weights=[2.0])
    tiny.rollout(trainer)
    rollout, expected = trainer.rollout, []
    for row, score in zip(rollout.rows, rollout.raw_scores.tolist(), strict=True):
        texts = [[{"role": "assistant", "content": x}] if chat else x for x in row["reference_answers"]]
        references = trainer.scorers[0]([row["prompt"]] * 2, texts)
        expected.append(_probability(score, [2.0 * x for x in references]))
    assert_close(rollout.normalized_scores, expected, FP32)
    assert rollout.normalized_scores.std() > 0


def test_reference_answers_are_scored_once_per_prompt(tmp_path):
    """Two epochs over 16 prompts: 4 rollouts of 8, and in the first epoch 2 calls for the references."""
    trainer = _trainer(tmp_path, max_steps=16)
    asked = _record(trainer.scorers[0])
    trainer.train()
    references = [answers for answers in asked if any("the hare" in text for text in answers)]
    assert [len(answers) for answers in references] == [16, 16]
    assert sorted(sum(references, [])) == sorted(sum(trainer.train_dataset["reference_answers"], []))
    assert len(asked) - len(references) == 4


def test_a_resume_is_exact_and_scores_no_reference_again(tmp_path):
    saving = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "num_iterations": 1}
    whole = _trainer(tmp_path / "run", **saving)
    whole.train()
    again = _trainer(tmp_path / "run", **saving)
    asked = _record(again.scorers[0])
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert asked
    assert not any("the hare" in text for answers in asked for text in answers)
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert whole.references.state_dict() == again.references.state_dict()


def test_a_resume_with_another_reward_scores_the_references_by_it(tmp_path, caplog):
    """From a run without `reward_shaping`, and from one with another reward model."""
    saving = {"save_strategy": "steps", "save_steps": 4, "num_iterations": 1, "allow_changes_on_resume": True}
    plain = {"reward_shaping": "none", "reward_norm": True}
    _trainer(tmp_path, **saving, **plain, max_steps=4).train()
    checkpoint = str(tmp_path / "checkpoint-4")
    shaped = _trainer(tmp_path, **saving, max_steps=8)
    shaped.train(resume_from_checkpoint=checkpoint)
    scores = shaped.references.state_dict()["scores"]
    assert scores
    other = _trainer(tmp_path, **saving, max_steps=8, rewards=tiny.reward_model(tiny.tokenizer(), seed=7))
    other.references.load_state_dict(shaped.references.state_dict())
    assert "by another reward model, or by another rule" in caplog.text
    assert other.references.state_dict()["scores"] == {}
    same = _trainer(tmp_path, **saving, max_steps=8)
    same.references.load_state_dict(shaped.references.state_dict())
    assert same.references.state_dict()["scores"] == scores


def test_a_critic_is_fitted_to_the_same_reward(tmp_path):
    pairs = _with_references(tiny.preferences(count=4))
    trainer = _trainer(tmp_path, critic="reward", critic_epochs=1, critic_dataset=pairs)
    scores = torch.tensor([1.0, -1.0] * 4)
    targets = trainer._scale_of_returns(scores)
    expected = []
    for i, row in enumerate(trainer.critic_dataset):
        references = trainer.scorers[0]([row["prompt"]] * 2, row["reference_answers"])
        expected += [_probability(score, references) for score in scores[2 * i : 2 * i + 2].tolist()]
    assert_close(targets, expected, FP32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward_norm": True}, "`reward_shaping: par` needs `reward_norm: false`"),
        ({"rewards": tiny.length_reward}, "needs one reward model and no other reward"),
        ({"rewards": step_model(tiny.tokenizer())}, "leave out .* judges and process reward models"),
        ({"rewards": _Judge()}, "needs one reward model and no other reward"),
        ({"data": tiny.prompts()}, "`train_dataset` has no column 'reference_answers'. Let the SFT policy write it"),
        ({"eval_data": tiny.prompts()}, "`eval_dataset` has no column 'reference_answers'"),
        ({"critic": "reward", "critic_dataset": tiny.preferences()}, "`critic_dataset` has no column"),
        ({"data": _with_references(tiny.prompts(), count=0)}, r"in row 0 of `train_dataset` is '\[\]'"),
        ({"eval_data": _with_nothing(tiny.prompts())}, "in row 3 of `eval_dataset` is 'None', .* list of one or more"),
    ],
)
def test_what_cannot_be_shaped_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        _trainer(tmp_path, **changes)


def test_an_answer_whose_reference_has_no_score_has_none_until_it_gets_one():
    answers = iter([[math.nan], [1.0]])
    references, row = (
        ReferenceAnswers(lambda **kwargs: next(answers), 1.0),
        {"prompt": "a", "reference_answers": ["b"]},
    )
    assert references.shaped(torch.tensor([1.0]), [row]).isnan().all()
    assert references.state_dict()["scores"] == {}
    assert references.shaped(torch.tensor([1.0]), [row]).item() == 0.5


def test_a_row_without_a_reference_score_does_not_train(tmp_path):
    """The others do, with finite advantages, and a rollout without any such score ends the run."""
    trainer = _trainer(tmp_path, critic="reward")
    score, lost = trainer.references._score, [3]
    first = {"prompt": trainer.train_dataset[0]["prompt"]}

    def sometimes(prompts, completions):
        scores = score(prompts=prompts, completions=completions)
        return [math.nan if i in lost or "all" in lost else x for i, x in enumerate(scores)]

    trainer.references = ReferenceAnswers(sometimes, 1.0)
    lost[:] = [0, 1]  # both reference answers of the first prompt
    batch, rollout = tiny.rollout(trainer), trainer.rollout
    without = [row["prompt"] == first["prompt"] for row in rollout.rows]
    assert any(without)
    assert not all(without)
    assert rollout.mask.any(dim=1).tolist() == [not x for x in without]
    assert rollout.scores.isnan().tolist() == without
    assert batch["advantages"].isfinite().all()
    assert batch["returns"].isfinite().all()
    trainer.references = ReferenceAnswers(sometimes, 1.0)
    lost[:] = ["all"]
    with pytest.raises(RewardCallError, match="None of the 8 completions of this rollout has a score"):
        tiny.rollout(trainer)


def test_the_sft_policy_writes_reference_answers():
    tok = tiny.tokenizer()
    data = add_reference_answers(
        Dataset.from_dict({"prompt": ["the fox", "the hare\n\n"], "n": [1, 2]}),
        tiny.policy(tok),
        tok,
        count=3,
        max_completion_length=4,
        temperature=0,  # so all answers to a prompt have ended, or none
    )
    assert data["prompt"] == ["the fox", "the hare\n\n"]
    assert data["n"] == [1, 2]
    assert [len(answers) for answers in data["reference_answers"]] == [3, 3]


def test_cut_answers_are_no_references_unless_there_is_no_other(monkeypatch, caplog):
    tok = tiny.tokenizer()
    end = tok.eos_token_id
    sampled = [[5, 6], [5, end], [5, 7], [7, end], [8, 9], [8, 10]]
    texts = ["cut", "whole", "cut", "the end", "cut a", "cut b"]
    monkeypatch.setattr(reference_answers, "sample_answers", lambda *args, **kwargs: (sampled, texts, None))
    data = add_reference_answers(Dataset.from_dict({"prompt": ["a", "b"]}), tiny.policy(tok), tok, count=3)
    assert data["reference_answers"] == [["whole"], ["the end"]]
    sampled[3] = [7, 7]
    data = add_reference_answers(Dataset.from_dict({"prompt": ["a", "b"]}), tiny.policy(tok), tok, count=3)
    assert data["reference_answers"] == [["whole"], ["the end", "cut a", "cut b"]]
    assert "1 of 2 prompts have only reference answers that the length limit has cut" in caplog.text


def _shaped(rank, world_size):
    PartialState(cpu=True)
    asked = []

    def score(prompts, completions):
        asked.extend(completions)
        return [float(len(prompt)) - len(text) for prompt, text in zip(prompts, completions, strict=True)]

    rows = [{"prompt": "a" * i, "reference_answers": ["b" * k for k in range(i % 3 + 1)]} for i in range(5)] * 2
    share = len(rows) // world_size
    own = slice(rank * share, (rank + 1) * share)
    references, scores = ReferenceAnswers(score, 0.5), torch.linspace(-1, 1, len(rows))
    return references.shaped(scores[own], rows[own]), references.state_dict()["scores"], len(asked)


@pytest.mark.distributed
def test_two_ranks_share_the_work_and_know_what_one_knows():
    (one, known, asked), ranks = _shaped(0, 1), run_in_processes(_shaped, 2)
    assert_close(torch.cat([shaped for shaped, _, _ in ranks]), one, SPLIT)
    for _, of_rank, asked_here in ranks:
        assert of_rank == known
        assert asked_here == -(-asked // 2)
