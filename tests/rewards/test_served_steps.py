"""A process reward model that our server serves: the numbers are those of the model in this process, bit for bit."""

import json
import math
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import requests
import tenacity
import tiny
import torch
import uvicorn
from processes import raw_server
from tiny_steps import save_step_model

from rlhf_recipes.evaluation.evaluated_models import evaluate_reward_models
from rlhf_recipes.options.baselines import CONFIGS
from rlhf_recipes.options.recipes import JudgeArguments
from rlhf_recipes.options.reward_model_evaluation import RewardModelEvaluationArguments
from rlhf_recipes.rewards.attempts import PermanentRewardError, RewardCallError
from rlhf_recipes.rewards.calls import RewardCalls
from rlhf_recipes.rewards.card import RewardModelCard
from rlhf_recipes.rewards.client import RemoteRewardModel
from rlhf_recipes.rewards.functions import as_scorer
from rlhf_recipes.rewards.judges import load_judges
from rlhf_recipes.rewards.server import reward_app
from rlhf_recipes.rewards.serving import LimitedConnection
from rlhf_recipes.rewards.steps import CUT, StepRow
from rlhf_recipes.rewards.transport import TOKEN_VARIABLE
from rlhf_recipes.trainers.baselines import TRAINERS
from rlhf_recipes.trainers.stock import Scoring

pytestmark = pytest.mark.tiny
TEXTS = ["the fox is red. the bear eats", "berries", "", "is the hare. in the cave. ", " "]
PROMPTS = ["hello\n\n"] * len(TEXTS)
CHATS = [[[{"role": role, "content": text}] for text in ("the fox", "a. b")] for role in ("user", "assistant")]
FORWARD = 8  # rows per forward of the server; other batches round in another way
ROWS = {"prompts": ["a", "b"], "completions": ["xy", "z"]}


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, "word")
    monkeypatch.setattr(tenacity.nap, "time", SimpleNamespace(sleep=lambda seconds: None))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_step_model(tmp_path_factory.mktemp("served") / "prm")


@contextmanager
def served(path, change=lambda scorer: None, **options):
    """Serve a model as `recipes/serve_reward_model.py` does, and give its address."""
    scorer = as_scorer(path)
    scorer.batch_size = FORWARD
    change(scorer)
    app = reward_app(scorer, **{"weights": scorer.identity(), "token": "word"} | options)
    config = uvicorn.Config(app, port=0, http=LimitedConnection, ws="none", log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)


@pytest.mark.parametrize(
    "card",
    [
        {"card": False},
        {"step_boundary": "sentence", "step_reward": "log_odds"},
        {"step_reward": "difference", "labels": 2},
        {"step_reward": "probability"},
    ],
)
def test_the_rewards_are_the_local_ones(tmp_path, card):
    path = save_step_model(tmp_path / "prm", **card)
    with served(path) as url:
        remote, local = as_scorer(url), as_scorer(path)
        for given in ((PROMPTS, TEXTS), CHATS):
            assert remote(*given) == local(*given)
        assert sum(map(len, local(PROMPTS, TEXTS))) > 1
        assert remote.prompt_lengths(PROMPTS) == local.prompt_lengths(PROMPTS)
        assert (remote.__name__, remote.card) == ("prm", local.card)
        assert remote.identity() == local.identity()
        assert (remote.gives_steps, remote.gives_log_odds) == (True, False)


def test_ppo_trains_by_the_same_bits(directory, tmp_path):
    """Rewards of all tokens, scores, statistics and weights are equal, not close."""
    ends = []
    with served(directory) as url:
        for number, rewards in enumerate((url, directory)):
            trainer = tiny.ppo_trainer(tmp_path / str(number), rewards=rewards)
            assert trainer.reward_normalizer.mean == 0.1
            trainer.scorers[0].batch_size = FORWARD
            trainer.train()
            ends.append((trainer.rollout.parts, trainer.rollout.scores, trainer.reward_normalizer, trainer.model))
    assert (ends[1][0] != 0).sum(dim=1).max() > 1
    for ours, theirs in zip(*(end[:2] for end in ends), strict=True):
        assert torch.equal(ours, theirs)
    assert ends[0][2].state_dict() == ends[1][2].state_dict()
    for ours, theirs in zip(*(end[3].parameters() for end in ends), strict=True):
        assert torch.equal(ours, theirs)


