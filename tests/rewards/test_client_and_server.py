"""A served reward model, with a real server on this machine and with servers that misbehave."""

import json
import logging
import re
import shutil
import socket
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
import tenacity
import tiny
import yaml
from datasets import Dataset
from processes import free_port, run_script, start_script, wait_for_server
from tiny_steps import save_step_model
from tolerances import FP32, assert_close
from transformers import GPT2Config, GPT2ForSequenceClassification

from rlhf_recipes.options.recipes import JudgeArguments, ServeArguments
from rlhf_recipes.rewards.attempts import PermanentRewardError, RewardCallError
from rlhf_recipes.rewards.calls import RewardCalls
from rlhf_recipes.rewards.card import CARD_FILE, RewardModelCard
from rlhf_recipes.rewards.client import RemoteRewardModel
from rlhf_recipes.rewards.functions import as_scorer
from rlhf_recipes.rewards.judges import load_judges
from rlhf_recipes.rewards.scorer import RewardModelScorer
from rlhf_recipes.rewards.scoring_queue import ScoringQueue
from rlhf_recipes.rewards.server import reward_app
from rlhf_recipes.rewards.transport import TOKEN_VARIABLE

pytestmark = pytest.mark.recipe

RECIPES = Path(__file__).parents[2] / "recipes"
TOKEN = "a-token-that-nobody-may-see"
TEXTS = ["the fox\n\n", "is the hare in the cave?\n\n", "a\n\n"] * 5
ANSWERS = ["is red", "no, the bear eats berries at night", "b"] * 5
IDS = [[20, 1], [20, 99], [1]] * 5


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Write a trained reward model with its card, a policy and prompts."""
    directory = tmp_path_factory.mktemp("served")
    trainer = tiny.reward_trainer(directory / "rm")
    trainer.evaluate()
    trainer.save_model()
    tiny.save(tiny.policy(tiny.tokenizer()), directory / "policy")
    tiny.write_splits(tiny.prompts(), directory / "prompts")
    return directory


@contextmanager
def _served(directory, port, *options, **environment):
    arguments = ["--model_name_or_path", "rm", "--port", port, "--batch_size", 2, *options]
    process = start_script(
        RECIPES / "serve_reward_model.py", *arguments, directory=directory, **{TOKEN_VARIABLE: TOKEN} | environment
    )
    try:
        wait_for_server(process, f"http://127.0.0.1:{port}/health", directory / "output.txt")
        yield process
    finally:
        process.kill()
        process.join()


@pytest.fixture(scope="module")
def server(directory):
    port = free_port()
    with _served(directory, port, "--max_request_bytes", 10_000):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(autouse=True)
def _token(monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr(tenacity.nap, "time", SimpleNamespace(sleep=lambda seconds: None))


def _local(directory):
    scorer = RewardModelScorer.from_pretrained(str(directory / "rm"))
    scorer.policy_eos_token_ids = [1]
    return scorer


def test_the_scores_are_the_local_ones(directory, server):
    remote = RemoteRewardModel(server + "/", batch_size=4, policy_eos_token_ids=[1])
    scores, local = remote(TEXTS, ANSWERS, IDS), _local(directory)(TEXTS, ANSWERS, IDS)
    assert_close(scores, local, FP32)
    assert len({round(score, 4) for score in local}) == 3
    unfinished = remote(TEXTS, ANSWERS, [[20]] * 15)
    assert_close(unfinished, _local(directory)(TEXTS, ANSWERS, [[20]] * 15), FP32)
    assert abs(unfinished[0] - scores[0]) > 1e-4, "whether a completion has ended is told"


def test_the_recipe_serves_a_process_reward_model(directory):
    path, port = save_step_model(directory / "prm"), free_port()
    with _served(directory, port, "--model_name_or_path", "prm"):
        remote, local = as_scorer(f"http://127.0.0.1:{port}"), as_scorer(path)
        local.batch_size = 2
        assert remote(TEXTS, ANSWERS) == local(TEXTS, ANSWERS)
        assert remote.identity() == local.identity()


def test_messages_are_scored_by_the_servers_template(directory, server):
    chats = [[[{"role": role, "content": text}] for text in ("the fox", "a")] for role in ("user", "assistant")]
    assert_close(RemoteRewardModel(server)(*chats), _local(directory)(*chats), FP32)


def test_the_card_is_the_servers(directory, server):
    remote = RemoteRewardModel(server)
    assert remote.__name__ == "rm"
    assert remote.card == RewardModelCard.load(directory / "rm")


def _trainer(output_dir, rewards, **options):
    return tiny.ppo_trainer(output_dir, rewards=rewards, **options)


def test_a_trainer_takes_it_like_a_local_one(directory, server, tmp_path):
    trainers = []
    for kind, path in (("remote", server), ("local", str(directory / "rm"))):
        trainers.append(_trainer(tmp_path / kind, path, reward_timeout=77.0))  # sets the seed
        trainers[-1].train()
    remote, local = trainers
    assert remote.reward_func_names == local.reward_func_names == ["rm"]
    assert_close(remote.rollout.scores, local.rollout.scores, FP32)
    assert remote.reward_normalizer.mean == pytest.approx(local.reward_normalizer.mean)
    card = RewardModelCard.load(directory / "rm")
    fresh = _trainer(tmp_path / "fresh", server)
    assert (fresh.reward_normalizer.mean, fresh.scorers[0].timeout) == (pytest.approx(card.score_mean), 300.0)
    assert remote.scorers[0].timeout == 77.0
    assert remote.scorers[0].policy_eos_token_ids == tiny.END_IDS


def test_a_run_goes_on_with_the_same_weights_wherever_they_are_served(directory, server, tmp_path):
    other = tiny.save(tiny.reward_model(tiny.tokenizer(), seed=2), directory / "elsewhere" / "rm")
    shutil.copy(directory / "rm" / CARD_FILE, other)
    options = {"save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "constant"}
    _trainer(tmp_path, server, **options).train()
    port = free_port()
    with _served(directory, port):
        for path in (str(directory / "rm"), f"http://127.0.0.1:{port}"):
            resumed = _trainer(tmp_path / "again", path, max_steps=8, **options)
            resumed.train(str(tmp_path / "checkpoint-4"))
            assert resumed.state.global_step == 8
    with _served(directory, port, "--model_name_or_path", other):
        changed = _trainer(tmp_path / "again", f"http://127.0.0.1:{port}", max_steps=12, **options)
        with pytest.raises(ValueError, match=r"of another run: the rewards was .'[0-9a-f]{16}'., is .'[0-9a-f]{16}'."):
            changed.train(str(tmp_path / "again" / "checkpoint-8"))


def test_another_boundary_is_refused(server, tmp_path):
    with pytest.raises(ValueError, match=r"Set `response_separator: \"\\n\\n\"`"):
        _trainer(tmp_path, server, response_separator=" ->")
    with pytest.raises(ValueError, match="trained on plain text, but the prompts are chat messages"):
        _trainer(tmp_path, server, chat=True)


def test_a_served_judge_has_the_models_name(directory, server):
    data, separator = tiny.prompts(), "\n\n"
    judges, _ = load_judges(JudgeArguments(judge_models=[server]), data, response_separator=separator)
    assert list(judges) == ["rm"]
    both = JudgeArguments(judge_models=[server, str(directory / "rm")])
    with pytest.raises(ValueError, match="`judge_models` must have different names, got rm, rm"):
        load_judges(both, data, response_separator=separator)
    JudgeArguments(judge_models=["http://a:8000", "http://b:8000"])


def _post(server, body, token=TOKEN):
    return requests.post(f"{server}/score", data=body, headers={"Authorization": f"Bearer {token}"}, timeout=30)


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        ('{"prompts": [', 422, "Invalid JSON"),
        ("[]", 422, "Input should be an object"),
        ({"prompts": [], "completions": [], "finished": []}, 422, "at least 1 item"),
        ({"prompts": ["a"], "completions": ["b", "c"], "finished": [True]}, 422, "must be equally long"),
        ({"prompts": ["a"], "completions": ["b"]}, 422, "Field required"),
        ({"prompts": ["a"], "completions": ["b"], "finished": ["yes"]}, 422, "valid boolean"),
        ({"prompts": ["a"], "completions": ["b"], "finished": [True], "scores": [1]}, 422, "Extra inputs"),
        ({"prompts": ["a"], "completions": [[{"role": "user", "content": "b"}]], "finished": [True]}, 422, "both be"),
        ({"prompts": [[{"role": "user"}]], "completions": [[]], "finished": [True]}, 422, "Field required"),
        ({"prompts": [""], "completions": [""], "finished": [False]}, 422, "have no token"),
        ({"prompts": ["a" * 20_000], "completions": ["b"], "finished": [True]}, 413, "a request may have 10000 bytes"),
    ],
)
def test_a_malformed_request_is_refused_with_a_reason(server, body, status, reason):
    answer = _post(server, body if isinstance(body, str) else json.dumps(body))
    assert answer.status_code == status
    assert reason in answer.text
    assert len(answer.text) < 1000


def test_a_stranger_gets_nothing(server, monkeypatch, no_pauses):
    assert _post(server, "{}", token="guess").status_code == 401
    assert requests.get(server, timeout=30).status_code == 401
    assert requests.get(f"{server}/docs", timeout=30).status_code == 404
    assert requests.get(f"{server}/health", timeout=30).json() == {"status": "ok"}
    monkeypatch.delenv(TOKEN_VARIABLE)
    with pytest.raises(ValueError, match=f"401: .*set {TOKEN_VARIABLE}"):
        RemoteRewardModel(server)


def test_a_refusal_is_final_and_the_token_is_not_told(server, caplog, no_pauses):
    remote = RemoteRewardModel(server)
    calls = RewardCalls(retries=3)
    with caplog.at_level(logging.DEBUG), pytest.raises(RewardCallError, match="`rm` failed at the first .* 413") as e:
        calls.guard(remote)(prompts=["a" * 20_000], completions=["b"])
    assert TOKEN not in caplog.text + str(e.getrepr())
    with pytest.raises(PermanentRewardError, match="prompts for a served reward model must be text"):
        remote([[{"role": "user", "content": b"image"}]], [[{"role": "assistant", "content": "b"}]])
    with pytest.raises(ValueError, match=f"holds a password: set {TOKEN_VARIABLE} instead"):
        RemoteRewardModel("http://me:secret@127.0.0.1:1")


class _Recorder:
    """Score by length, and record the size of each batch."""

    __name__, card = "recorder", None

    def __init__(self, failing=()):
        self.batches, self.failing, self.busy = [], failing, threading.Event()

    def token_ids(self, prompts, completions, finished):
        if "unreadable" in prompts:
            raise KeyError("no such role")
        return [[0] * len(prompt) for prompt in prompts]

    def score_token_ids(self, token_ids):
        self.busy.wait(30)
        self.batches.append(len(token_ids))
        if len(self.batches) in self.failing:
            raise MemoryError("too long")
        return [float(len(ids)) for ids in token_ids]


def _request(*prompts):
    return {"prompts": list(prompts), "completions": ["x"] * len(prompts), "finished": [True] * len(prompts)}


def test_requests_that_arrive_together_are_one_batch():
    recorder = _Recorder(failing=[2])
    queue = ScoringQueue(recorder, max_waiting=8)
    first = queue.submit(_request("a"))
    time.sleep(0.2)  # it is being scored
    answers = [queue.submit(_request("aa", "a")), queue.submit(_request("unreadable")), queue.submit(_request("aaa"))]
    recorder.busy.set()
    assert first.result(10) == [1.0]
    with pytest.raises(ValueError, match="KeyError: 'no such role'"):
        answers[1].result(10)
    for answer in (answers[0], answers[2]):
        with pytest.raises(MemoryError):
            answer.result(10)
    again = [queue.submit(_request("aa", "a")), queue.submit(_request("aaa"))]
    assert [answer.result(10) for answer in again] == [[2.0, 1.0], [3.0]]
    assert recorder.batches[:2] == [1, 3]


def test_too_many_waiting_requests_are_sent_away(directory):
    port = free_port()
    script = directory / "full.py"
    script.write_text(FULL.format(port=port))
    process = start_script(script, directory=directory)
    try:
        url = f"http://127.0.0.1:{port}"
        remote = RemoteRewardModel(url, batch_size=1, concurrency=6, retries=6)
        with pytest.raises(RewardCallError, match="503: .*too many requests wait"):
            remote(["a"] * 6, ["b"] * 6)
        with pytest.raises(RewardCallError, match="500: .*an infinite score"):
            _settled(remote, "inf")
        assert _settled(remote, "nan") == [None], "a reward model's NaN has a meaning of its own"
        assert remote.card is None
    finally:
        process.kill()
        process.join()


def _settled(remote, prompt):
    """Return the answer as soon as the queue has room again."""
    while True:
        try:
            return remote([prompt], ["b"])
        except RewardCallError as error:
            if "503" not in str(error):
                raise
            time.sleep(0.2)


FULL = """
import math, time
import uvicorn
from rlhf_recipes.rewards.server import reward_app

