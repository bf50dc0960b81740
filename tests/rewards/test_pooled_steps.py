"""A process reward model that vLLM serves, with a stand-in that runs a real tiny model.

The stand-in has the requests and answers of vLLM 0.28: `/v1/models`, and `/pooling` with the task `token_classify`,
token ids under `input` and `use_activation`. Under `data[].data` it gives as many lists as a row has tokens, each with
as many numbers as the model has labels. One label gets a sigmoid, two get a softmax, unless raw outputs are asked for.
A row beyond `max_model_len`, another name of the model and another task are answered by 400 and 404.
"""

import json
import shutil
from types import SimpleNamespace

import pytest
import tenacity
import tiny
import torch
from pooled_server import served
from tiny_steps import save_step_model
from tolerances import FP32, assert_close
from transformers import AutoModelForTokenClassification

from rlhf_recipes.data.steps import step_token_ids
from rlhf_recipes.rewards.attempts import PermanentRewardError, RewardCallError
from rlhf_recipes.rewards.card import CARD_FILE
from rlhf_recipes.rewards.functions import as_scorer
from rlhf_recipes.rewards.pooled_steps import VLLMProcessRewardModel
from rlhf_recipes.rewards.transport import TOKEN_VARIABLE

pytestmark = pytest.mark.tiny
TEXTS = ["the fox is red. the bear eats", "berries", "", "is the hare. in the cave. ", " "]
PROMPTS = ["hello\n\n"] * len(TEXTS)
CHATS = [[[{"role": role, "content": text}] for text in ("the fox", "a. b")] for role in ("user", "assistant")]


class StandIn:
    """Answer as vLLM does.

    Args:
        path: Directory of the process reward model.
        faults: Ways in which it misbehaves.
    """

    kind = "vllm"

    def __init__(self, path, **faults):
        self.model = AutoModelForTokenClassification.from_pretrained(path).eval()
        self.path, self.faults, self.rows = str(path), faults, []

    def answer(self, path, body):
        """Return status and content."""
        limit = self.faults.get("limit", 64)
        if path == "/v1/models":
            return 200, {
                "data": [{"id": "served", "root": self.faults.get("name", self.path), "max_model_len": limit}]
            }
        if path != "/pooling":
            return 404, {"detail": "Not Found"}
        if self.faults.get("status"):
            return self.faults["status"], {"error": "overloaded"}
        if body["model"] != "served":
            return 404, {"error": {"message": f"The model {body['model']} does not exist."}}
        if body["task"] != self.faults.get("task", "token_classify"):
            return 400, {"error": {"message": "Try switching the model's pooling_task via PoolerConfig"}}
        if not body["input"] or not all(0 < len(row) <= limit for row in body["input"]):
            return 400, {"error": {"message": "The prompt is empty or longer than the maximum model length."}}
        data = [
            {"index": index, "object": "pooling", "data": self.outputs(row, body["use_activation"])}
            for index, row in enumerate(body["input"])
        ]
        data = data[: len(data) - self.faults.get("lost", 0)]
        return 200, {"id": "pool-1", "object": "list", "model": "served", "data": data[::-1]}

    @torch.no_grad()
    def outputs(self, row, activated):
        self.rows.append(row)
        outputs = self.model(input_ids=torch.tensor([row])).logits[0]
        if activated or self.faults.get("activated"):
            outputs = outputs.sigmoid() if outputs.shape[1] < 2 else outputs.softmax(dim=1)
        numbers = [self.faults.get("number", lambda x: x)(of_token) for of_token in outputs.tolist()]
        return numbers[self.faults.get("cached", 0) :]


def _saved(directory, **card):
    return save_step_model(directory, step_boundary="sentence", **card)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return _saved(tmp_path_factory.mktemp("pooled") / "prm")


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, "word")
    monkeypatch.setattr(tenacity.nap, "time", SimpleNamespace(sleep=lambda seconds: None))


