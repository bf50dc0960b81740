"""Records reach the store once and in order. A record that the store refuses is kept."""

import json
import os
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST

from rlhf_recipes.durability.termination import TerminatedError, terminate
from rlhf_recipes.tracking import delivery
from rlhf_recipes.tracking.delivery import Delivery, send_unsent


class Store:
    """Act as an `MlflowClient` that remembers its calls, or fails."""

    error: Exception | None = None

    def __init__(self):
        self.metrics, self.files, self.calls = [], [], 0

    def __call__(self, tracking_uri=None):
        return self

    def log_artifact(self, run_id, path, folder):
        Path(path).stat()  # as the real one, it fails without the file
        self.files.append(path)

    def list_artifacts(self, run_id, folder):
        return [SimpleNamespace(path=f"{folder}/{Path(path).name}") for path in self.files]

    def log_batch(self, run_id, metrics):
        self.calls += 1
        if self.error is not None:
            raise self.error
        self.metrics += [(metric.key, metric.step, metric.value) for metric in metrics]

    def get_metric_history(self, run_id, name):
        return [mlflow.entities.Metric(key, value, 0, step) for key, step, value in self.metrics if key == name]


@pytest.fixture
def store(monkeypatch):
    store = Store()
    monkeypatch.setattr(mlflow, "MlflowClient", store)
    monkeypatch.setattr(mlflow, "end_run", lambda status: None)
    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: "http://store")
    return store


def _open(tmp_path, **last_steps):
    return Delivery("run", "http://store", tmp_path, last_steps)


def _kept(tmp_path):
    return [json.loads(line) for line in (tmp_path / "mlflow_unsent.jsonl").read_text().splitlines()]


def test_a_step_has_one_value(tmp_path, store):
    sender = _open(tmp_path, loss=2)
    for step in (1, 2, 3):
        sender.log_metrics({"loss": 10.0 * step, "new": 1.0 * step}, step=step)
    sender.log_metrics({"loss": 30.0, "best": 7.0})  # the result of a recipe: logged by the callback, but for `best`
    sender.close("FINISHED")
    assert store.metrics == [("new", 1, 1.0), ("new", 2, 2.0), ("loss", 3, 30.0), ("new", 3, 3.0), ("best", 3, 7.0)]


def test_a_run_that_goes_back_keeps_the_first_value_of_a_step(tmp_path, store):
    sender = _open(tmp_path)
    for step, value in ((1, 1.0), (2, 2.0), (3, 3.0), (2, -2.0), (3, -3.0), (4, 4.0)):
        sender.log_metrics({"loss": value}, step=step)
    sender.close("FINISHED")
    assert store.metrics == [("loss", step, float(step)) for step in (1, 2, 3, 4)]


def test_a_store_that_does_not_answer_is_asked_once_in_a_while(tmp_path, store, caplog):
    store.error = MlflowException("no answer")
    sender = _open(tmp_path)
    for step in range(5):
        sender.log_metrics({"loss": 1.0 * step}, step=step)
    sender.close("FINISHED")
    assert store.calls == 2, "the first record, and an attempt at all of them at the end"
    assert [record["step"] for record in _kept(tmp_path)] == [0, 1, 2, 3, 4]
    (line,) = caplog.messages
    assert "5 records" in line
    assert f"-m rlhf_recipes.tracking.delivery {tmp_path}/mlflow_unsent.jsonl" in line


def test_a_store_that_comes_back_is_used_again(tmp_path, store, monkeypatch, caplog):
    monkeypatch.setattr(delivery, "PAUSE_SECONDS", 0.0)
    sender = _open(tmp_path)
    store.error = ConnectionError()
    sender.log_metrics({"loss": 0.0}, step=0)
    sender._worker.submit(setattr, store, "error", None)
    sender.log_metrics({"loss": 1.0}, step=1)
    sender.close("FINISHED")
    assert store.metrics == [("loss", 1, 1.0), ("loss", 0, 0.0)]
    assert not (tmp_path / "mlflow_unsent.jsonl").exists()
    assert not caplog.messages


