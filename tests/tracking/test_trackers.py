"""Other trackers record beside MLflow, by their real packages, offline; trackio by a stand-in."""

import functools
import importlib.util
import inspect
import json
import struct
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pandas as pd
import pytest
import tiny
from transformers import TrainerControl, TrainerState
from transformers.integrations import TensorBoardCallback
from trl.extras import profiling

from rlhf_recipes import PPOTrainer, train
from rlhf_recipes.evaluation.samples import write_evaluation, write_table
from rlhf_recipes.options import trackers as options
from rlhf_recipes.options.changes import options_of_trainer
from rlhf_recipes.options.recipes import PreflightArguments, TrackingArguments
from rlhf_recipes.options.trackers import check_trackers
from rlhf_recipes.tracking.callback import RunCallback
from rlhf_recipes.tracking.description import Description
from rlhf_recipes.tracking.session import track_run
from rlhf_recipes.tracking.trackers import TableCallback, other_trackers
from rlhf_recipes.trainers.shown_options import hide_secrets_from_trackers

needs = {
    name: pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"needs {name}") for name in options.EXTRAS
}
AT_END = ("train_runtime", "train_loss", "total_flos", "train_samples_per_second", "train_steps_per_second")
OF_SUMMARY = {f"train/{name}" for name in AT_END}
"""Figures that transformers sends to a summary alone, or not at all."""
TRAINING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}


def _run(directory, trackers, **changes):
    """Train as a recipe does: the run is opened before the trainer is built."""
    args = tiny.ppo_config(directory, report_to=["mlflow", *trackers], run_name="mine", **(TRAINING | changes))
    with track_run(TrackingArguments(log_model=False), "mine", "ppo", args) as callbacks:
        own = {"report_to": options_of_trainer(args, {}).report_to, "run_name": "mine", **TRAINING, **changes}
        build = functools.partial(PPOTrainer, callbacks=callbacks)
        data = {"eval_data": tiny.prompts(), "eval_strategy": "steps", "eval_steps": 2}
        trainer = tiny.ppo_trainer(directory, trainer_class=build, **data, **own)
        trainer.train(resume_from_checkpoint=changes.get("resume_from_checkpoint"))
    return trainer


def _values(client):
    """Return each figure of the one run in MLflow by step, under the names of transformers for other trackers."""
    (experiment,) = [e for e in client.search_experiments() if e.name == "rlhf_recipes"]
    (run,) = client.search_runs([experiment.experiment_id])
    found = {}
    for name in run.data.metrics:
        own = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
        found[own] = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, name)}
    return run, found


