"""Reward models that vLLM or text-embeddings-inference serves, with stand-ins for both that run a real tiny model.

The stand-ins have the requests and answers of vLLM 0.28 (`/v1/models`, `/classify`: token ids under `input`, numbers
under `data[].probs`, `use_activation`) and of text-embeddings-inference 1.8 (`/info`, `/tokenize`, `/predict`: lists
of one text under `inputs`, `raw_scores`, one list of labels per text). Other paths answer 404, but
text-embeddings-inference answers `GET /` with 200 and nothing.
"""

import json
import shutil
from types import SimpleNamespace

import pytest
import tenacity
import tiny
import torch
from pooled_server import served
from tolerances import FP32, assert_close
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_recipes.rewards.attempts import PermanentRewardError, RewardCallError
from rlhf_recipes.rewards.card import CARD_FILE
from rlhf_recipes.rewards.functions import as_scorer
from rlhf_recipes.rewards.pooled import TEIRewardModel, VLLMRewardModel
from rlhf_recipes.rewards.scorer import RewardModelScorer
from rlhf_recipes.rewards.transport import TOKEN_VARIABLE

pytestmark = pytest.mark.tiny

TEXTS = ["the fox\n\n", "is the hare in the cave?\n\n", "a\n\n"] * 5
ANSWERS = ["is red", "no, the bear eats berries at night", "b"] * 5
IDS = [[20, 1], [20, 99], [1]] * 5
CHATS = [[[{"role": role, "content": text}] for text in ("the fox", "a")] for role in ("user", "assistant")]
KINDS = ["vllm", "tei"]