def _assert_same(served_steps, local_steps):
    assert [[end for end, _ in steps] for steps in served_steps] == [
        [end for end, _ in steps] for steps in local_steps
    ]
    ours, theirs = ([reward for steps in rows for _, reward in steps] for rows in (served_steps, local_steps))
    assert len(ours) > 2
    assert len({round(reward, 4) for reward in theirs}) > 2
    assert_close(ours, theirs, FP32)


@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("kind", ["signed", "log_odds", "difference"])
def test_the_rewards_are_the_local_ones(tmp_path, labels, kind):
    path = _saved(tmp_path / "prm", labels=labels, step_reward=kind)
    with served(StandIn(path)) as url:
        scorer, local = as_scorer(url), as_scorer(path)
        assert isinstance(scorer, VLLMProcessRewardModel)
        _assert_same(scorer(PROMPTS, TEXTS), local(PROMPTS, TEXTS))
        scorer.batch_size = 2
        _assert_same(scorer(PROMPTS, TEXTS) + scorer(*CHATS), local(PROMPTS, TEXTS) + local(*CHATS))
        assert scorer.prompt_lengths(PROMPTS) == local.prompt_lengths(PROMPTS)
        assert (scorer.__name__, scorer.card) == ("prm", local.card)
        assert scorer.identity() == local.identity()
        assert (scorer.gives_steps, scorer.gives_log_odds) == (True, False)


def test_a_trainer_takes_it_like_a_local_one(directory, tmp_path):
    with served(StandIn(directory)) as url:
        rollouts = []
        for number, rewards in enumerate((url, directory)):
            trainer = tiny.ppo_trainer(tmp_path / str(number), rewards=rewards)
            trainer.train()
            rollouts.append(trainer.rollout)
    assert_close(rollouts[0].scores, rollouts[1].scores, FP32)
    assert_close(rollouts[0].parts, rollouts[1].parts, FP32)


def test_vllm_gets_the_tokens_of_prompt_steps_and_separators_and_no_answer_without_steps(directory):
    stand_in = StandIn(directory)
    with served(stand_in) as url:
        scorer = as_scorer(url)
        stand_in.rows.clear()
        scorer(PROMPTS, TEXTS)
        read = [["the fox is red.", "the bear eats"], ["berries"], ["is the hare.", "in the cave."]]
        tok = tiny.tokenizer()
        assert stand_in.rows == [step_token_ids(tok, "hello\n\n", steps, " ")[0] for steps in read]
        stand_in.rows.clear()
        assert scorer(["hello\n\n"] * 2, ["", " "]) == [[], []]
        assert stand_in.rows == []


def test_a_step_whose_end_vllm_cannot_read_leaves_the_answer_without_a_reward(directory):
    long, limit = "the fox is red. " * 4 + "the hare", 16
    stand_in = StandIn(directory, limit=limit)
    with served(stand_in) as url:
        scorer, local = as_scorer(url), as_scorer(directory)
        stand_in.rows.clear()
        given = scorer(["a " * 40 + "\n\n"] * 3, [long, "red.", ""])
        assert [len(row) for row in stand_in.rows] == [limit]
        local.position_limit = limit
        assert given[0] is None
        assert given[2] == []
        assert_close([given[1][0][1]], [local(["a " * 40 + "\n\n"], ["red."])[0][0][1]], FP32)
        assert local(["a " * 40 + "\n\n"], [long]) == [None]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"activated": True}, "whether raw scores are asked for or not: this is a sigmoid"),
        ({"cached": 1}, r"answered with the outputs of \d+ tokens in 2 rows for \d+ tokens in 2"),
        ({"lost": 1}, r"answered with the outputs of \d+ tokens in 1 rows for \d+ tokens in 2"),
        ({"number": lambda x: x * 3}, "answers with 3 numbers per token, and .*prm has 1 labels: it serves another"),
        ({"number": lambda x: x[0]}, "answered with something else than outputs of tokens"),
        ({"number": lambda x: [str(x[0])]}, "answered with wrong outputs: it returned '"),
        ({"number": lambda x: [1e39]}, "answered with wrong outputs: it returned 1e.39"),
        ({"number": lambda x: [float("nan")]}, "no valid JSON .it holds NaN"),
        ({"task": "classify"}, "vLLM at .* does not score: .* 400.*Try switching the model's pooling_task"),
        ({"status": 401}, "answered 401"),
    ],
)
def test_a_server_that_does_not_give_the_raw_outputs_of_all_tokens_is_refused(directory, fault, message):
    with served(StandIn(directory, **fault)) as url, pytest.raises(ValueError, match=message):
        as_scorer(url)


