"""A run is recorded in MLflow from start to end, in real processes, with real stores and signals."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import tiny
import yaml
from processes import free_port, mlflow_server, run_script, start_script, wait_for

pytestmark = pytest.mark.recipe

RECIPES = Path(__file__).parents[2] / "recipes"
TOKEN = "hf_abcdefghijklmnopqrstuvwx"
PASSWORD = "correct-horse"
REWARDS = """
import time
from pathlib import Path

def length(completions, **kwargs):
    return [float(len(c)) for c in completions]

def longer(prompts, completions_a, completions_b, **kwargs):
    return [float(len(a) > len(b)) for a, b in zip(completions_a, completions_b)]

def crash(**kwargs):
    raise RuntimeError("the reward function has a bug")

def slow(completions, **kwargs):
    Path("sampling").touch()
    time.sleep(0.5)
    return length(completions)

def endless(**kwargs):
    Path("sampling").touch()
    time.sleep(600)
"""
# A run of the library without a trainer: fast, where only the store matters.
SCRIPT = """
import sys
from dataclasses import dataclass
from rlhf_recipes.options.recipes import TrackingArguments
from rlhf_recipes.tracking.pipeline import track_pipeline
from rlhf_recipes.tracking.session import log_results, track_run

@dataclass
class Config:
    output_dir: str
    seed: int = 0

"""
SHORT = """
with track_run(TrackingArguments(), sys.argv[1], sys.argv[1], Config(sys.argv[1])):
    log_results({"score": 1.0})
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Write a policy and data."""
    directory = tmp_path_factory.mktemp("world")
    tiny.save(tiny.policy(tiny.tokenizer()), directory / "policy")
    for name, data in (("prompts", tiny.prompts()), ("pairs", tiny.preferences())):
        tiny.write_splits(data, directory / name)
    return directory


def _workplace(empty_store, directory):
    (directory / "my_rewards.py").write_text(REWARDS)
    shutil.copy(empty_store, directory)
    return directory


@pytest.fixture
def directory(empty_store, tmp_path):
    return _workplace(empty_store, tmp_path)


def _options(world, directory, reward="length", **changes):
    options = {
        "model_name_or_path": str(world / "policy"),
        "dataset_name": str(world / "prompts"),
        "reward_functions": [f"my_rewards:{reward}"],
        "output_dir": "out/ppo",
        "steps_per_generation": 2,
        "num_iterations": 2,
        "max_completion_length": 6,
        "max_steps": 4,
        "response_separator": " ",
    }
    path = directory / "options.yaml"
    path.write_text(yaml.safe_dump(options | tiny.RECIPE | changes))
    return ["--config", path]


def _ppo(world, directory, *arguments, environment=(), **changes):
    options = _options(world, directory, **changes)
    return run_script(RECIPES / "ppo.py", *options, *arguments, directory=directory, **dict(environment))


def _runs(uri):
    """Return the runs of a store by stage."""
    client = mlflow.MlflowClient(uri)
    found = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    by_stage = {run.data.tags["stage"]: run for run in found}
    assert len(by_stage) == len(found), [run.data.tags for run in found]
    return by_stage


def _store(directory):
    return f"sqlite:///{directory}/mlflow.db"


def _steps(uri, run, metric):
    return [value.step for value in mlflow.MlflowClient(uri).get_metric_history(run.info.run_id, metric)]


def _artifact(uri, run, name):
    return Path(mlflow.MlflowClient(uri).download_artifacts(run.info.run_id, name)).read_text()


@pytest.fixture(scope="module")
def stages(world, empty_store, tmp_path_factory):
    """Train a reward model and a policy, and evaluate it. Return the directory, the store and its runs by stage."""
    directory = _workplace(empty_store, tmp_path_factory.mktemp("stages"))
    common = {"model_name_or_path": str(world / "policy"), "response_separator": " "}
    reward_model = {"dataset_name": str(world / "pairs"), "output_dir": "out/rm", "max_steps": 2, **common}
    (directory / "rm.yaml").write_text(yaml.safe_dump(reward_model | tiny.RECIPE))
    evaluation = {
        **common,
        "model_name_or_path": "out/ppo",
        "baseline_path": str(world / "policy"),
        "dataset_name": str(world / "prompts"),
        "reward_model_path": "out/rm",
        "max_completion_length": 6,
        "output_dir": "out/evaluation",
    }
    (directory / "evaluation.yaml").write_text(yaml.safe_dump(evaluation))
    reports = [
        run_script(RECIPES / "reward_modeling.py", "--config", "rm.yaml", directory=directory),
        _ppo(
            world, directory, "--hub_token", TOKEN, "--hub_revision", f"by {TOKEN}",
            reward_model_path="out/rm", eval_strategy="steps", eval_steps=4, judge_functions=["my_rewards:length"],
            pairwise_judges=["my_rewards:longer"], logging_steps=4, seed=7, run_name="mine", hub_model_id="x" * 7_000,
            model_init_kwargs={"token": PASSWORD, "revision": f"https://me:{PASSWORD}@hub.example/a"},
        ),
        run_script(RECIPES / "evaluate.py", "--config", "evaluation.yaml", directory=directory),
    ]  # fmt: skip
    assert [code for code, _ in reports] == [0, 0, 0], reports[-1][1][-3000:]
    return directory, _store(directory), _runs(_store(directory))


def test_every_stage_is_one_finished_run(stages):
    """With transformers' own callback, the evaluation after reward modelling would be a second run."""
    _, uri, runs = stages
    assert {stage: run.info.status for stage, run in runs.items()} == {
        "reward_modeling": "FINISHED", "ppo": "FINISHED", "evaluation": "FINISHED",
    }  # fmt: skip
    assert "eval_accuracy" in runs["reward_modeling"].data.metrics
    assert _steps(uri, runs["ppo"], "loss") == [4]
    assert _steps(uri, runs["ppo"], "eval_longer/win_rate") == [0, 4]
    for run in runs.values():
        for metric in run.data.metrics:
            steps = _steps(uri, run, metric)
            assert len(set(steps)) == len(steps), f"{metric} is recorded twice at a step"


