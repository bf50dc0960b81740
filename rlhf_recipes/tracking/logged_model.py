"""Record a trained model in MLflow: its files, its base, and the run that made it.

MLflow's `transformers` flavor is not used, because it loads an adapter on a local base with random weights.
"""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

import mlflow
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus, Metric, Run
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.utils.models import get_model_name_and_version
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

from rlhf_recipes.models.adapter_base import BASE_FILE, saved_base
from rlhf_recipes.models.fingerprint import ADAPTER_CONFIG, base_fingerprint, is_adapter, weights_fingerprint
from rlhf_recipes.options.secrets import reason_of, redact
from rlhf_recipes.rewards.card import CARD_FILE
from rlhf_recipes.tracking.names import model_name

SCHEME = "models:/"
# Weights, heads, configurations, the tokenizer and the card. Files that only a training needs are left out.
MODEL_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "critic/*.safetensors", "*config.json", BASE_FILE, CARD_FILE),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("chat_template*", "additional_chat_templates/*"),
)
UPLOAD_SECONDS = 600  # a server answers after it has stored a file, and a file of weights is large
logger = logging.getLogger(__name__)


class UnknownModelError(ValueError):
    """A `models:/` address without a model."""


def is_model_uri(path: Any) -> TypeGuard[str]:
    """Return whether this is the address of a model in MLflow: `models:/name@alias`, `/name/version` or `/m-…`."""
    return isinstance(path, str) and path.startswith(SCHEME)


def find_model(uri: str) -> LoggedModel:
    """Return the model at an address in the current store.

    Raises:
        UnknownModelError: If there is no model, or the store does not answer.
    """
    client = mlflow.MlflowClient()
    try:
        found = get_model_name_and_version(client, uri)  # a model's id comes alone
        model_id = found[0] if len(found) == 1 else client.get_model_version(*found).source.removeprefix(SCHEME)
        return client.get_logged_model(model_id)
    except MlflowException as error:
        reason = reason_of(error)
        store = redact(mlflow.get_tracking_uri())
        raise UnknownModelError(f"{uri} cannot be read from MLflow at {store}: {reason}") from error


def model_files(directory: str | Path) -> list[Path]:
    """Return the files that a model needs, without checkpoints, optimiser states, logs and plots."""
    return sorted({file for pattern in MODEL_FILES for file in Path(directory).glob(pattern) if file.is_file()})


def describe_model(directory: str | Path, model_type: str, revision: str | None = None) -> dict[str, Any] | None:
    """Return the record of a model without its files, as JSON values; `None` without weights.

    Args:
        directory: Directory of the saved model.
        model_type: `policy` or `reward_model`.
        revision: Revision of the base of an adapter, if the base is on the Hub.
    """
    directory = Path(directory).resolve()
    fingerprint = weights_fingerprint(directory)
    if fingerprint is None:
        return None
    params = {"adapter": str(is_adapter(str(directory))).lower()}
    if is_adapter(str(directory)):
        base = json.loads((directory / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
        params |= {"base_model": redact(str(base)), "base_revision": revision or "main"}
        try:
            noted = saved_base(directory)
            of_base = noted["fingerprint"] if noted else base_fingerprint(str(base), revision, local_files_only=True)
        except (OSError, ValueError):  # the base was built in memory and has no path or name
            of_base = None
        params |= {"base_fingerprint": of_base} if of_base else {}
    return {
        "directory": str(directory),
        "name": model_name(directory.name),
        "model_type": model_type,
        "params": params,
        "tags": {"weights": fingerprint},
    }


def send_model(
    client: mlflow.MlflowClient, run_id: str, model: dict[str, Any], *, step: int, timestamp: int
) -> str | None:
    """Record a model as the output of a run, with the latest metrics of the run; continue an interrupted attempt.

    Args:
        client: Client of the store.
        run_id: Id of the run that wrote the model.
        model: Record that `describe_model` returned, with `registered_model_name` and `registered_model_alias`.
        step: Step of the run.
        timestamp: Time of the record, milliseconds. An alias does not move to an older model.

    Returns:
        The id of the model; `None` if the directory now holds other weights.
    """
    if weights_fingerprint(model["directory"]) != model["tags"]["weights"]:
        logger.warning(
            f"{model['directory']} does not hold the weights of run {run_id} any more: that model is not sent."
        )
        return None
    run = client.get_run(run_id)
    logged = _begun(client, run, model)
    if logged.status != LoggedModelStatus.READY:
        with _time_to_upload():
            for file in model_files(model["directory"]):
                folder = file.parent.relative_to(model["directory"])
                client.log_model_artifact(logged.model_id, str(file), None if folder == Path() else str(folder))
        _copy_metrics(client, run, logged.model_id)
        logged = client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    if logged.model_id not in [output.model_id for output in run.outputs.model_outputs]:
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step)])
    if model["registered_model_name"] is not None:
        _register(client, logged, model["registered_model_name"], model["registered_model_alias"], timestamp)
    return logged.model_id


def _begun(client: mlflow.MlflowClient, run: Run, model: dict[str, Any]) -> LoggedModel:
    """Return the model of an earlier attempt, or a new one."""
    known = client.search_logged_models(
        [run.info.experiment_id],
        filter_string=f"source_run_id = '{run.info.run_id}' AND tags.weights = '{model['tags']['weights']}'",
    )
    if known:
        return known[0]
    described = {name: model[name] for name in ("name", "model_type", "params", "tags")}
    return client.create_logged_model(run.info.experiment_id, source_run_id=run.info.run_id, **described)


@contextmanager
def _time_to_upload() -> Iterator[None]:
    before = os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT")
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(max(UPLOAD_SECONDS, int(before or 0)))
    try:
        yield
    finally:
        if before is None:
            del os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]
        else:
            os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = before


def _copy_metrics(client: mlflow.MlflowClient, run: Run, model_id: str) -> None:
    """Copy the latest metrics of a run to its model. With equal times, the store keeps one value in the run."""
    names = [name for name in run.data.metrics if not name.startswith("system/")]
    latest = [client.get_metric_history(run.info.run_id, name)[-1] for name in names]
    metrics = [Metric(each.key, each.value, each.timestamp, each.step, model_id=model_id) for each in latest]
    client.log_batch(run.info.run_id, metrics=metrics)


def _register(client: mlflow.MlflowClient, logged: LoggedModel, name: str, alias: str | None, timestamp: int) -> None:
    version = _version(client, logged, name, timestamp)
    linked = json.loads(logged.tags.get(MLFLOW_MODEL_VERSIONS, "[]"))
    link = {"name": name, "version": version}
    if link not in linked:  # the page of MLflow shows the link
        client.set_logged_model_tags(logged.model_id, {MLFLOW_MODEL_VERSIONS: json.dumps([*linked, link])})
    if alias is None:
        return
    holder = client.get_registered_model(name).aliases.get(alias)
    if holder is None or int(client.get_model_version(name, holder).tags.get("written_at", 0)) <= timestamp:
        client.set_registered_model_alias(name, alias, str(version))


def _version(client: mlflow.MlflowClient, logged: LoggedModel, name: str, timestamp: int) -> int:
    """Return the version that this model has in a registered model; create the version if it has none."""
    uri, run_id = f"{SCHEME}{logged.model_id}", logged.source_run_id
    for known in client.search_model_versions(f"run_id = '{run_id}'"):
        if (known.name, known.source) == (name, uri):
            return int(known.version)
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = {"written_at": str(timestamp)}
    return int(client.create_model_version(name, uri, run_id, tags=tags, model_id=logged.model_id).version)
