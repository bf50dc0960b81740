"""A directory becomes one model in the store, even after interrupted attempts."""

import json
import os
import re
import shutil

import mlflow
import pytest
import tiny
from mlflow.entities import LoggedModelStatus
from peft import get_peft_model

from rlhf_recipes.options.recipes import TrackingArguments
from rlhf_recipes.tracking.logged_model import UnknownModelError, describe_model, find_model, is_model_uri, send_model
from rlhf_recipes.tracking.store import check_registered_names

REGISTERED = {"registered_model_name": "tiny", "registered_model_alias": "candidate"}


@pytest.fixture(scope="module")
def store(tmp_path_factory, empty_store):
    """Return the directory of a store and of its artifacts."""
    directory = tmp_path_factory.mktemp("store")
    shutil.copy(empty_store, directory)
    client = mlflow.MlflowClient(f"sqlite:///{directory}/mlflow.db")
    client.create_experiment("tests", artifact_location=str(directory / "artifacts"))
    return directory


@pytest.fixture
def client(store, monkeypatch):
    mlflow.set_tracking_uri(f"sqlite:///{store}/mlflow.db")
    client = mlflow.MlflowClient()
    for model in client.search_registered_models():
        client.delete_registered_model(model.name)
    yield client
    mlflow.set_tracking_uri(None)


@pytest.fixture
def run_id(client):
    run_id = client.create_run(client.get_experiment_by_name("tests").experiment_id).info.run_id
    for step in (1, 2):
        client.log_metric(run_id, "objective/scores", step / 2, step=step)
    client.log_metric(run_id, "system/cpu", 3.0, step=9)
    client.set_terminated(run_id)
    return run_id


@pytest.fixture
def adapter(tmp_path):
    """Write a LoRA policy like a recipe, with the files that only a training needs."""
    tiny.save(tiny.policy(tiny.tokenizer()), tmp_path / "base")
    directory = tmp_path / "ppo-1.5"
    model = get_peft_model(tiny.policy(tiny.tokenizer()), tiny.lora())
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    tiny.save(model, directory)
    for name in ("value_head.safetensors", "quantization_config.json", "reward_model_card.json"):
        shutil.copy(directory / "adapter_model.safetensors", directory / name)
    (directory / "checkpoint-4").mkdir()
    shutil.copy(directory / "adapter_model.safetensors", directory / "checkpoint-4")
    for name in ("trainer_state.json", "training.png", "optimizer.pt", "mlflow_run.json", "mlflow_unsent.jsonl"):
        (directory / name).write_text("{}")
    return directory


def _described(directory, **registered):
    return describe_model(directory, "policy") | {name: registered.get(name) for name in REGISTERED}


def _names(client, model_id):
    folder = mlflow.artifacts.download_artifacts(f"models:/{model_id}")
    return {os.path.relpath(os.path.join(root, name), folder) for root, _, names in os.walk(folder) for name in names}


def _models(client, run_id):
    experiment = client.get_run(run_id).info.experiment_id
    return client.search_logged_models([experiment], filter_string=f"source_run_id = '{run_id}'")