def _rloo(directory, path, reward):
    """Return the mean scores and the weights after two steps of RLOO."""
    options = {"steps_per_generation": 2, "num_generations": 2, "max_completion_length": 10, "max_steps": 2}
    trainer = TRAINERS["rloo"](
        path,
        CONFIGS["rloo"](str(directory), **tiny.QUIET, **options),
        Scoring([reward], "\n\n"),
        train_dataset=tiny.prompts(count=20),
        processing_class=tiny.tokenizer(),
    )
    trainer.scorers[0].batch_size = FORWARD
    trainer.train()
    return [*tiny.logged(trainer, "reward").values()], list(trainer.model.parameters())


def test_rloo_trains_by_the_same_sums(directory, tmp_path):
    policy = tiny.save(tiny.policy(tiny.tokenizer()), tmp_path / "policy")
    with served(directory) as url:
        (ours, here), (theirs, there) = (_rloo(tmp_path / str(i), policy, x) for i, x in enumerate((url, directory)))
    assert ours == theirs
    assert any(ours)
    assert all(torch.equal(*pair) for pair in zip(here, there, strict=True))


def test_judges_take_the_sum(directory, tmp_path):
    data, ids = tiny.prompts(), [[1]] * len(TEXTS)
    with served(directory) as url:
        sums = []
        for path in (url, directory):
            judges, _ = load_judges(JudgeArguments(judge_models=[path]), data, response_separator="\n\n")
            assert list(judges) == ["prm"]
            judge = RewardCalls().guard_judges(judges)["prm"]
            sums.append([float(x) for x in judge(prompts=PROMPTS, completions=TEXTS, completion_ids=ids)])
        assert sums[0] == sums[1]
        steps = as_scorer(directory)(PROMPTS, TEXTS)
        assert sums[0] == [math.fsum(reward for _, reward in each) for each in steps]
        assert sums[0][2] == 0


def test_a_run_goes_on_with_the_same_weights_and_rules_wherever_they_are_served(directory, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "constant"}
    other = save_step_model(tmp_path / "other" / "prm", step_reward="probability")
    with served(directory) as url:
        tiny.ppo_trainer(tmp_path / "run", rewards=url, **options).train()
    for path in (directory, other):
        with served(path) as url:
            resumed = tiny.ppo_trainer(tmp_path / "again", rewards=url, max_steps=5, **options)
            if path == other:
                with pytest.raises(ValueError, match="of another run: the rewards was .*signed.*, is .*probability"):
                    resumed.train(str(tmp_path / "run" / "checkpoint-4"))
            else:
                resumed.train(str(tmp_path / "run" / "checkpoint-4"))
                assert resumed.state.global_step == 5


def _post(url, path, **body):
    rows = {"prompts": ["a\n\n"], "completions": ["b c"], "finished": [True]}
    headers = {"Authorization": "Bearer word"}
    return requests.post(f"{url}{path}", data=json.dumps(rows | body), headers=headers, timeout=30)


@pytest.mark.parametrize("card", [True, False])
def test_an_older_client_fails_and_gets_no_sum(tmp_path, card):
    with served(save_step_model(tmp_path / "prm", card=card)) as url:
        info = requests.get(url, headers={"Authorization": "Bearer word"}, timeout=30).json()
        assert info["gives"] == "step_rewards"
        if card:
            with pytest.raises(TypeError, match="unexpected keyword argument 'step_separator'"):
                RewardModelCard(**info["card"])
        for path, kind in (("/score", "scores"), ("/head_scores", "head_scores")):
            answer = _post(url, path)
            assert answer.status_code == 422
            assert f"this model gives `step_rewards` and no `{kind}`" in answer.text


