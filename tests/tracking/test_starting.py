"""The variables of MLflow decide where a run is recorded, and no run stays RUNNING, whatever is raised."""

import errno
import json
import os
import signal
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pytest
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from rlhf_recipes.durability.termination import TerminatedError
from rlhf_recipes.options.recipes import TrackingArguments
from rlhf_recipes.tracking import delivery, session, starting, store
from rlhf_recipes.tracking.lineage import write_run_file
from rlhf_recipes.tracking.pipeline import track_pipeline
from rlhf_recipes.tracking.session import log_results, track_run


@dataclass
class Config:
    """The options of a training, as far as a run in MLflow needs them."""

    output_dir: str
    seed: int = 0
    resume_from_checkpoint: str | None = None


def _runs(client):
    """Return all runs, the oldest first."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return sorted(client.search_runs(experiments), key=lambda run: run.info.start_time)


def _given(client, monkeypatch):
    """Create the run of `mlflow run`, and name it in the environment."""
    run_id = client.create_run(client.create_experiment("project")).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    return run_id


def _stage(stage, values, **options):
    tracking = TrackingArguments(**options.pop("tracking", {}))
    with track_run(tracking, stage, stage, Config(f"out/{stage}", **options)) as callbacks:
        for step, value in enumerate(values, start=1):
            callbacks[0].delivery.log_metrics({"loss": value}, step=step)


def _losses(client, run_id):
    return [metric.value for metric in client.get_metric_history(run_id, "loss")]


def test_stages_that_share_a_run_lose_nothing(client, monkeypatch, caplog):
    """The first takes the run. Every further one is a run under it, also of the same stage."""
    given = _given(client, monkeypatch)
    for stage, value in (("sft", 1.0), ("reward_modeling", 2.0), ("sft", 3.0)):
        _stage(stage, [value, value])
    first, *others = _runs(client)
    assert first.info.run_id == given
    assert _losses(client, given) == [1.0, 1.0]
    assert first.data.tags["stage"] == "sft"
    assert sorted(map(tuple, (_losses(client, run.info.run_id) for run in others))) == [(2.0, 2.0), (3.0, 3.0)]
    assert {run.data.tags["mlflow.parentRunId"] for run in others} == {given}
    assert {run.info.experiment_id for run in others} == {first.info.experiment_id}
    assert {run.info.status for run in (first, *others)} == {"FINISHED"}
    assert len([m for m in caplog.messages if f"`MLFLOW_RUN_ID` {given} has the records of another" in m]) == 2
    assert os.environ["MLFLOW_RUN_ID"] == given


def test_a_run_with_figures_of_somebody_else_gets_a_run_under_it(client, monkeypatch):
    given = _given(client, monkeypatch)
    client.log_batch(given, metrics=[Metric("loss", 9.0, 0, step) for step in (1, 2, 3)])
    _stage("sft", [1.0, 2.0])
    assert _losses(client, given) == [9.0] * 3
    assert _losses(client, _runs(client)[-1].info.run_id) == [1.0, 2.0]


@pytest.mark.parametrize("nested", [False, True])
def test_a_resume_continues_its_own_part(client, monkeypatch, nested, tmp_path):
    given = _given(client, monkeypatch)
    if nested:
        _stage("reward_modeling", [5.0])
    _stage("sft", [1.0, 2.0])
    checkpoint = tmp_path / "out" / "sft" / "checkpoint-2"
    checkpoint.mkdir()
    monkeypatch.setattr("rlhf_recipes.tracking.starting.wished_checkpoint", lambda wish, directory: wish)
    _stage("sft", [1.0, 2.0, 3.0], resume_from_checkpoint=str(checkpoint))
    runs = _runs(client)
    assert len(runs) == 1 + nested
    assert _losses(client, runs[-1].info.run_id) == [1.0, 2.0, 3.0]
    assert (runs[-1].info.run_id == given) is not nested


def test_a_resume_without_a_note_continues_the_run_that_is_named(client, monkeypatch, tmp_path):
    given = _given(client, monkeypatch)
    _stage("sft", [1.0])
    (tmp_path / "out" / "sft" / "mlflow_run.json").unlink()
    monkeypatch.setattr("rlhf_recipes.tracking.starting.wished_checkpoint", lambda wish, directory: wish)
    _stage("sft", [1.0, 2.0], resume_from_checkpoint=str(tmp_path))
    assert [run.info.run_id for run in _runs(client)] == [given]
    assert _losses(client, given) == [1.0, 2.0]


def test_a_pipeline_takes_the_run_and_its_stages_are_under_it(client, monkeypatch, caplog):
    given = _given(client, monkeypatch)
    with track_pipeline(TrackingArguments(), "all", seed=3) as (_, parent):
        assert parent == given
        _stage("sft", [1.0], tracking={"parent_run_id": parent})
    pipeline, stage = _runs(client)
    assert (pipeline.info.run_id, pipeline.data.tags["stage"]) == (given, "pipeline")
    assert stage.data.tags["mlflow.parentRunId"] == given
    assert (pipeline.info.status, stage.info.status) == ("FINISHED", "FINISHED")
    assert not caplog.messages


@pytest.mark.parametrize(
    ("option", "name", "by_id", "expected"),
    [
        (None, None, False, "rlhf_recipes"),
        (None, None, True, "by id"),
        (None, "by name", True, "by name"),
        ("by option", "by name", True, "by option"),
    ],
)
def test_the_experiment(client, monkeypatch, option, name, by_id, expected):
    if by_id:
        monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", client.create_experiment("by id"))
    if name:
        monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", name)
    before = os.environ.get("MLFLOW_EXPERIMENT_ID")
    for _ in range(2):  # MLflow sets the variable: a second run must not take it for the user's
        _stage("sft", [1.0], tracking={"experiment_name": option})
    for run in _runs(client):
        assert client.get_experiment(run.info.experiment_id).name == expected
    assert os.environ.get("MLFLOW_EXPERIMENT_ID") == before


def test_tags(client, monkeypatch):
    monkeypatch.setenv("MLFLOW_TAGS", '{"team": "red", "size (GB)": 3, "stage": "mine"}')
    _stage("sft", [1.0])
    tags = _runs(client)[0].data.tags
    assert (tags["team"], tags["size _GB_"]) == ("red", "3")
    assert tags["stage"] == "sft", "by which the comparison finds its runs"


@pytest.mark.parametrize("text", ["team=red", "[1]", "3", '{"team": '])
def test_tags_that_cannot_be_read_are_refused_before_the_run(client, monkeypatch, text):
    monkeypatch.setenv("MLFLOW_TAGS", text)
    with pytest.raises(ValueError, match=r"^`MLFLOW_TAGS` is .*no JSON object"):
        _stage("sft", [1.0])
    assert not _runs(client)


@pytest.mark.parametrize("value", ["TRUE", "true", "1"])
def test_the_switch_of_transformers(client, monkeypatch, value):
    monkeypatch.setenv("DISABLE_MLFLOW_INTEGRATION", value)
    with track_run(TrackingArguments(), "sft", "sft", Config("out")) as callbacks:
        assert callbacks == []
        log_results({"loss": 1.0})
    with track_pipeline(TrackingArguments(), "all", seed=3) as options:
        assert options == []
    assert not _runs(client)


def _raise(error):
    raise error


def _interrupt(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _bad_metrics(*args, **kwargs):
    yield
    raise RuntimeError("a thread of the metrics")


PLACES = {
    "the trainer's own error": (None, ValueError("no"), "FAILED"),
    "an exit with an error": (None, SystemExit(3), "FAILED"),
    "an exit": (None, SystemExit(0), "FINISHED"),
    "Ctrl-C": (None, KeyboardInterrupt(), "KILLED"),
    "a signal": (None, _interrupt, "KILLED"),
    "the callback": ((session.RunCallback, "__init__"), RuntimeError("MLflowCallback requires mlflow"), "FAILED"),
    "the delivery": ((session, "Delivery"), OSError("no directory"), "FAILED"),
    "the options": ((store, "_record_options"), RuntimeError("no"), "FAILED"),
    "the inputs": ((store, "_record_inputs"), KeyboardInterrupt(), "KILLED"),
    "an exit while opening": ((store, "_record_options"), SystemExit(2), "FAILED"),
    "a signal while opening": ((store, "_record_options"), _interrupt, "KILLED"),
    "the origin": ((store, "environment_tags"), _interrupt, "KILLED"),
    "the note": ((session.RunCallback, "note"), OSError("disk full"), "FAILED"),
    "a signal at the note": ((session.RunCallback, "note"), _interrupt, "KILLED"),
    "the data": ((session, "dataset_digest"), TypeError("not hashable"), "FAILED"),
}


@pytest.mark.parametrize("place", PLACES)
def test_no_run_stays_running(client, monkeypatch, place):
    where, what, status = PLACES[place]
    action = what if callable(what) and not isinstance(what, BaseException) else lambda *args, **kwargs: _raise(what)
    if where is not None:
        monkeypatch.setattr(*where, action)
    expected = BaseException if where is None or "signal" not in place else TerminatedError
    with _handlers_kept(), pytest.raises(expected):
        _run_to(place, action if where is None else None)
    (run,) = _runs(client)
    assert run.info.status == status
    assert mlflow.active_run() is None


def _run_to(place, action):
    with track_run(TrackingArguments(), "sft", "sft", Config("out")):
        if place == "the data":
            session.log_datasets("data", training=object())
        elif action is not None:
            action()


@contextmanager
def _handlers_kept():
    """Restore the handlers of signals: after one, a run that ends ignores the others."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_an_error_when_the_metrics_of_the_machine_end(client, monkeypatch):
    monkeypatch.setattr(session, "system_metrics", _bad_metrics)
    with pytest.raises(RuntimeError), track_run(TrackingArguments(), "sft", "sft", Config("out")):
        pass
    assert _runs(client)[0].info.status == "FAILED"