def test_a_model_is_its_files_its_base_and_the_metrics_of_its_run(client, run_id, adapter):
    model_id = send_model(client, run_id, _described(adapter), step=2, timestamp=5)
    assert _names(client, model_id) == {
        *("adapter_config.json", "adapter_model.safetensors", "value_head.safetensors", "quantization_config.json"),
        *("reward_model_card.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    model = client.get_logged_model(model_id)
    assert (model.name, model.model_type, model.status) == ("ppo-1_5", "policy", LoggedModelStatus.READY)
    assert model.params["base_model"] == str(adapter.parent / "base")
    assert re.fullmatch("[0-9a-f]{16}", model.params["base_fingerprint"])
    assert [(metric.key, metric.value, metric.step) for metric in model.metrics] == [("objective/scores", 1.0, 2)]
    assert len(client.get_metric_history(run_id, "objective/scores")) == 2, "the run has its metrics once"
    assert [(output.model_id, output.step) for output in client.get_run(run_id).outputs.model_outputs] == [
        (model_id, 2)
    ]


def test_a_full_model_needs_no_base(adapter):
    assert _described(adapter.parent / "base")["params"] == {"adapter": "false"}


def test_a_base_that_is_in_no_file_is_recorded_without_a_fingerprint(adapter):
    shutil.rmtree(adapter.parent / "base")
    assert "base_fingerprint" not in _described(adapter)["params"]
    assert describe_model(adapter.parent, "policy") is None, "no weights, no model"


@pytest.mark.parametrize(
    "method",
    [
        *("log_model_artifact", "log_batch", "finalize_logged_model", "log_outputs"),
        *("create_model_version", "set_logged_model_tags", "set_registered_model_alias"),
    ],
)
def test_an_attempt_that_was_cut_off_goes_on(client, run_id, adapter, monkeypatch, method):
    model, when = _described(adapter, **REGISTERED), {"step": 2, "timestamp": 5}
    with monkeypatch.context() as broken:
        broken.setattr(client, method, _fail)
        with pytest.raises(ConnectionError):
            send_model(client, run_id, model, **when)
    model_ids = {send_model(client, run_id, model, **when), send_model(client, run_id, model, **when)}
    assert model_ids == {logged.model_id for logged in _models(client, run_id)}
    assert client.get_logged_model(*model_ids).status == LoggedModelStatus.READY
    assert [output.model_id for output in client.get_run(run_id).outputs.model_outputs] == [*model_ids]
    assert len(client.search_model_versions("name = 'tiny'")) == 1
    link = client.get_logged_model(*model_ids).tags["mlflow.modelVersions"]
    assert json.loads(link) == [{"name": "tiny", "version": 1}]
    assert {find_model(uri).model_id for uri in ("models:/tiny@candidate", "models:/tiny/1")} == model_ids


def _fail(*args, **kwargs):
    raise ConnectionError


def test_a_directory_that_was_overwritten_is_not_sent(client, run_id, adapter, caplog):
    model = _described(adapter)
    tiny.save(get_peft_model(tiny.policy(tiny.tokenizer()), tiny.lora(init_lora_weights=False)), adapter)
    assert send_model(client, run_id, model, step=2, timestamp=5) is None
    assert not _models(client, run_id)
    assert f"{adapter} does not hold the weights of run {run_id} any more" in caplog.text


def test_an_alias_goes_to_what_was_written_last(client, run_id, adapter):
    late = _described(adapter.parent / "base", **REGISTERED)
    newer = send_model(client, run_id, _described(adapter, **REGISTERED), step=2, timestamp=9)
    older = send_model(client, run_id, late, step=1, timestamp=8)
    assert find_model("models:/tiny@candidate").model_id == newer
    assert find_model("models:/tiny/2").model_id == older


def test_an_upload_may_take_longer_than_a_metric(client, run_id, adapter, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    seen = []
    send = client.log_model_artifact

    def watch(*args):
        seen.append(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"])
        send(*args)

    monkeypatch.setattr(client, "log_model_artifact", watch)
    send_model(client, run_id, _described(adapter), step=2, timestamp=5)
    assert set(seen) == {"600"}
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "10"


@pytest.mark.parametrize("uri", ["models:/tiny@candidate", "models:/tiny/7", "models:/m-0123456789", "models:/a/b/c"])
def test_an_address_that_leads_nowhere_is_said(client, uri):
    with pytest.raises(UnknownModelError, match=f"^{uri} cannot be read from MLflow at sqlite:.*$"):
        find_model(uri)


def test_what_is_an_address():
    assert is_model_uri("models:/m-1")
    assert not any(is_model_uri(path) for path in (None, "models/m-1", "organisation/model"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"registered_model_alias": "best"}, "`registered_model_alias` needs `registered_model_name`"),
        ({"registered_model_name": "a", "log_model": False}, "`registered_model_name` needs `log_model: true`"),
        ({"registered_model_name": "a/b"}, "`registered_model_name` is refused by MLflow: .*'/'"),
        ({"registered_model_name": "a", "registered_model_alias": "latest"}, "`registered_model_alias` is refused"),
        ({"registered_model_name": "a", "registered_model_alias": "a b"}, "`registered_model_alias` is refused"),
    ],
)
def test_names_are_refused_before_anything_is_trained(options, message):
    with pytest.raises(ValueError, match=message):
        check_registered_names(TrackingArguments(**options))