def test_a_softmax_of_two_labels_is_refused(tmp_path):
    """The difference of two probabilities is no log-odds, and it may be negative."""
    path = _saved(tmp_path / "prm", labels=2)
    with served(StandIn(path, activated=True)) as url, pytest.raises(ValueError, match="this is a sigmoid"):
        as_scorer(url)


def test_a_missing_number_leaves_its_answer_without_a_reward(directory):
    stand_in = StandIn(directory)
    with served(stand_in) as url:
        scorer = as_scorer(url)
        stand_in.faults["number"] = lambda x: [None]
        assert scorer(PROMPTS, TEXTS) == [None, None, [], None, []]


def test_a_server_that_changes_in_a_run(directory):
    stand_in = StandIn(directory)
    with served(stand_in) as url:
        scorer = as_scorer(url)
        before = scorer(PROMPTS, TEXTS)
        for fault, error in (
            ({"name": "/elsewhere/prm"}, PermanentRewardError),
            ({"cached": 1}, RewardCallError),
            ({"status": 503}, RewardCallError),
            ({"status": 400}, PermanentRewardError),
        ):
            stand_in.faults = fault
            with pytest.raises(error):
                scorer(PROMPTS, TEXTS)
        stand_in.faults = {}
        assert scorer(PROMPTS, TEXTS) == before


def test_the_rules_come_from_the_card_and_are_needed(directory, tmp_path):
    bare = shutil.copytree(directory, tmp_path / "prm")
    (bare / CARD_FILE).unlink()
    with served(StandIn(bare)) as url:
        with pytest.raises(ValueError, match=f"has no {CARD_FILE}, and vLLM does not say .*`{url}#DIRECTORY`"):
            as_scorer(url)
        _assert_same(as_scorer(f"{url}#{directory}")(PROMPTS, TEXTS), as_scorer(directory)(PROMPTS, TEXTS))
    (bare / "config.json").unlink()
    with served(StandIn(directory, name=str(bare))) as url, pytest.raises(ValueError, match="needs the tokenizer and"):
        as_scorer(url)


def test_a_model_with_more_labels_is_refused(tmp_path):
    path = _saved(tmp_path / "prm", labels=3)
    with served(StandIn(path)) as url, pytest.raises(ValueError, match="has 3 labels; a step has one output, or two"):
        as_scorer(url)


def test_text_embeddings_inference_serves_no_steps(directory):
    class TEI(StandIn):
        kind = "tei"

        def answer(self, path, body):
            content = {"model_id": self.path, "model_type": {"classifier": {}}, "max_input_length": 64}
            return (200, content) if path == "/info" else (404, {})

    refusal = "which judges steps, and text-embeddings-inference takes only one that scores whole answers"
    with served(TEI(directory)) as url, pytest.raises(ValueError, match=refusal):
        as_scorer(url)


def test_the_token_is_that_of_the_server(directory, monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, "guess")
    with served(StandIn(directory)) as url, pytest.raises(ValueError, match=f"Set {TOKEN_VARIABLE} to its key"):
        as_scorer(url)
    assert "guess" not in json.dumps(str(directory))
