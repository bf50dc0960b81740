"""What a hostile server can cost a client, and a hostile client a server: each has a limit in time and in bytes."""

import gzip
import io
import json
import socket
import threading
import time
import tracemalloc
from contextlib import closing, suppress

import pytest
import requests
import uvicorn
from processes import free_port, raw_server
from uvicorn.protocols.http.h11_impl import H11Protocol

from rlhf_recipes.rewards import server, serving
from rlhf_recipes.rewards.attempts import PermanentRewardError, RewardCallError
from rlhf_recipes.rewards.client import RemoteRewardModel
from rlhf_recipes.rewards.server import reward_app
from rlhf_recipes.rewards.serving import LimitedConnection

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
INFO = json.dumps({"name": "odd", "card": None}).encode()
ROWS = {"prompts": ["a", "b"], "completions": ["x", "y"]}


def _reward_server(send):
    """Answer a GET with a name, and let `send(connection)` answer everything else."""

    def answer(connection):
        if connection.recv(2**16).startswith(b"GET"):
            connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(INFO) + INFO)
        else:
            send(connection)

    return raw_server(answer)


def _drip(connection, head, part):
    connection.sendall(head)
    for _ in range(100):
        time.sleep(0.1)
        connection.sendall(part)


@pytest.mark.parametrize(
    ("head", "part"),
    [
        (HEAD + b"Content-Length: 1000\r\n\r\n", b" "),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
        (b"HTTP/1.1 200 OK\r\nX: ", b"y"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"HTTP/1.1 500 Error\r\nContent-Length: 1000\r\n\r\n", b"x"),
    ],
    ids=["body", "chunks", "headers", "one header", "continue", "refusal"],
)
def test_an_answer_that_drips_is_given_up_after_the_time_of_the_whole_call(head, part):
    with _reward_server(lambda connection: _drip(connection, head, part)) as url:
        remote = RemoteRewardModel(url, timeout=0.5)
        start = time.monotonic()
        with pytest.raises(RewardCallError, match=r"does not answer \(ReadTimeout: no whole answer in 0.5 s\)"):
            remote(**ROWS)
        assert time.monotonic() - start < 3


def test_a_thread_that_reads_a_body_ends_with_the_time():
    with _reward_server(lambda connection: _drip(connection, HEAD + b"Content-Length: 1000\r\n\r\n", b" ")) as url:
        remote, before = RemoteRewardModel(url, timeout=0.3), threading.active_count()
        with pytest.raises(RewardCallError):
            remote.prompt_lengths(["a"])
        deadline = time.monotonic() + 3
        while "reward-call" in [thread.name for thread in threading.enumerate()] and time.monotonic() < deadline:
            time.sleep(0.05)
        assert threading.active_count() <= before + 1  # the server's own


def _whole(body, *headers, status=b"200 OK"):
    return b"HTTP/1.1 " + status + b"\r\n" + b"".join(headers) + b"Content-Length: %d\r\n\r\n" % len(body) + body


@pytest.fixture(scope="module")
def zeros():
    """Return 256 MB in few bytes. They are never in memory together."""
    packed, megabyte = io.BytesIO(), bytes(2**20)
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=1) as file:
        for _ in range(256):
            file.write(megabyte)
    return packed.getvalue()


@pytest.mark.parametrize("status", [b"200 OK", b"500 Error"])
def test_a_gzip_bomb_costs_no_memory(status, zeros):
    bomb = _whole(zeros, b"Content-Encoding: gzip\r\n", status=status)
    with _reward_server(lambda connection: connection.sendall(bomb)) as url:
        remote = RemoteRewardModel(url)
        tracemalloc.start()
        try:
            with pytest.raises(RewardCallError, match="more than 1152 bytes|answered 500"):
                remote(**ROWS)
            assert tracemalloc.get_traced_memory()[1] < 2**25
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ('{"scores": ' + "[" * 1000, "no valid JSON"),
        ('{"scores": [1.0, Infinity]}', "no valid JSON .it holds Infinity"),
        ('{"scores": [1.0, 1e999]}', "wrong scores: it returned inf for completion 1"),
        ('{"scores": [1.0, 1%s]}' % ("0" * 400), "wrong scores: it returned 10*... for completion 1"),
        ('{"scores": [1.0, "\\u001b[2J"]}', r"wrong scores: it returned '\\x1b\[2J' for completion 1"),
        ('{"scores": [1.0, {"a": 1}]}', "wrong scores: it returned {'a': 1} for completion 1"),
        ('{"scores": [1.0, 2.0], "more": "' + "x" * 5000 + '"}', "more than 1152 bytes: this is no list of scores"),
        ("\x1b[2J", "no valid JSON"),
    ],
)
def test_an_answer_that_is_no_list_of_scores_is_an_error_of_the_call(body, reason):
    with (
        _reward_server(lambda connection: connection.sendall(_whole(body.encode()))) as url,
        pytest.raises(RewardCallError, match=reason) as error,
    ):
        RemoteRewardModel(url)(**ROWS)
    assert "\x1b" not in str(error.value)
    assert len(str(error.value)) < 300