class StandIn:
    """Answer as a server does.

    Args:
        path: Directory of the reward model.
        kind: `vllm` or `tei`.
        faults: Ways in which it misbehaves.
    """

    def __init__(self, path, kind, **faults):
        self.model = AutoModelForSequenceClassification.from_pretrained(path).eval()
        self.model.config.pad_token_id = None  # it reads the last token, as vLLM does
        self.tokenizer, self.kind, self.faults = AutoTokenizer.from_pretrained(path), kind, faults
        self.path, self.requests, self.tokens = str(path), [], []

    def answer(self, path, body):
        """Return status and content."""
        self.requests.append((path, body))
        if "status" in self.faults and path in ("/classify", "/predict"):
            return self.faults["status"], {"error": "overloaded"}
        found = getattr(self, f"{self.kind}_{path.strip('/').replace('/', '_')}", None)
        return (404, {"detail": "Not Found"}) if found is None else (200, found(body))

    def vllm_v1_models(self, body):
        name = self.faults.get("name", self.path)
        return {
            "object": "list",
            "data": [{"id": "served", "root": name, "max_model_len": self.faults.get("limit", 64)}],
        }

    def vllm_classify(self, body):
        assert body["model"] == "served"
        scores = self._scores(body["input"], body["use_activation"])
        rows = [{"index": i, "label": "LABEL_0", "probs": score, "num_classes": 1} for i, score in enumerate(scores)]
        return {"id": "classify-1", "object": "list", "data": rows[::-1], "usage": {"prompt_tokens": 1}}

    def tei_info(self, body):
        name = self.faults.get("name", self.path)
        return {"model_id": name, "model_type": {"reranker": {}}, "max_input_length": 64, "max_client_batch_size": 4}

    def tei_tokenize(self, body):
        assert body["add_special_tokens"] is True
        rows = [self.tokenizer(text)["input_ids"] for text in body["inputs"]]
        doubled = [0] * bool(self.faults.get("bos"))
        return [[{"id": i, "text": "", "special": False} for i in doubled + row] for row in rows]

    def tei_predict(self, body):
        assert body["truncate"] is False
        rows = [self.tokenizer(text)["input_ids"] for (text,) in body["inputs"]]
        assert len(rows) <= 4
        return [[{"label": "LABEL_0", "score": x} for x in row] for row in self._scores(rows, not body["raw_scores"])]

    @torch.no_grad()
    def _scores(self, rows, activated):
        self.tokens += rows
        scores = [self.model(input_ids=torch.tensor([row])).logits[0].double() for row in rows]
        if self.faults.get("mixed") and len(rows) > 1:
            scores = [score + 1 for score in scores]
        if activated or self.faults.get("activated"):
            scores = [torch.sigmoid(score) for score in scores]
        scores = [score.tolist() * self.faults.get("labels", 1) for score in scores]
        return scores[: len(scores) - self.faults.get("lost", 0)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Write a trained reward model with its card."""
    directory = tmp_path_factory.mktemp("pooled")
    trainer = tiny.reward_trainer(directory / "rm")
    trainer.evaluate()
    trainer.save_model()
    return directory / "rm"


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, "word")
    monkeypatch.setattr(tenacity.nap, "time", SimpleNamespace(sleep=lambda seconds: None))


def _local(directory):
    scorer = RewardModelScorer.from_pretrained(str(directory))
    scorer.policy_eos_token_ids = [1]
    return scorer


@pytest.mark.parametrize("kind", KINDS)
def test_the_scores_are_the_local_ones(directory, kind):
    with served(StandIn(directory, kind)) as url:
        scorer = as_scorer(url)
        assert isinstance(scorer, {"vllm": VLLMRewardModel, "tei": TEIRewardModel}[kind])
        scorer.policy_eos_token_ids, local = [1], _local(directory)
        for prompts, completions, ids in ((TEXTS, ANSWERS, IDS), (TEXTS, ANSWERS, [[20]] * 15), (*CHATS, None)):
            assert_close(scorer(prompts, completions, ids), local(prompts, completions, ids), FP32)
        assert scorer.prompt_lengths(TEXTS) == local.prompt_lengths(TEXTS)
        assert (scorer.__name__, scorer.card) == ("rm", local.card)
        assert scorer.identity() == as_scorer(str(directory)).identity()


@pytest.mark.parametrize("kind", KINDS)
def test_a_trainer_takes_it_like_a_local_one(directory, kind, tmp_path):
    with served(StandIn(directory, kind)) as url:
        scores = []
        for number, rewards in enumerate((url, str(directory))):
            trainer = tiny.ppo_trainer(tmp_path / str(number), rewards=rewards)
            trainer.train()
            scores.append(trainer.rollout.scores)
    assert_close(*scores, FP32)


def test_vllm_gets_no_token_behind_the_one_that_the_score_is_read_at(directory, tmp_path):
    """A model whose padding token is EOS reads the token before EOS. vLLM would read EOS."""
    shutil.copytree(directory, tmp_path / "rm")
    for name, key in (("config.json", "pad_token_id"), (CARD_FILE, "pad_token_id")):
        file = tmp_path / "rm" / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: 1}))
    stand_in = StandIn(tmp_path / "rm", "vllm")
    with served(stand_in) as url:
        scorer = as_scorer(url)
        assert_close(scorer(TEXTS, ANSWERS), _local(tmp_path / "rm")(TEXTS, ANSWERS), FP32)
    assert all(row[-1] != 1 for row in stand_in.tokens)


def test_rows_beyond_vllms_limit_lose_their_beginning(directory):
    stand_in = StandIn(directory, "vllm", limit=16)
    with served(stand_in) as url:
        as_scorer(url)(["the fox is red and " * 9], ["sleeps"])
    assert max(map(len, stand_in.tokens)) == 16


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_behind_the_address_are_used(directory, kind):
    with served(StandIn(directory, kind, name="/elsewhere/rm")) as url:
        with pytest.raises(ValueError, match=f"needs the tokenizer .* behind the address: `{url}#DIRECTORY`"):
            as_scorer(url)
        assert_close(as_scorer(f"{url}#{directory}")(TEXTS, ANSWERS), _local(directory)(TEXTS, ANSWERS), FP32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"activated": True}, "whether raw scores are asked for or not: this is a sigmoid"),
        ({"mixed": True}, "in one request and .* in two: it does not read their padding"),
        ({"labels": 2}, "has 2 labels at .*, and a reward model has one"),
        ({"lost": 1}, "answered with 1 scores for 2 completions"),
        ({"status": 401}, "answered 401"),
    ],
)
def test_a_server_that_gives_no_single_raw_scores_is_refused(directory, kind, fault, message):
    with served(StandIn(directory, kind, **fault)) as url, pytest.raises(ValueError, match=message):
        as_scorer(url)


def test_other_special_tokens_are_refused(directory):
    refusal = "reads the tokens .* where .* was trained on .* adds other special tokens"
    with served(StandIn(directory, "tei", bos=True)) as url, pytest.raises(ValueError, match=refusal):
        as_scorer(url)


@pytest.mark.parametrize("kind", KINDS)
def test_an_overloaded_server_may_be_asked_again_and_a_refusal_is_final(directory, kind):
    stand_in = StandIn(directory, kind)
    with served(stand_in) as url:
        scorer = as_scorer(url)
        for status, error in ((429, RewardCallError), (503, RewardCallError), (400, PermanentRewardError)):
            stand_in.faults["status"] = status
            with pytest.raises(error, match=str(status)):
                scorer(TEXTS, ANSWERS)


@pytest.mark.parametrize("kind", KINDS)
def test_another_model_at_the_same_address_ends_the_run(directory, kind):
    """A server may be restarted with another model. The requests of the run would still fit it."""
    stand_in = StandIn(directory, kind)
    with served(stand_in) as url:
        scorer = as_scorer(url)
        before = scorer(TEXTS, ANSWERS)
        stand_in.faults["name"] = "/elsewhere/rm"
        with pytest.raises(PermanentRewardError, match=f"{url} serves another model than when this run began"):
            scorer(TEXTS, ANSWERS)
        del stand_in.faults["name"]
        assert scorer(TEXTS, ANSWERS) == before


def test_an_unknown_server_and_a_wrong_token_name_the_command_and_the_variable(directory, monkeypatch):
    with served(StandIn(directory, "nothing")) as url, pytest.raises(ValueError, match="No reward model is served at"):
        as_scorer(url)
    with served(StandIn(directory, "nothing")) as url, pytest.raises(ValueError, match="leave out `#files`"):
        as_scorer(f"{url}#files")
    monkeypatch.setenv(TOKEN_VARIABLE, "guess")
    for kind in KINDS:
        refusal = f"lets nobody in .* answered 401.* Set {TOKEN_VARIABLE} to its key"
        with served(StandIn(directory, kind)) as url, pytest.raises(ValueError, match=refusal):
            as_scorer(url)