def test_a_run_shows_what_its_policy_said(stages):
    """The tables of MLflow have the same prompts at every evaluation. A run of four steps has no alarm."""
    directory, uri, runs = stages
    run = runs["ppo"]
    steps = ("evaluation-000000", "evaluation-000004", "training-000004")
    names = [f"samples/{name}" for name in (*steps[:2], "evaluation", steps[2])]
    files = mlflow.MlflowClient(uri).list_artifacts(run.info.run_id, "samples")
    assert [file.path for file in files] == [f"{name}.json" for name in names]
    shown = json.loads(run.data.tags["mlflow.loggedArtifacts"])  # by which MLflow knows its tables
    assert sorted(table["path"] for table in shown) == [f"{name}.json" for name in names]
    assert shown[0]["path"] == "samples/evaluation.json", "MLflow shows the first one"
    start, end, latest, training = (
        pd.read_json(StringIO(_artifact(uri, run, f"{name}.json")), orient="split") for name in names
    )
    assert latest.equals(end)
    assert start["prompt"].tolist() == end["prompt"].tolist()
    assert len(start) == len(tiny.PROMPTS)
    assert {"prompt", "completion", "score", "length", "judge/longer", "kl", "stop", "rm"} <= set(end.columns)
    assert len(training) == 8
    assert run.data.tags["alarms"] == "none"


def test_runs_have_a_table_in_common(stages):
    """MLflow compares tables of the same name by a column: the answers of a training beside those of an evaluation."""
    _, uri, runs = stages
    tables = [
        pd.read_json(StringIO(_artifact(uri, runs[stage], "samples/evaluation.json")), orient="split")
        for stage in ("ppo", "evaluation")
    ]
    prompts = [table["prompt"].tolist() for table in tables]
    assert sorted(prompts[0]) == sorted(prompts[1]) == sorted({*prompts[1]})
    assert {"prompt", "completion", "baseline_completion", "judge/reward_model", "baseline/reward_model"} == set(
        tables[1].columns
    )
    shown = json.loads(runs["evaluation"].data.tags["mlflow.loggedArtifacts"])
    assert shown == [{"path": "samples/evaluation.json", "type": "table"}]