def test_json_that_is_too_deep_is_a_clear_error():
    body = b'{"name": ' + b"[" * 200_000
    refusal = r"No reward model is served at .*no valid JSON \(too deep\)"
    listener = socket.create_server(("127.0.0.1", 0))

    def answer():
        connection = listener.accept()[0]
        connection.recv(2**16)
        connection.sendall(_whole(body))

    threading.Thread(target=answer, daemon=True).start()
    with closing(listener), pytest.raises(ValueError, match=refusal):
        RemoteRewardModel(f"http://127.0.0.1:{listener.getsockname()[1]}", retries=0)


@pytest.mark.parametrize("url", ["http://me:word@host", "http://host/?token=word", "http://host/?sig=word"])
def test_an_address_with_a_secret_is_refused_without_showing_it(url):
    with pytest.raises(ValueError, match="holds a password: set REWARD_MODEL_TOKEN") as error:
        RemoteRewardModel(url)
    assert "word@" not in str(error.value)
    assert "=word" not in str(error.value)


class _Scorer:
    """Score by length; one token is one character. Tokenise as long as `busy` is not set."""

    __name__, card = "short", None

    def __init__(self):
        self.busy, self.tokenised = threading.Event(), []
        self.busy.set()

    def token_ids(self, prompts, completions, finished):
        self.tokenised += prompts
        return [[0] * (len(p) + len(c)) for p, c in zip(prompts, completions, strict=True)]

    def score_token_ids(self, token_ids):
        return [float(len(ids)) for ids in token_ids]

    def prompt_lengths(self, prompts):
        self.busy.wait(20)
        return [len(prompt) for prompt in prompts]


@pytest.fixture
def served(monkeypatch):
    """A server that lives in this process: its scorer, its address, and its port."""
    monkeypatch.setattr(serving, "REQUEST_SECONDS", 0.5)
    monkeypatch.setattr(serving, "MAX_CONNECTIONS", 8)
    scorer, port = _Scorer(), free_port()
    app = reward_app(scorer, max_tokens=100, token="word", max_request_bytes=100_000)
    config = uvicorn.Config(app, port=port, http=LimitedConnection, ws="none", log_level="warning")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield scorer, f"http://127.0.0.1:{port}", port
    scorer.busy.set()
    running.should_exit = True
    thread.join(20)


@pytest.fixture(autouse=True)
def _token(monkeypatch):
    monkeypatch.setenv("REWARD_MODEL_TOKEN", "word")


def test_a_text_that_is_too_long_is_refused_before_it_is_tokenised(served):
    scorer, url, _ = served
    remote = RemoteRewardModel(url)
    assert remote(["a" * 90], ["b" * 10]) == [100.0]
    with pytest.raises(PermanentRewardError, match="422: .*a text has 101 tokens: `max_tokens` of this server allows"):
        remote(["a" * 90], ["b" * 11])
    scorer.tokenised.clear()
    with pytest.raises(PermanentRewardError, match="413: .*a text has 1601 characters"):
        remote(["a"], ["b" * 1601])
    with pytest.raises(PermanentRewardError, match="413: .*a text has 1601 characters"):
        remote.prompt_lengths([[{"role": "user", "content": "b" * 1601}]])
    assert scorer.tokenised == []


def test_too_many_rows_are_refused(served):
    rows = ["a"] * (server.MAX_ROWS + 1)
    with pytest.raises(PermanentRewardError, match="422: .*at most 4096 items"):
        RemoteRewardModel(served[1], batch_size=len(rows)).prompt_lengths(rows)


