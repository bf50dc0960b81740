"""An MLflow server that keeps a run waiting is given up in time, at the start, during the training and at the end."""

import time
from types import SimpleNamespace

import mlflow
import pytest
import requests
from mlflow.exceptions import MlflowException
from mlflow.utils import rest_utils
from processes import raw_server

from rlhf_recipes.options.recipes import TrackingArguments
from rlhf_recipes.tracking import delivery
from rlhf_recipes.tracking.deadline import request_in_time
from rlhf_recipes.tracking.delivery import Delivery
from rlhf_recipes.tracking.store import ENVIRONMENT, configure_mlflow, end_run, open_run

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
LATER = b"Content-Length: 0\r\nRetry-After: 3600\r\n\r\n"
ANSWERS = {
    "429": (b"HTTP/1.1 429 Too Many Requests\r\n" + LATER, None),
    "503": (b"HTTP/1.1 503 Unavailable\r\n" + LATER, None),
    "dripping body": (OK + b"Content-Length: 1000\r\n\r\n", b" "),
    "dripping headers": (OK, b"X: y\r\n"),
    "one header": (OK + b"X: ", b"y"),
    "chunks": (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "silence": (b"", None),
}
LIMIT = 12  # seconds: two attempts of one second, their pause, and a busy machine


def _server(head, part, seen):
    def answer(connection):
        while connection.recv(2**16):
            seen.append(time.monotonic())
            connection.sendall(head)
            for _ in range(300 if part or not head else 0):
                time.sleep(0.1)
                connection.sendall(part or b"")

    return raw_server(answer)


@pytest.fixture(params=ANSWERS.values(), ids=ANSWERS)
def store(request, monkeypatch):
    """The address of a server that keeps everybody waiting; MLflow's settings are ours, with one second."""
    original = rest_utils._get_http_response_with_retries
    for name, value in (ENVIRONMENT | {"MLFLOW_HTTP_REQUEST_TIMEOUT": "1"}).items():
        monkeypatch.setenv(name, value)
    before = mlflow.get_tracking_uri()
    with _server(*request.param, seen := []) as url:
        yield SimpleNamespace(url=url, seen=seen)
    mlflow.set_tracking_uri(before)
    rest_utils._get_http_response_with_retries = original


def test_a_run_is_not_opened_there_and_says_so_in_time(store):
    start = time.monotonic()
    with pytest.raises(
        ValueError, match=r"MLflow at `tracking_uri` http://127.0.0.1:\d+ cannot be used: .*--tracking"
    ):
        open_run(TrackingArguments(tracking_uri=store.url), "run", "ppo", ())
    assert time.monotonic() - start < LIMIT
    assert store.seen


SLOW = pytest.mark.slow(reason="each answer takes seconds, and the start of a run above tries all with the same code")


def _some(*names):
    """Run a test by default with these answers, and with the others if it is asked for."""
    answers = [pytest.param(x, id=name, marks=() if name in names else SLOW) for name, x in ANSWERS.items()]
    return pytest.mark.parametrize("store", answers, indirect=True)


@_some("dripping body")
def test_a_training_goes_on_and_closes_in_time_with_its_records_kept(store, tmp_path):
    configure_mlflow()
    mlflow.set_tracking_uri(store.url)
    start, sender = time.monotonic(), Delivery("0" * 32, store.url, tmp_path, {})
    for step in range(1, 4):
        sender.log_metrics({"loss": 1.0}, step=step)
    assert time.monotonic() - start < 1
    sender.close("FINISHED")
    assert time.monotonic() - start < 2 * LIMIT
    assert len((tmp_path / "mlflow_unsent.jsonl").read_text().splitlines()) == 3


@_some("429", "chunks")
def test_a_pipeline_ends_in_time(store):
    start = time.monotonic()
    end_run(TrackingArguments(tracking_uri=store.url), "0" * 32, "FINISHED", None)
    assert time.monotonic() - start < LIMIT


def test_a_slow_store_that_works_does_not_hold_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(delivery, "CLOSE_SECONDS", 0.3)
    monkeypatch.setattr(mlflow, "end_run", lambda status: None)
    client = SimpleNamespace(log_batch=lambda run_id, metrics: time.sleep(0.2))
    monkeypatch.setattr(mlflow, "MlflowClient", lambda tracking_uri=None: client)
    start, sender = time.monotonic(), Delivery("run", "http://store", tmp_path, {})
    for step in range(1, 101):
        sender.log_metrics({"loss": 1.0}, step=step)
    sender.close("FINISHED")
    assert time.monotonic() - start < 5
    assert 90 < len((tmp_path / "mlflow_unsent.jsonl").read_text().splitlines()) < 100


def test_a_file_has_the_time_that_its_size_needs(tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf_recipes.tracking.deadline.SLOWEST_BYTES", 1e3)
    monkeypatch.setattr("rlhf_recipes.tracking.deadline._request", lambda *_, **__: time.sleep(1) or "sent")
    large = tmp_path / "large"
    large.write_bytes(b"x" * 3000)
    with large.open("rb") as file:
        assert request_in_time("PUT", "http://store", 0, 2, timeout=0.3, stream=True, data=file) == "sent"
    with pytest.raises(requests.Timeout, match=r"no whole answer in 0\.301 s"):
        request_in_time("PUT", "http://store", 0, 2, timeout=0.3, stream=True, data=b"x")


def test_every_way_of_mlflow_to_a_server_passes_through_the_function_that_is_replaced(monkeypatch):
    def refuse(*args, **kwargs):
        raise requests.Timeout("here")

    monkeypatch.setattr(rest_utils, "_get_http_response_with_retries", refuse)
    client = mlflow.MlflowClient("http://127.0.0.1:1")
    for call in (client.search_experiments, lambda: client.get_run("a"), lambda: client.set_tag("a", "b", "c")):
        with pytest.raises(MlflowException, match="here"):
            call()