def test_a_server_of_scores_gives_no_steps(tmp_path):
    path = tiny.save(tiny.reward_model(tiny.tokenizer()), tmp_path / "rm")
    with served(path) as url:
        answer = _post(url, "/step_rewards")
        assert (answer.status_code, "gives `scores` and `head_scores` and no" in answer.text) == (422, True)
        assert as_scorer(url).gives_steps is False


INFO = {"name": "odd", "card": None, "weights": "a"}


@contextmanager
def _stub(*answers, **info):
    """Give these answers to the requests that follow `GET /`, and then repeat the last one."""
    left = [INFO | info, *answers]

    def answer(connection):
        connection.recv(2**16)
        body = json.dumps(left.pop(0) if len(left) > 1 else left[0]).encode()
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    with raw_server(answer) as url:
        yield url


def test_a_kind_that_this_version_does_not_know_is_refused():
    with _stub(gives="tree\x1b[2J") as url, pytest.raises(ValueError, match="gives `tree.*`, which this version") as e:
        RemoteRewardModel(url, retries=0)
    assert "\x1b" not in str(e.value)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"scores": [1.0, 2.0]}, "answered with no step rewards for 2 completions"),
        ({"step_rewards": [1.0, 2.0]}, "answered with no step rewards for 2 completions"),
        ({"step_rewards": [[[2, 1.0]]]}, "wrong step rewards: it returned 1 rewards for 2 completions"),
        ({"step_rewards": [[[2, 1.0]], [[2, 1.0]]]}, "end 2 for step 0 of completion 1, whose text has only 1 char"),
        ({"step_rewards": [[[2, 1.0], [1, 1.0]], []]}, "end 1 for step 1 of completion 0, which is not behind"),
        ({"step_rewards": [[[1.5, 1.0]], []]}, "not a whole number of characters"),
        ({"step_rewards": [[[1, None]], []]}, "holds None in place of a number"),
        ({"step_rewards": [[[1, "2"]], []]}, "it returned '2' for completion 0"),
        ({"step_rewards": [[[1, 1e39]], []]}, r"it returned 1e\+39 for completion 0"),
        ({"step_rewards": [[1.0, 2.0, 3.0], []]}, r"it returned \[1.0, 2.0, 3.0\] for completion 0"),
        ({"step_rewards": [[[1, 1.0]], []], "more": "x" * 5000}, "more than 1344 bytes: this is no list of scores"),
    ],
)
def test_an_answer_that_is_no_list_of_step_rewards_is_an_error_of_the_call(answer, reason):
    with _stub(answer, gives="step_rewards") as url, pytest.raises(RewardCallError, match=reason):
        RemoteRewardModel(url, retries=0)(**ROWS)


@pytest.mark.parametrize(
    ("gives", "call", "good"),
    [
        ("step_rewards", lambda remote: remote(**ROWS), {"step_rewards": [[[1, 0.5]], None]}),
        ("scores", lambda remote: remote(**ROWS), {"scores": [0.5, 1.0]}),
        ("scores", lambda remote: remote.prompt_lengths(ROWS["prompts"]), {"lengths": [1, 1]}),
    ],
)
def test_another_model_at_the_same_address_ends_the_run(gives, call, good):
    """A server may be restarted with another model. The requests of the run would still fit it."""
    with _stub(good, good | {"weights": "a"}, good | {"weights": "b"}, gives=gives) as url:
        remote = RemoteRewardModel(url, retries=0)
        assert call(remote) == call(remote), "an older server does not say its weights"
        with pytest.raises(PermanentRewardError, match=f"{url} serves another model than when this run began"):
            call(remote)