def test_a_long_count_keeps_nobody_waiting(served):
    scorer, url, _ = served
    scorer.busy.clear()
    remote = RemoteRewardModel(url, timeout=10)
    counting = threading.Thread(target=remote.prompt_lengths, args=(["abc"],))
    counting.start()
    assert requests.get(f"{url}/health", timeout=5).json() == {"status": "ok"}
    assert remote(["a"], ["b"]) == [2.0]
    scorer.busy.set()
    counting.join(10)
    assert not counting.is_alive()


@pytest.mark.parametrize(
    "half",
    [
        b"",
        b"POST /sc",
        b"POST /score HTTP/1.1\r\nHost: x\r\nX: ",
        b"POST /score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer word\r\nContent-Length: 900\r\n\r\n{",
        b"POST /score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer word\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{",
    ],
)
def test_a_request_that_stays_half_sent_is_closed(served, half):
    with socket.create_connection(("127.0.0.1", served[2]), timeout=10) as connection:
        connection.sendall(half)
        start = time.monotonic()
        with suppress(OSError):  # one byte at a time does not help
            while time.monotonic() - start < 5:
                time.sleep(0.1)
                connection.sendall(b"1" if half else b"")
                if not half and connection.recv(1) == b"":
                    break
        assert time.monotonic() - start < 3
    assert requests.get(f"{served[1]}/health", timeout=5).ok


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("first", ["GET /health", "GET /missing", "GET /"])
@pytest.mark.parametrize("half", [b"POST /sc", b"POST /lengths HTTP/1.1\r\nHost: x\r\nContent-Length: 900\r\n\r\n{"])
def test_a_second_request_that_stays_half_sent_is_closed(served, first, half, together, monkeypatch):
    monkeypatch.setattr(H11Protocol, "timeout_keep_alive_handler", lambda self: None)
    whole = f"{first} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer word\r\n\r\n".encode()
    half = half.replace(b"Host: x", b"Host: x\r\nAuthorization: Bearer word")
    with socket.create_connection(("127.0.0.1", served[2]), timeout=5) as connection:
        connection.sendall(whole + half if together else whole)
        assert connection.recv(2**16).startswith(b"HTTP/1.1")
        if not together:
            connection.sendall(half)
        start = time.monotonic()
        with suppress(ConnectionError):
            while connection.recv(2**16):
                pass
        assert time.monotonic() - start < 3


@pytest.mark.parametrize("header", ["X: y", "Connection: close", "Connection: upgrade\r\nUpgrade: h2c"])
def test_a_whole_request_may_take_long_to_answer(served, header):
    scorer, _, port = served
    scorer.busy.clear()
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        head = "POST /lengths HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer word\r\nContent-Length: 17\r\n"
        connection.sendall(f'{head}{header}\r\n\r\n{{"prompts":["a"]}}'.encode())
        time.sleep(0.8)  # longer than the request itself may take
        scorer.busy.set()
        assert connection.recv(2**16).startswith(b"HTTP/1.1 200")


def test_a_connection_that_is_kept_takes_a_late_second_request(served):
    with socket.create_connection(("127.0.0.1", served[2]), timeout=5) as connection:
        for _ in range(2):
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                assert (part := connection.recv(2**16)), "the connection is closed"
                answer += part
            time.sleep(0.8)  # longer than a request may take


def test_connections_are_counted(served):
    held = [socket.create_connection(("127.0.0.1", served[2])) for _ in range(8)]
    time.sleep(0.1)
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{served[1]}/health", timeout=5)
    for connection in held:
        connection.close()
    time.sleep(0.2)
    assert requests.get(f"{served[1]}/health", timeout=5).ok


@pytest.mark.parametrize("sent", [b"", b"Authorization: Bearer wrong\r\n", b"Authorization: Basic d29yZA==\r\n"])
def test_a_stranger_is_answered_before_a_body_is_read(served, sent):
    with socket.create_connection(("127.0.0.1", served[2]), timeout=5) as connection:
        connection.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\n" + sent + b"Content-Length: 1000000000\r\n\r\n")
        answer = connection.recv(2**16)
        assert answer.startswith(b"HTTP/1.1 401")
        assert b"connection: close" in answer.lower()


def test_a_body_that_is_too_large_is_refused_by_its_header(served):
    with socket.create_connection(("127.0.0.1", served[2]), timeout=5) as connection:
        head = b"POST /score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer word\r\nContent-Length: 1000000000\r\n\r\n"
        connection.sendall(head)
        assert connection.recv(2**16).startswith(b"HTTP/1.1 413")