def test_a_signal_while_the_last_records_are_sent(client, monkeypatch):
    """The body has ended without an error, but the run was stopped before its records were."""
    slow = threading.Event()
    timer = threading.Timer(0.3, _interrupt)
    monkeypatch.setattr(delivery, "_apply", lambda *record: (timer.start(), slow.wait(30)))
    with _handlers_kept(), pytest.raises(TerminatedError):
        _stage("sft", [1.0])
    slow.set()
    assert _runs(client)[0].info.status == "KILLED"


def test_a_signal_while_the_run_is_being_ended_comes_too_late(client, monkeypatch):
    end = mlflow.end_run
    monkeypatch.setattr(mlflow, "end_run", lambda status: (_interrupt(), end(status)))
    with _handlers_kept():
        _stage("sft", [1.0])
    assert _runs(client)[0].info.status == "FINISHED"


def test_a_run_of_the_users_own_is_left_alone(client, monkeypatch):
    mlflow.set_tracking_uri(client.tracking_uri)
    own = mlflow.start_run()
    with (
        pytest.raises(ValueError, match="already active"),
        track_run(TrackingArguments(), "sft", "sft", Config("out")),
    ):
        pass
    assert mlflow.active_run().info.run_id == own.info.run_id
    mlflow.end_run()


def test_a_note_of_another_run_does_not_take_the_given_one(client, monkeypatch, tmp_path):
    """The run of the environment is new, and that of the checkpoint is elsewhere: the new one records."""
    _stage("sft", [1.0, 2.0])
    given = _given(client, monkeypatch)
    write_run_file(tmp_path / "out" / "sft", {"run_id": _runs(client)[0].info.run_id})
    monkeypatch.setattr("rlhf_recipes.tracking.starting.wished_checkpoint", lambda wish, directory: wish)
    _stage("sft", [1.0, 2.0, 3.0], resume_from_checkpoint=str(tmp_path / "out" / "sft"))
    assert _losses(client, given) == [1.0, 2.0, 3.0]