def test_a_step_without_a_number_leaves_its_answer_without_a_reward(directory):
    def spoil(scorer):
        inner, scorer._log_odds = (
            scorer._log_odds,
            lambda rows: [odds if len(odds) != 2 else odds * math.nan for odds in inner(rows)],
        )

    texts = ["a b", "c", ""]
    local = as_scorer(directory)
    spoil(local)
    with served(directory, spoil) as url:
        given = as_scorer(url)(["hello\n\n"] * 3, texts)
        assert given == local(["hello\n\n"] * 3, texts)
        assert [given[0], len(given[1]), given[2]] == [None, 1, []]


def test_an_infinite_reward_is_an_error_of_the_server(tmp_path):
    def spoil(scorer):
        inner, scorer._log_odds = scorer._log_odds, lambda rows: [odds * math.inf for odds in inner(rows)]

    path = save_step_model(tmp_path / "prm", step_reward="log_odds")
    with served(path, spoil) as url, pytest.raises(RewardCallError, match="500: .*an infinite score"):
        as_scorer(url)(PROMPTS, TEXTS)


def test_the_limits_of_the_server_hold(directory):
    with served(directory, max_tokens=32, max_request_bytes=100_000) as url:
        remote = as_scorer(url)
        with pytest.raises(PermanentRewardError, match="422: .*a text has .* tokens: `max_tokens` of this server"):
            remote(["a\n\n"], ["b " * 40])
        with pytest.raises(PermanentRewardError, match="413: .*a text has 600 characters"):
            remote(["a\n\n"], ["b" * 600])
        with pytest.raises(PermanentRewardError, match="413: .*a request may have 100000 bytes"):
            remote(["a" * 100_000], ["b"])
        assert _post(url, "/step_rewards", prompts=[""], completions=[""]).status_code == 422
        assert requests.post(f"{url}/step_rewards", timeout=30).status_code == 401


@pytest.mark.parametrize(("bos", "kept"), [(None, [6, 7, 8, 9]), (1, [1, 7, 8, 9])])
def test_a_step_keeps_its_token_in_a_row_that_is_cut(bos, kept):
    row = StepRow([1, *range(1, 10)], [0, 5, 6, 7, 9], [1, 2, 3, 4, 5])
    cut = row.within(4, bos)
    assert cut.token_ids == kept
    for place, before in zip(cut.places, row.places, strict=True):
        readable = before >= (6 if bos is None else 7)
        assert (cut.token_ids[place] == row.token_ids[before]) if readable else place == CUT
    assert cut.at_ends(torch.arange(4.0)).isnan().tolist() == [place == CUT for place in cut.places]
    assert row.within(None, bos) == row.within(10, bos) == row
    assert row.has_all_ends
    assert not cut.has_all_ends


def test_an_answer_whose_steps_do_not_fit_has_no_reward(directory):
    def limit(scorer):
        scorer.position_limit = 16

    local, texts = as_scorer(directory), ["the fox is red and " * 6, "berries", "a"]
    limit(local)
    prompts = ["a\n\n", "the hare in the cave " * 6 + "\n\n", "a\n\n"]
    with served(directory, limit) as url:
        remote = as_scorer(url)
        assert remote.position_limit == 16
        given = remote(prompts, texts)
        assert given == local(prompts, texts)
        assert [given[0], len(given[1]), len(given[2])] == [None, 1, 1]
        assert given[2] == as_scorer(directory)(prompts, texts)[2]


def test_an_evaluation_of_reward_models_refuses_it(directory, tmp_path):
    with served(directory) as url:
        args = RewardModelEvaluationArguments(reward_models=[url], output_dir=str(tmp_path), dataset_name="x")
        with pytest.raises(
            ValueError, match=f"{url} is a process reward model, which judges steps, and `reward_models`"
        ):
            evaluate_reward_models(args, [url], None, None, RewardCalls())