def test_a_refused_record_does_not_hold_up_the_others(tmp_path, store):
    sender = _open(tmp_path)
    store.error = MlflowException.invalid_parameter_value("a bad name")
    sender.log_metrics({"bad": 0.0}, step=0)
    sender._worker.submit(setattr, store, "error", None)
    sender.log_metrics({"loss": 1.0}, step=1)
    sender._worker.shutdown(wait=True)
    assert store.metrics == [("loss", 1, 1.0)]
    assert [record["metrics"] for record in _kept(tmp_path)] == [{"bad": 0.0}]


def test_what_has_arrived_after_all_is_not_sent_twice(tmp_path, store):
    record = {"run_id": "run", "tracking_uri": "http://store", "timestamp": 5}
    values = ((1, 1.0), (2, 2.0), (2, 99.0))
    lines = [record | {"metrics": {"loss": value}, "step": step} for step, value in values]
    path = tmp_path / "mlflow_unsent.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    store.metrics = [("loss", 1, 1.0)]
    assert send_unsent(path) == 3
    assert store.metrics == [("loss", 1, 1.0), ("loss", 2, 2.0)]
    assert not path.exists()
    assert send_unsent(path) == 0


def test_what_cannot_be_sent_later_stays(tmp_path, store):
    path = tmp_path / "mlflow_unsent.jsonl"
    path.write_text(json.dumps({"run_id": "run", "tracking_uri": "x", "timestamp": 5, "metrics": {"a": 1}, "step": 1}))
    store.error = MlflowException("no answer")
    with pytest.raises(MlflowException):
        send_unsent(path)
    assert path.exists()


@pytest.mark.parametrize("kind", ["artifact", "missing"])
def test_a_file_that_is_gone_holds_up_nothing(tmp_path, store, caplog, kind):
    """Somebody has tidied up before the records could be sent."""
    record = {"run_id": "run", "tracking_uri": "http://store", "timestamp": 5, "folder": "samples"}
    gone, there = tmp_path / "gone.json", tmp_path / "there.json"
    there.touch()
    files = [{kind: str(gone)}, {kind: str(there)}] if kind == "artifact" else [{kind: [str(gone), str(there)]}]
    lines = [record | file for file in files] + [record | {"metrics": {"loss": 1.0}, "step": 1}]
    path = tmp_path / "mlflow_unsent.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert send_unsent(path) == len(lines)
    assert (store.files, store.metrics) == ([str(there)], [("loss", 1, 1.0)])
    assert not path.exists()
    assert [f"{gone} is gone: the run run is recorded without it." in message for message in caplog.messages] == [True]


def test_a_file_that_is_gone_stops_no_later_record(tmp_path, store):
    sender = _open(tmp_path)
    sender.log_artifact(tmp_path / "gone.json")
    sender.log_metrics({"loss": 1.0}, step=1)
    sender.close("FINISHED")
    assert store.metrics == [("loss", 1, 1.0)]
    assert not (tmp_path / "mlflow_unsent.jsonl").exists()


def test_files_that_the_run_has_are_not_sent_again(tmp_path, store):
    for name in ("a.json", "b.json"):
        (tmp_path / name).touch()
    store.files.append("a.json")
    sender = _open(tmp_path)
    sender.log_missing_artifacts([tmp_path / "a.json", tmp_path / "b.json"], "samples")
    sender.close("FINISHED")
    assert store.files == ["a.json", str(tmp_path / "b.json")]