def _deleted_run(client):
    run_id = client.create_run(client.create_experiment("other")).info.run_id
    client.delete_run(run_id)
    return run_id


def _deleted_experiment(client, *, by_name=False):
    experiment_id = client.create_experiment("old")
    client.delete_experiment(experiment_id)
    return "old" if by_name else experiment_id


UNKNOWN = {
    "a run": ("MLFLOW_RUN_ID", lambda client: "0" * 32),
    "a deleted run": ("MLFLOW_RUN_ID", _deleted_run),
    "no id": ("MLFLOW_RUN_ID", lambda client: "my run"),
    "an experiment": ("MLFLOW_EXPERIMENT_ID", lambda client: "4711"),
    "a deleted experiment": ("MLFLOW_EXPERIMENT_ID", _deleted_experiment),
    "a deleted name": ("MLFLOW_EXPERIMENT_NAME", lambda client: _deleted_experiment(client, by_name=True)),
    "an option": ("experiment_name", lambda client: _deleted_experiment(client, by_name=True)),
    "a parent": ("parent_run_id", lambda client: "0" * 32),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_a_name_that_the_store_does_not_have_is_refused_by_its_option(client, monkeypatch, case):
    """To start the server, as for a store that does not answer, would not help."""
    option, make = UNKNOWN[case]
    value, tracking = make(client), {}
    if option.isupper():
        monkeypatch.setenv(option, value)
    else:
        tracking = {option: value}
    with pytest.raises(
        ValueError, match=f"^`{option}` is {value}, which MLflow at sqlite:.* refuses: .*or leave it out"
    ):
        _stage("sft", [1.0], tracking=tracking)
    assert not _runs(client)


def test_a_resume_of_a_run_that_was_deleted_begins_a_new_one(client, monkeypatch, tmp_path, caplog):
    _stage("sft", [1.0])
    client.delete_run(_runs(client)[0].info.run_id)
    monkeypatch.setattr("rlhf_recipes.tracking.starting.wished_checkpoint", lambda wish, directory: wish)
    _stage("sft", [1.0, 2.0], resume_from_checkpoint=str(tmp_path / "out" / "sft"))
    (run,) = _runs(client)
    assert _losses(client, run.info.run_id) == [1.0, 2.0]
    assert "is not in this store: a new run begins" in caplog.text


def test_an_output_directory_that_cannot_be_written_is_named(client, tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(ValueError, match="^`output_dir` out/sft cannot be written"):
        _stage("sft", [1.0])
    assert not _runs(client)


def test_an_open_run_of_another_store_stays(client, tmp_path, caplog):
    folder = tmp_path / "out" / "sft"
    folder.mkdir(parents=True)
    (folder / "_mlflow_open.json").write_text('{"run_id": "a", "tracking_uri": "http://other"}')
    _stage("sft", [1.0])
    assert "It stays RUNNING in its store, http://other" in caplog.text
    assert not (folder / "_mlflow_open.json").exists()


def test_a_pipeline_that_was_killed_is_closed_by_the_next(client, tmp_path):
    run_id = client.create_run(client.create_experiment("project")).info.run_id
    (tmp_path / "_mlflow_open.json").write_text(json.dumps({"run_id": run_id, "tracking_uri": client.tracking_uri}))
    with track_pipeline(TrackingArguments(), "all", seed=3, output_dir=str(tmp_path)) as (_, parent):
        note = json.loads((tmp_path / "_mlflow_open.json").read_text())
        assert note["run_id"] == parent
        assert client.get_run(run_id).info.status == "KILLED"
    assert client.get_run(parent).info.status == "FINISHED"
    assert not (tmp_path / "_mlflow_open.json").exists()


def _left_with_unsent_end(client, tmp_path):
    """Write what a run leaves whose store did not answer at its end. Return its id."""
    folder = tmp_path / "out" / "sft"
    folder.mkdir(parents=True)
    run_id = client.create_run(client.create_experiment("project")).info.run_id
    origin = {"run_id": run_id, "tracking_uri": client.tracking_uri, "timestamp": 1}
    (folder / "_mlflow_open.json").write_text(json.dumps(origin))
    records = [origin | {"metrics": {"loss": 1.0}, "step": 1}, origin | {"status": "FINISHED"}]
    (folder / "mlflow_unsent.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return run_id


def test_a_start_first_sends_the_end_that_the_store_did_not_take(client, tmp_path, caplog):
    """Else a run that FINISHED would be closed as KILLED."""
    run_id = _left_with_unsent_end(client, tmp_path)
    _stage("sft", [2.0])
    assert client.get_run(run_id).info.status == "FINISHED"
    assert _losses(client, run_id) == [1.0]
    assert not list((tmp_path / "out" / "sft").glob("_mlflow_open.json"))
    assert not caplog.messages


def test_a_record_that_the_store_refuses_stops_no_start(client, tmp_path, caplog, monkeypatch):
    def refuse(*args):
        raise MlflowException.invalid_parameter_value("a bad name")

    _left_with_unsent_end(client, tmp_path)
    monkeypatch.setattr(starting, "send_unsent", refuse)
    _stage("sft", [2.0])
    assert "mlflow_unsent.jsonl, so none of them is sent: a bad name" in caplog.text


def test_a_note_that_cannot_be_removed_does_not_fail_the_end(client, tmp_path, monkeypatch):
    """Its directory has become read-only or stale: the run has ended, and the next start sees it."""

    def stale(*args, **kwargs):
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", stale)
        _stage("sft", [1.0])
    (run,) = _runs(client)
    assert run.info.status == "FINISHED"
    _stage("sft", [1.0])
    assert [run.info.status for run in _runs(client)] == ["FINISHED", "FINISHED"]