class Slow:
    __name__, card = "slow", None

    def token_ids(self, prompts, completions, finished):
        return [[{{"a": 0, "inf": 1, "nan": 2}}[prompt]] for prompt in prompts]

    def score_token_ids(self, token_ids):
        time.sleep(0.5)
        return [(0.0, math.inf, math.nan)[ids[0]] for ids in token_ids]

uvicorn.run(reward_app(Slow(), max_waiting=1), host="127.0.0.1", port={port}, log_level="warning")
"""


def test_a_tokenizer_that_is_not_the_cards_is_not_served(directory):
    scorer = _local(directory)
    scorer.tokenizer = tiny.tokenizer(vocab_size=280)
    with pytest.raises(ValueError, match="Use the tokenizer saved beside the reward model"):
        reward_app(scorer)


@contextmanager
def _answers(*answers):
    """Serve each answer (status, body, seconds) once, in order, and then repeat the last one."""
    left = list(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send(200, json.dumps({"name": "odd", "card": None}))

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            status, body, seconds = left.pop(0) if len(left) > 1 else left[0]
            time.sleep(seconds)
            self.send(status, body)

        def send(self, status, body):
            self.send_response(status)
            if status == 302:
                self.send_header("Location", "http://127.0.0.1:1/elsewhere")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with suppress(OSError):  # the client has gone
                self.wfile.write(body.encode())

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}"
    finally:
        httpd.shutdown()
        httpd.server_close()


GOOD = (200, '{"scores": [1.0, 2.0]}', 0)
ROWS = {"prompts": ["a", "b"], "completions": ["x", "y"]}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ((500, "oops", 0), "answered 500: oops"),
        ((429, "slow down", 0), "answered 429"),
        ((200, '{"scores": [1.0]}', 0), "answered with 1 scores for 2 completions"),
        ((200, '{"scores": [1.0, NaN]}', 0), "no valid JSON .it holds NaN"),
        ((200, '{"scores": [1.0, "2"]}', 0), "it returned '2' for completion 1"),
        ((200, '{"score": 1.0}', 0), "answered with no scores for 2 completions"),
        ((200, "<html>", 0), "no valid JSON"),
        ((200, "[1.0, 2.0]", 0), "something else than scores"),
        ((*GOOD[:2], 3), r"no answer within 1 s .`reward_timeout`"),
    ],
)
def test_a_server_that_misbehaves_is_asked_again(bad, reason, no_pauses, caplog):
    with _answers(bad, GOOD) as url:
        calls = RewardCalls(timeout=1.0, retries=1)
        assert calls.guard(RemoteRewardModel(url, timeout=1.5))(**ROWS) == [1.0, 2.0]
        assert calls.settle() == {"odd/failed_attempts": 1.0, "odd/failed_calls": 0.0}
    with _answers(bad) as url, pytest.raises(RewardCallError, match=f"`odd` failed 2 times: .*{reason}"):
        RewardCalls(timeout=1.0, retries=1).guard(RemoteRewardModel(url, timeout=1.5))(**ROWS)


def test_a_slow_server_is_given_up_by_the_client_itself():
    with _answers((*GOOD[:2], 3)) as url, pytest.raises(RewardCallError, match="does not answer .ReadTimeout"):
        RemoteRewardModel(url, timeout=0.2)(**ROWS)


def test_a_redirection_is_not_followed():
    with _answers((302, "", 0)) as url, pytest.raises(PermanentRewardError, match="answered 302"):
        RemoteRewardModel(url)(**ROWS)


def test_no_more_requests_at_a_time_than_allowed():
    running, most = [], []

    class Counting(RemoteRewardModel):
        def _score(self, batch):
            running.append(1)
            most.append(len(running))
            time.sleep(0.05)
            running.pop()
            return [float(text) for text in batch["prompts"]]

    with _answers(GOOD) as url:
        numbers = [str(i) for i in range(11)]
        assert Counting(url, batch_size=2, concurrency=3)(numbers, numbers) == [float(n) for n in numbers]
    assert max(most) == 3
    assert len(most) == 6


def test_nothing_there_names_the_command(no_pauses):
    with pytest.raises(ValueError, match=r"No reward model is served at .* Start it there: `rlhf serve --model_name"):
        RemoteRewardModel(f"http://127.0.0.1:{free_port()}", retries=1)


def test_a_server_that_dies_and_comes_back_does_not_end_the_training(directory, tmp_path):
    port, rollouts = free_port(), []
    restarted = _served(directory, port)

    with _served(directory, port) as process:

        def meddle(completions, **kwargs):
            """Kill the server before its second request, and start it again."""
            rollouts.append(len(completions))
            if len(rollouts) == 2:
                process.kill()
                process.join()
                threading.Thread(target=restarted.__enter__, daemon=True).start()
            return [0.0] * len(completions)

        trainer = _trainer(tmp_path, [meddle, f"http://127.0.0.1:{port}"], max_steps=12, reward_retries=6)
        trainer.train()
        restarted.__exit__(None, None, None)
    attempts, unscorable = (
        [*tiny.logged(trainer, n).values()] for n in ("rewards/rm/failed_attempts", "objective/unscorable")
    )
    assert trainer.state.global_step == 12
    assert attempts[0] == attempts[2] == 0
    assert attempts[1] >= 1
    assert unscorable == [0.0] * 3


@pytest.mark.parametrize("failed", ["raise", "mask"])
def test_a_server_that_stays_dead(directory, tmp_path, failed, no_pauses):
    port = free_port()
    with _served(directory, port) as process:

        def meddle(completions, **kwargs):
            process.kill()
            process.join()
            return tiny.length_reward(completions)

        trainer = _trainer(
            tmp_path, [meddle, f"http://127.0.0.1:{port}"], failed_rewards=failed, reward_retries=1, max_steps=8
        )
        if failed == "raise":
            with pytest.raises(RewardCallError, match=f"`rm` failed 2 times: .*127.0.0.1:{port} does not answer"):
                trainer.train()
            return
        trainer.train()
    assert [*tiny.logged(trainer, "rewards/rm/failed_calls").values()] == [1.0, 1.0]
    assert_close(trainer.rollout.scores, trainer.rollout.own_scores["meddle"], FP32)


def _run(directory, stage, name, options, code=0):
    (directory / f"{name}.yaml").write_text(yaml.safe_dump(options))
    ended, output = run_script(
        RECIPES / f"{stage}.py", "--config", f"{name}.yaml", directory=directory, **{TOKEN_VARIABLE: TOKEN}
    )
    assert ended == code, output[-3000:]
    return output


def test_the_recipes_take_an_address(directory, server):
    (directory / "my_judges.py").write_text("def broken(**kwargs):\n    raise ConnectionError('gone')\n")
    common = {
        "model_name_or_path": "policy",
        "dataset_name": "prompts",
        "reward_model_path": server,
        "tracking": False,
    }
    training = {"steps_per_generation": 2, "num_iterations": 2, "max_steps": 4, "max_completion_length": 6}
    evaluation = {"judge_models": [server], "eval_strategy": "steps", "eval_steps": 4}
    _run(directory, "ppo", "ppo", {**common, **tiny.RECIPE, **training, **evaluation, "output_dir": "ppo"})
    log = json.loads((directory / "ppo" / "trainer_state.json").read_text())["log_history"]
    assert any("eval_rm/win_rate" in entry for entry in log)
    judging = {
        "baseline_path": "policy", "output_dir": "evaluation", "judge_functions": ["my_judges:broken"],
        "max_completion_length": 6, "failed_rewards": "mask", "reward_retries": 0, "reward_timeout": 60.0,
    }  # fmt: skip
    output = _run(directory, "evaluate", "evaluation", {**common, **judging})
    results = json.loads((directory / "evaluation" / "results.json").read_text())
    assert results["reward_model/win_rate"] == 0.5
    assert results["reward_model/failed_calls"] == 0.0
    assert results["broken/failed_calls"] == 2.0
    assert TOKEN not in output


def test_prompts_beyond_the_positions_of_a_served_model_are_refused_before_the_run(directory, tmp_path, caplog):
    tok = tiny.tokenizer()
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 24}
    config = GPT2Config(vocab_size=len(tok), num_labels=1, pad_token_id=tok.pad_token_id, **sizes)
    tiny.save(GPT2ForSequenceClassification(config), directory / "small")
    texts = ["the fox", "is the hare in the cave? " * 3] * 4
    chats = [[{"role": "user", "content": text}] for text in texts]
    tiny.write_splits(Dataset.from_dict({"prompt": texts}), directory / "long")
    port = free_port()
    with _served(directory, port, "--model_name_or_path", "small"):
        address, refusal = (
            f"http://127.0.0.1:{port}",
            r"4 of 8 prompts of `{}` .* 24 positions of the reward model small",
        )
        for prompts in (texts, chats):
            data = Dataset.from_dict({"prompt": prompts})
            with pytest.raises(ValueError, match=refusal.format("train_dataset")):
                _trainer(tmp_path, address, data=data)
            trainer = _trainer(tmp_path, address, data=data, reward_overflow="cut")
            assert "so it reads only the last tokens" in caplog.text
            trainer.train()
            assert trainer.rollout.scores.isfinite().all()
        for path in ("small", address):
            evaluation = {"judge_models": [path], "tracking": False, "baseline_path": "policy", "dataset_name": "long"}
            options = {"model_name_or_path": "policy", "max_completion_length": 6, "output_dir": "too_long"}
            output = _run(directory, "evaluate", "too_long", evaluation | options, code=1)
            assert re.search(refusal.format("dataset_name"), output)
            assert not (directory / "too_long").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": 0}, "`port` must lie in"),
        ({"batch_size": 0}, "`batch_size` must be positive"),
        ({"max_request_bytes": 0}, "`max_request_bytes` must be positive"),
        ({"max_waiting": 0}, "`max_waiting` must be positive"),
    ],
)
def test_options_of_the_server(options, message):
    with pytest.raises(ValueError, match=message):
        ServeArguments(**options)


def test_the_server_listens_to_this_machine_only_by_default():
    assert socket.gethostbyname(ServeArguments().host) == "127.0.0.1"