@pytest.mark.parametrize("rest", ['{"run_id": "ru', "{", "\x00\x00"])
def test_a_record_that_a_killed_process_has_cut_is_left_out(tmp_path, store, caplog, rest):
    record = {"run_id": "run", "tracking_uri": "http://store", "timestamp": 5, "metrics": {"loss": 1.0}, "step": 1}
    path = tmp_path / "mlflow_unsent.jsonl"
    path.write_text(f"{json.dumps(record)}\n{rest}")
    assert send_unsent(path) == 1
    assert store.metrics == [("loss", 1, 1.0)]
    assert f"{path}, line 2: the record is not whole" in caplog.text


def test_a_run_that_was_deleted_holds_up_no_other(tmp_path, store, monkeypatch, caplog):
    record = {"tracking_uri": "http://store", "timestamp": 5, "metrics": {"loss": 1.0}, "step": 1}
    path = tmp_path / "mlflow_unsent.jsonl"
    path.write_text("".join(json.dumps(record | {"run_id": name}) + "\n" for name in ("gone", "run")))
    read = store.get_metric_history

    def history(run_id, name):
        if run_id == "gone":
            raise MlflowException("no such run", RESOURCE_DOES_NOT_EXIST)
        return read(run_id, name)

    monkeypatch.setattr(store, "get_metric_history", history)
    assert send_unsent(path) == 1
    assert store.metrics == [("loss", 1, 1.0)]
    assert [kept["run_id"] for kept in _kept(tmp_path)] == ["gone"]
    assert f"The store does not have the run gone: its 1 records stay in {path}." in caplog.text


def test_two_judges_with_names_that_mlflow_refuses(tmp_path, store):
    sender = _open(tmp_path)
    for step in (1, 2):
        sender.log_metrics(
            {"rm (1)/gain": 1.0 * step, "rm [1]/gain": -1.0 * step, "loss": 5.0, "none": None}, step=step
        )
    sender.close("FINISHED")
    names = sorted({name for name, *_ in store.metrics})
    assert names[:2] == ["loss", "rm _1_/gain"]
    assert len(names) == 3
    assert sorted(value for name, _, value in store.metrics if name != "loss") == [-2.0, -1.0, 1.0, 2.0]


def test_records_of_an_earlier_version_with_such_names_are_sent(tmp_path, store):
    record = {"run_id": "run", "tracking_uri": "http://store", "timestamp": 5, "step": 1}
    path = tmp_path / "mlflow_unsent.jsonl"
    lines = [record | {"metrics": {"a(b": 1.0}}, record | {"metrics": {"a)b": 2.0}}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert send_unsent(path) == 2
    assert sorted(value for *_, value in store.metrics) == [1.0, 2.0]
    assert len({name for name, *_ in store.metrics}) == 2


def test_a_signal_while_the_run_ends(tmp_path, store, monkeypatch):
    """The run does not wait for a slow store. It is KILLED, and what is not sent yet is kept."""
    ended, slow = [], threading.Event()
    monkeypatch.setattr(mlflow, "end_run", ended.append)
    monkeypatch.setattr(store, "log_batch", lambda run_id, metrics: slow.wait(30))
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        sender = _open(tmp_path)
        for step in (1, 2, 3):
            sender.log_metrics({"loss": 1.0}, step=step)
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(TerminatedError):
            sender.close("FINISHED")
    finally:
        signal.signal(signal.SIGTERM, before)
        slow.set()
    sender._worker.shutdown(wait=True)
    assert ended == ["KILLED"]
    assert [record["step"] for record in _kept(tmp_path)] == [2, 3]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_after_the_last_record_comes_too_late(tmp_path, store, monkeypatch, number):
    """The worker has only to be shut down: a signal there must not leave the run open."""
    ended = []
    monkeypatch.setattr(mlflow, "end_run", ended.append)
    sender = _open(tmp_path)
    shutdown = sender._worker.shutdown
    monkeypatch.setattr(
        sender._worker, "shutdown", lambda **options: (os.kill(os.getpid(), number), shutdown(**options))
    )
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        with pytest.raises(TerminatedError if number == signal.SIGTERM else KeyboardInterrupt):
            sender.close("FINISHED")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended == ["FINISHED"]