def test_a_page_says_what_a_run_is_and_how_it_ended(stages):
    _, uri, runs = stages
    notes = {stage: run.data.tags["mlflow.note.content"].splitlines() for stage, run in runs.items()}
    assert notes["ppo"][0] == "**PPO**: finished at step 4 of 4."
    assert notes["evaluation"][0] == "**Evaluation**: finished."
    experiment = mlflow.MlflowClient(uri).get_experiment(runs["ppo"].info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    page = f"#/experiments/{experiment.experiment_id}/runs/{runs['reward_modeling'].info.run_id}"
    assert f"- reward model: [out/rm (out/rm)]({page}?workflowType=machine_learning)" in notes["ppo"]
    rows = {line.split(": ")[0].removeprefix("- "): line for line in notes["ppo"]}
    assert rows["training data"].endswith("/prompts: 8 rows")
    rate = rows["win rate by longer"]
    assert re.fullmatch(r"- win rate by longer: 0\.500 at step 0, .* \(95 %: .* to .*\) at step 4", rate)
    assert "accuracy, held out" in "".join(notes["reward_modeling"])
    assert "win rate by reward\\_model" in "".join(notes["evaluation"])


def test_lineage_leads_back_to_the_runs_before(stages):
    directory, uri, runs = stages
    ids = {stage: run.info.run_id for stage, run in runs.items()}
    assert runs["ppo"].data.tags["lineage.reward_model"] == ids["reward_modeling"]
    assert runs["evaluation"].data.tags["lineage.policy"] == ids["ppo"]
    assert runs["evaluation"].data.tags["lineage.reward_model"] == ids["reward_modeling"]
    assert "lineage.policy" not in runs["ppo"].data.tags, "the first policy comes from no run"
    models = {stage: [model.model_id for model in run.outputs.model_outputs] for stage, run in runs.items()}
    read = mlflow.MlflowClient(uri).get_run  # a search leaves out which models a run has used
    used = {stage: {model.model_id for model in read(id).inputs.model_inputs} for stage, id in ids.items()}
    assert [len(models[stage]) for stage in ("reward_modeling", "ppo", "evaluation")] == [1, 1, 0]
    assert used["reward_modeling"] == set()
    assert used["ppo"] == {*models["reward_modeling"]}
    assert used["evaluation"] == {*models["reward_modeling"], *models["ppo"]}
    for stage, folder in (("reward_modeling", "rm"), ("ppo", "ppo"), ("evaluation", "evaluation")):
        note = json.loads((directory / "out" / folder / "mlflow_run.json").read_text())
        noted = {"model_id": models[stage][0]} if models[stage] else {}
        assert note == noted | {
            "run_id": ids[stage],
            "experiment_id": runs[stage].info.experiment_id,
            "tracking_uri": _store(directory),
        }


def test_a_run_says_what_made_it(stages):
    _, _, runs = stages
    run = runs["ppo"]
    assert run.info.run_name == "mine"
    assert run.data.tags["seed"] == run.data.params["seed"] == "7"
    expected = {
        "accelerate.num_processes": "1",
        "accelerate.distributed_type": "NO",
        "accelerate.mixed_precision": "no",
    }
    assert expected.items() <= run.data.tags.items()
    versions = ("torch", "transformers", "trl", "peft", "accelerate")
    assert {f"versions.{name}" for name in versions} <= run.data.tags.keys()
    assert "git.commit" not in run.data.tags, "the directory is no checkout"
    datasets = {tag.value: used.dataset for used in run.inputs.dataset_inputs for tag in used.tags}
    assert {f"dataset.{use}": data.digest for use, data in datasets.items()}.items() <= run.data.tags.items()
    assert set(datasets) == {"training", "evaluation"}
    pairs = {tag.value for used in runs["reward_modeling"].inputs.dataset_inputs for tag in used.tags}
    assert pairs == {"training", "evaluation"}


def test_parameters_are_short_and_the_configuration_is_whole(stages):
    _, uri, runs = stages
    shown = runs["ppo"].data.params["hub_model_id"]
    config = yaml.safe_load(_artifact(uri, runs["ppo"], "config.yaml"))
    assert shown == "x" * 5_999 + "…"
    assert config["PPOConfig"]["hub_model_id"] == "x" * 7_000
    assert config["PPOConfig"]["kl_coef"] == float(runs["ppo"].data.params["kl_coef"])
    assert config["PPOArguments"]["reward_model_path"] == "out/rm"


def test_no_secret_is_recorded(stages):
    directory, uri, runs = stages
    recorded = [str(runs["ppo"].data.to_dictionary()), _artifact(uri, runs["ppo"], "config.yaml")]
    recorded.append((directory / "out/ppo/mlflow_run.json").read_text())
    for text in recorded:
        assert TOKEN not in text
        assert PASSWORD not in text
    assert "https://***@hub.example/a" in recorded[1]


def test_a_crash_is_failed(world, directory):
    code, output = _ppo(world, directory, reward="crash", reward_retries=0)
    assert code == 1
    assert "the reward function has a bug" in output
    run = _runs(_store(directory))["ppo"]
    assert run.info.status == "FAILED"
    assert run.data.tags["mlflow.note.content"].startswith("**PPO**: failed at step 0 of 4. ")
    assert "the reward function has a bug" in run.data.tags["mlflow.note.content"]
    assert not (directory / "out/ppo/mlflow_run.json").exists(), "nothing was written that this run has made"


def test_a_run_that_cannot_go_back_is_failed_and_says_what_to_change(world, directory):
    code, output = _ppo(world, directory, max_kl=1e-9, max_steps=16, learning_rate=1e-2)
    assert code == 1
    assert re.search(r"^Error: Step \d+: the KL to the reference is .* raise `kl_coef`", output, re.MULTILINE)
    assert "Traceback" not in output
    assert _runs(_store(directory))["ppo"].info.status == "FAILED"


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_termination_is_killed(world, directory, number, exit_code):
    options = _options(world, directory, reward="endless")
    process = start_script(RECIPES / "ppo.py", *options, directory=directory)
    wait_for(directory / "sampling")
    assert _runs(_store(directory))["ppo"].info.status == "RUNNING"
    os.kill(process.pid, number)
    time.sleep(2.5)  # the first asks for a checkpoint, the second for an end
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == exit_code
    assert _runs(_store(directory))["ppo"].info.status == "KILLED"


def test_a_resume_continues_the_same_run(world, directory):
    uri = _store(directory)
    common = {"save_strategy": "steps", "save_steps": 4, "reward": "slow", "eval_strategy": "steps", "eval_steps": 4}
    resume = {"resume_from_checkpoint": "out/ppo/checkpoint-4", "max_steps": 12, "allow_changes_on_resume": True}
    sampling = {"MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "0.2"}
    code, output = _ppo(world, directory, **common, max_steps=8, environment=sampling)
    assert code == 0, output[-3000:]
    first = _runs(uri)["ppo"]
    code, output = _ppo(world, directory, **common, **resume, environment=sampling)
    assert code == 0, output[-3000:]

    run = _runs(uri)["ppo"]
    assert run.info.run_id == first.info.run_id
    assert run.info.status == "FINISHED"
    assert run.info.end_time > first.info.end_time
    assert _steps(uri, run, "loss") == list(range(1, 13))
    assert _steps(uri, run, "objective/kl") == [1, 5, 9], "one rollout is four steps"
    assert _steps(uri, run, "eval_win_rate") == [0, 4, 8, 12]
    assert _steps(uri, run, "train_loss") == [8, 12]
    assert run.data.params == first.data.params
    system = _steps(uri, run, "system/system_memory_usage_megabytes")
    assert len(set(system)) == len(system) > 2, "its axis counts samples"
    assert run.data.tags["resume.max_steps"] == "12"
    assert run.data.tags["resume.recorded_until"] == "8"
    assert yaml.safe_load(_artifact(uri, run, "config.yaml"))["PPOConfig"]["max_steps"] == 12
    shown = [entry["path"] for entry in json.loads(run.data.tags["mlflow.loggedArtifacts"])]
    assert shown[0] == "samples/evaluation.json"
    steps = [int(path[-11:-5]) for path in shown[1:] if "evaluation" in path]
    assert steps == [0, 4, 8, 12], "also those of the first attempt"


def test_a_checkpoint_of_another_store_begins_a_new_run(world, directory, empty_store):
    options = {"save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "constant"}
    _ppo(world, directory, **options)
    shutil.copy(empty_store, directory)
    code, output = _ppo(world, directory, resume_from_checkpoint="out/ppo/checkpoint-4", max_steps=8, **options)
    assert code == 0, output[-3000:]
    assert "of out/ppo/checkpoint-4 is not in this store: a new run begins" in output
    assert _steps(_store(directory), _runs(_store(directory))["ppo"], "loss") == [5, 6, 7, 8]


def test_a_server_that_dies_stops_no_training_and_loses_nothing(world, directory):
    port = free_port()
    uri = f"http://me:{PASSWORD}@127.0.0.1:{port}"
    options = _options(world, directory, reward="slow", max_steps=40)
    with mlflow_server(directory, port):
        process = start_script(RECIPES / "ppo.py", *options, "--tracking_uri", uri, directory=directory)
        wait_for(directory / "sampling")
        while "loss" not in _runs(uri)["ppo"].data.metrics:
            assert process.is_alive()
            time.sleep(0.2)
    started = time.monotonic()
    process.join(240)
    assert process.exitcode == 0, (directory / "output.txt").read_text()[-3000:]
    assert time.monotonic() - started < 60, "retries must not stall the training"
    unsent = directory / "out/ppo/mlflow_unsent.jsonl"
    warnings = [line for line in (directory / "output.txt").read_text().splitlines() if "mlflow_unsent" in line]
    assert len(warnings) == 1
    assert "-m rlhf_recipes.tracking.delivery out/ppo/mlflow_unsent.jsonl" in warnings[0]
    note = json.loads((directory / "out/ppo/mlflow_run.json").read_text())
    assert note["tracking_uri"] == f"http://127.0.0.1:{port}"
    for file in (unsent, directory / "output.txt", directory / "out/ppo/mlflow_run.json"):
        assert PASSWORD not in file.read_text()

    with mlflow_server(directory, port):
        assert _runs(uri)["ppo"].info.status == "RUNNING"
        assert "model_id" not in note
        command = [sys.executable, "-m", "rlhf_recipes.tracking.delivery", "out/ppo/mlflow_unsent.jsonl"]
        subprocess.run(command, cwd=directory, check=True, timeout=120)
        run = _runs(uri)["ppo"]
        assert run.info.status == "FINISHED"
        assert _steps(uri, run, "loss") == list(range(1, 41))
        (output,) = run.outputs.model_outputs
        assert output.step == 40
        assert json.loads((directory / "out/ppo/mlflow_run.json").read_text()) == note | {"model_id": output.model_id}
        model = mlflow.MlflowClient(uri).get_logged_model(output.model_id)
        assert model.status == "READY"
        assert {metric.key: metric.value for metric in model.metrics}["loss"] == run.data.metrics["loss"]
        assert yaml.safe_load(_artifact(uri, run, "config.yaml"))["PPOConfig"]["max_steps"] == 40

        script = directory / "short.py"
        script.write_text(SCRIPT + SHORT)
        code, output = run_script(script, "short", directory=directory, MLFLOW_TRACKING_URI=uri)
        assert code == 0, output[-3000:]
        assert _runs(uri)["short"].info.status == "FINISHED"
        assert PASSWORD not in output, "MLflow prints the address of a run that ends"
    assert not unsent.exists()


def test_a_server_that_is_not_there_is_said_at_once(world, directory):
    uri = f"http://me:{PASSWORD}@127.0.0.1:{free_port()}"
    started = time.monotonic()
    code, output = _ppo(world, directory, "--tracking_uri", uri)
    assert code == 1
    assert time.monotonic() - started < 60
    (line,) = [line for line in output.splitlines() if line.startswith("Error: ")]
    assert "`tracking_uri` http://***@127.0.0.1" in line
    assert "`--tracking false`" in line
    assert "Traceback" not in output
    assert PASSWORD not in output


def test_jobs_that_start_together_create_a_store_together(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(SCRIPT + SHORT)
    jobs = [start_script(script, f"job-{number}", directory=tmp_path) for number in range(4)]
    for job in jobs:
        job.join(240)
    assert [job.exitcode for job in jobs] == [0] * 4, (tmp_path / "output.txt").read_text()[-3000:]
    runs = _runs(_store(tmp_path))
    assert {stage: run.info.status for stage, run in runs.items()} == {f"job-{n}": "FINISHED" for n in range(4)}


PIPELINE = """
import multiprocessing

def stage(options):
    tracking = TrackingArguments(parent_run_id=options[1])
    with track_run(tracking, "stage", "sft", Config("out")):
        sys.exit(int(sys.argv[1]))

with track_pipeline(TrackingArguments(), "all", seed=3) as options:
    process = multiprocessing.get_context("fork").Process(target=stage, args=(options,))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit("a stage failed")
"""


@pytest.mark.parametrize(("exit_code", "status"), [(0, "FINISHED"), (2, "FAILED")])
def test_a_pipeline_holds_its_stages_and_shares_their_fate(directory, exit_code, status):
    script = directory / "pipeline.py"
    script.write_text(SCRIPT + PIPELINE)
    code, output = run_script(script, exit_code, directory=directory)
    assert bool(code) is bool(exit_code), output[-3000:]
    runs = _runs(_store(directory))
    assert runs["sft"].data.tags["mlflow.parentRunId"] == runs["pipeline"].info.run_id
    assert (runs["pipeline"].info.status, runs["sft"].info.status) == (status, status)
    assert runs["pipeline"].data.tags["seed"] == "3"