@pytest.mark.tiny
@needs["tensorboard"]
def test_tensorboard_has_the_figures_of_mlflow_also_after_a_resume(client, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _run(tmp_path / "out", ["tensorboard"], max_steps=2)
    _run(tmp_path / "out", ["tensorboard"], resume_from_checkpoint=True)
    run, values = _values(client)
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    assert folder.name == run.info.run_id
    events = EventAccumulator(str(folder)).Reload()
    assert set(events.Tags()["scalars"]) == set(values)
    for name, expected in values.items():
        read = {event.step: event.value for event in events.Scalars(name)}
        assert read == pytest.approx(expected, nan_ok=True), name  # TensorBoard keeps float32


def _history(directory):
    """Return the figures of the runs of wandb below a directory: their files are logs of LevelDB with records."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows, ids = [], set()
    for file in sorted(Path(directory).glob("wandb/offline-run-*/*.wandb")):
        data, place, part = file.read_bytes(), 7, b""
        while place + 7 <= len(data):
            if 2**15 - place % 2**15 < 7:  # the end of a block holds no header
                place += 2**15 - place % 2**15
                continue
            length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
            part += data[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):  # a record is whole
                record, part = Record.FromString(part), b""
                if record.HasField("run"):
                    ids.add(record.run.run_id)
                if record.HasField("history"):
                    items = record.history.item
                    rows.append({i.key or i.nested_key[0]: json.loads(i.value_json) for i in items})
    return rows, ids


@pytest.mark.tiny
@pytest.mark.slow  # wandb starts a service for each run; the callback of the tables is tested below
@needs["wandb"]
def test_wandb_has_the_figures_and_tables_of_mlflow_also_after_a_resume(client, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    _run(tmp_path / "out", ["wandb"], max_steps=2)
    _run(tmp_path / "out", ["wandb"], resume_from_checkpoint=True)
    run, values = _values(client)
    rows, ids = _history(tmp_path)
    assert ids == {run.info.run_id}
    found = {}
    for row in rows:
        for name, value in row.items():
            if name in values:
                found.setdefault(name, {})[row["train/global_step"]] = value
    for name in values.keys() - OF_SUMMARY:
        assert found[name] == pytest.approx(values[name], nan_ok=True), name
    tables = [(row["train/global_step"], name) for row in rows for name in row if name.startswith("samples/")]
    evaluations = [(step, "samples/evaluation") for step in (0, 2, 4)]
    assert sorted(tables) == sorted([*evaluations, *((step, "samples/training") for step in (1, 2, 3, 4))])
    files = list(tmp_path.glob("wandb/offline-run-*/files/media/table/samples/evaluation*.json"))
    assert len(files) == len(evaluations)
    table = json.loads(files[0].read_text())
    assert {"prompt", "completion", "score", "kl", "length", "stop"} <= {*table["columns"]}
    assert len(table["data"]) == len(tiny.PROMPTS)


class Trackio(ModuleType):
    """Stand in for trackio 0.43, which needs an older pillow than other packages: its calls, and what they refuse."""

    __version__ = "0.43.0"

    def __init__(self):
        super().__init__("trackio")
        self.__spec__ = ModuleSpec("trackio", None)  # transformers and TRL look for it
        nothing = SimpleNamespace(get=lambda: None)
        self.context_vars = SimpleNamespace(current_space_id=nothing, current_run=nothing)
        self.config = Options()
        self.runs, self.logged, self.is_open = [], [], False

    def init(self, project, name=None, space_id=None, bucket_id=None, resume="never", private=None):
        self.runs.append((project, name, resume))
        self.is_open = True

    def log(self, metrics, step=None):
        assert self.is_open, "Call trackio.init() before trackio.log()."
        if "train/global_step" in metrics:  # else durations of TRL's methods
            self.logged.append(dict(metrics))

    def finish(self):
        assert self.is_open, "Call trackio.init() before trackio.finish()."
        self.is_open = False

    class Table:
        def __init__(self, columns=None, data=None, dataframe=None):
            self.data = dataframe.to_dict(orient="records")


class Options(dict):
    def update(self, values, allow_val_change=False):
        super().update(values)


@needs["trackio"]
@pytest.mark.parametrize("name", ["init", "log", "finish", "Table"])
def test_trackio_takes_what_its_stand_in_takes(name):
    trackio = importlib.import_module("trackio")
    own, others = (inspect.signature(getattr(each, name)).parameters for each in (Trackio(), trackio))
    assert own.keys() <= others.keys()


@pytest.mark.tiny
def test_trackio_has_the_figures_and_tables_of_mlflow_also_after_a_resume(client, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", trackio := Trackio())
    monkeypatch.setattr(profiling, "trackio", trackio, raising=False)  # TRL has imported it, if it was there
    check_trackers(["mlflow", "trackio"])
    _run(tmp_path / "out", ["trackio"], max_steps=2)
    _run(tmp_path / "out", ["trackio"], resume_from_checkpoint=True)
    assert trackio.runs == [("huggingface", "mine", "allow")] * 2, "the second one continues the first"
    assert not trackio.is_open
    _, values = _values(client)
    found, tables = {}, []
    for row in trackio.logged:
        step = row.pop("train/global_step")
        for name, value in row.items():
            if isinstance(value, Trackio.Table):
                tables.append((step, name, len(value.data)))
            else:
                found.setdefault(name, {})[step] = value
    assert found.keys() == values.keys() - OF_SUMMARY
    for name in found:
        assert found[name] == pytest.approx(values[name], nan_ok=True), name
    evaluations = [(step, "samples/evaluation", len(tiny.PROMPTS)) for step in (0, 2, 4)]
    assert [table for table in sorted(tables) if table[1] == "samples/evaluation"] == evaluations
    assert {step for step, name, _ in tables if name == "samples/training"} == {1, 2, 3, 4}


@needs["tensorboard"]
def test_other_trackers_get_the_options_without_secrets(tmp_path):
    texts = []
    writer = SimpleNamespace(add_text=lambda name, text: texts.append(text), close=lambda: None)
    own = {"proxy": "http://me:sesame@host", "token": "sesame", "revision": "main"}
    args = tiny.ppo_config(tmp_path, report_to=["tensorboard"], model_init_kwargs=own)
    callbacks = [TensorBoardCallback(writer)]
    hide_secrets_from_trackers(SimpleNamespace(args=args, callback_handler=SimpleNamespace(callbacks=callbacks)))
    callbacks[0].on_train_begin(args, TrainerState(), TrainerControl())
    (options,) = map(json.loads, texts)
    assert options["model_init_kwargs"] == {"proxy": "http://***@host", "revision": "main"}
    assert args.model_init_kwargs == own


def test_mlflow_keeps_the_latest_table_of_a_run_that_is_continued(tmp_path):
    """The run goes on between two evaluations."""
    write_evaluation([{"prompt": "p", "completion": "c"}], tmp_path, 2)
    tags = {}
    delivery = SimpleNamespace(
        log_metrics=lambda *args, **kwargs: None, log_missing_artifacts=lambda *args: None, set_tags=tags.update,
    )  # fmt: skip
    run = {"run_id": "1"}
    callback = RunCallback(delivery, str(tmp_path), run, Description("ppo"), is_continued=True)
    callback.on_train_begin(None, TrainerState(global_step=3), TrainerControl(), model=None)
    shown = [entry["path"] for entry in json.loads(tags["mlflow.loggedArtifacts"])]
    assert shown == ["samples/evaluation.json", "samples/evaluation-000002.json"]


class Tracker:
    """Keep what wandb and trackio would get."""

    def __init__(self):
        self.logged = []

    def Table(self, dataframe):  # noqa: N802 (the name in both packages)
        return dataframe

    def log(self, values):
        self.logged.append(values)


def test_each_table_is_sent_once_at_its_step(tmp_path):
    tracker, rows = Tracker(), [{"prompt": "p", "completion": "007", "asked_at": "2024", "score": 0.5}]
    callback, state = TableCallback([tracker], str(tmp_path)), TrainerState(global_step=4)
    for kind in ("training", "evaluation"):
        write_table(rows, tmp_path, kind, 4)
    write_table(rows, tmp_path, "training", 2)
    for _ in range(2):
        callback.on_log(None, state, TrainerControl())
    assert [[*values] for values in tracker.logged] == [
        ["samples/evaluation", "train/global_step"], ["samples/training", "train/global_step"],
    ]  # fmt: skip
    assert [values["train/global_step"] for values in tracker.logged] == [4, 4]
    assert tracker.logged[0]["samples/evaluation"].equals(pd.DataFrame(rows))
    callback.on_log(None, TrainerState(global_step=2, is_world_process_zero=False), TrainerControl())
    assert len(tracker.logged) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "wandb",
            r"`report_to` names wandb, which is not installed. Install it: `pip install 'rlhf-recipes\[wandb\]'`",
        ),
        ("comet_ml", r"`report_to` names comet_ml, which is not installed. Install it, or leave it out"),
        ("wanbd", r"`report_to` names wanbd, which is no tracker. The trackers are .*mlflow.*wandb"),
    ],
)
def test_a_tracker_that_is_not_there_is_said_before_anything_is_loaded(monkeypatch, name, message):
    monkeypatch.setattr(options, "get_available_reporting_integrations", lambda: ["mlflow", "tensorboard"])
    with pytest.raises(ValueError, match=message):
        check_trackers(["mlflow", "tensorboard", name])
    check_trackers(["mlflow", "tensorboard"])


@needs["wandb"]
@pytest.mark.parametrize(("error", "code"), [(SystemExit(0), 0), (RuntimeError("broken"), 1)])
def test_a_run_of_wandb_ends_as_the_run_of_mlflow_does(tmp_path, monkeypatch, error, code):
    import wandb

    codes = []
    run = SimpleNamespace(finish=lambda exit_code: codes.append(exit_code))
    monkeypatch.setattr(wandb, "init", lambda **options: run)
    with pytest.raises(type(error)), other_trackers(["wandb"], "mine", str(tmp_path), "id"):
        raise error
    assert codes == [code]


@needs["wandb"]
def test_a_preflight_alone_opens_no_run_of_another_tracker(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setattr(wandb, "init", lambda **options: pytest.fail("a run was opened"))
    trainer = tiny.ppo_trainer(tmp_path, report_to=["wandb"])
    with pytest.raises(SystemExit):
        train(trainer, checks=PreflightArguments(preflight_only=True))


@needs["wandb"]
def test_a_wandb_that_cannot_start_is_said_on_one_line(tmp_path, monkeypatch):
    import wandb

    def refuse(**options):
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login`")

    monkeypatch.setattr(wandb, "init", refuse)
    message = (
        r"^`report_to` names wandb, which cannot start a run: No API key configured\. Log in .*WANDB_MODE=offline`.*$"
    )
    with pytest.raises(ValueError, match=message), other_trackers(["wandb"], "mine", str(tmp_path), "id"):
        pass
