"""Open a run in the MLflow store: a new one, or the run of a checkpoint.

An error of the store is raised here, before the training.
"""

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
import yaml
from filelock import FileLock
from mlflow.entities import LoggedModelInput, Param, Run
from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE
from mlflow.utils.validation import (
    MAX_PARAM_VAL_LENGTH,
    MAX_PARAMS_TAGS_PER_BATCH,
    _validate_model_alias_name,
    _validate_model_alias_name_reserved,
    _validate_model_name,
)

from rlhf_recipes.options.paths import is_address
from rlhf_recipes.options.recipes import TrackingArguments, _sqlite_file, tracking_uri
from rlhf_recipes.options.relevance import config_group, flat
from rlhf_recipes.options.secrets import public_options, reason_of, redact, without_credentials
from rlhf_recipes.tracking.deadline import limit_requests
from rlhf_recipes.tracking.description import Description, described_inputs, with_own_text
from rlhf_recipes.tracking.lineage import environment_tags, upstream_runs
from rlhf_recipes.tracking.logged_model import UnknownModelError
from rlhf_recipes.tracking.names import by_clean_name
from rlhf_recipes.tracking.starting import start_run, tags_of_environment
from rlhf_recipes.tracking.unfinished import UnusableRunError, note_end


def flat_options(options: dict[str, dict[str, Any]], limit: int) -> dict[str, str]:
    """Return every option once, as text of at most `limit` characters, named as `flat` names it."""
    texts = {name: str(value) for name, value in flat(options).items()}
    return {name: text if len(text) <= limit else text[: limit - 1] + "…" for name, text in texts.items()}


# A training must not wait minutes for a store; unsent records are kept. A setting of the user has priority.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",  # a server may ask for an hour
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
# Messages about migrations and retries, and about failures that this library reports in one line.
QUIET = {
    "alembic": logging.WARNING,
    "mlflow.store.db.utils": logging.WARNING,
    "mlflow.tracking.fluent": logging.WARNING,
    "mlflow.system_metrics": logging.CRITICAL,
    "urllib3.connectionpool": logging.ERROR,
}
MIGRATION_SECONDS = 300  # the wait for another job that creates the same store
logger = logging.getLogger(__name__)


def configure_mlflow() -> None:
    """Shorten the timeouts of MLflow, let each request end in time, and silence minor messages."""
    limit_requests()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name, level in QUIET.items():
        logging.getLogger(name).setLevel(level)


def check_registered_names(tracking: TrackingArguments) -> None:
    """Check the names for the registry before the training. MLflow would check them after it.

    Raises:
        ValueError: If `registered_model_name` or `registered_model_alias` is not valid.
    """
    checks = {
        "registered_model_name": [_validate_model_name],
        "registered_model_alias": [_validate_model_alias_name, _validate_model_alias_name_reserved],
    }
    for option, validate in checks.items():
        for check in validate if getattr(tracking, option) is not None else []:
            try:
                check(getattr(tracking, option))
            except MlflowException as error:
                raise ValueError(f"`{option}` is refused by MLflow: {error.message}") from error


class OpenedRun(NamedTuple):
    """A run that has just been opened.

    Args:
        note: Note for `write_run_file`.
        last_steps: Last recorded step of each metric; `None` for a new run.
        description: Description so far.
    """

    note: dict[str, str]
    last_steps: dict[str, int] | None
    description: Description


def open_run(
    tracking: TrackingArguments,
    run_name: str,
    stage: str,
    configs: tuple[Any, ...],
    output_dir: str | None = None,
    **tags: Any,
) -> OpenedRun:
    """Open a run, and record its options, lineage and description.

    Args:
        tracking: Options of the store.
        run_name: Name in MLflow.
        stage: Value of the tag `stage`.
        configs: Dataclasses with the options of the run.
        output_dir: Directory for the note of an open run.
        tags: More tags.

    Raises:
        ValueError: If the store cannot be reached or written, or has no model that an option names; or if
            `MLFLOW_TAGS` cannot be read.
    """
    configure_mlflow()
    check_registered_names(tracking)
    tags = tags_of_environment() | tags
    uri, run = tracking_uri(tracking), None
    if redact(uri) != uri:  # at the end of a run, MLflow prints its address with the password
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    try:
        mlflow.set_tracking_uri(uri)
        with _migration_lock(uri):
            upstream = upstream_runs(*configs)
            run, is_new = start_run(tracking, run_name, stage, configs, output_dir)
        last_steps = None if is_new else _last_steps(run)
        tags |= {"stage": stage} | environment_tags(*configs)
        tags |= {f"lineage.{role}": note["run_id"] for role, note in upstream.items()}
        tags |= {"resume.recorded_until": max(last_steps.values())} if last_steps else {}
        _record_options(run, configs, tags, is_new=is_new)
        _record_inputs(run, [note["model_id"] for note in upstream.values() if "model_id" in note])
        description = Description(stage, described_inputs(configs, upstream))
        known = (tags | run.data.tags).get(MLFLOW_RUN_NOTE, "")
        mlflow.set_tag(MLFLOW_RUN_NOTE, with_own_text(str(known), description.text()))
    except (UnknownModelError, UnusableRunError):
        raise
    except Exception as error:  # a store and the network can raise any error
        if run is not None:
            with suppress(Exception):
                mlflow.end_run("FAILED")
        reason = reason_of(error)
        raise ValueError(
            f"MLflow at `tracking_uri` {redact(uri)} cannot be used: {reason} Start the server, name another "
            "`tracking_uri`, or train without a record: `--tracking false`."
        ) from error
    note = {"run_id": run.info.run_id, "experiment_id": run.info.experiment_id}
    return OpenedRun(note | {"tracking_uri": without_credentials(uri)}, last_steps, description)


def _migration_lock(uri: str) -> AbstractContextManager[Any]:
    """Let one process at a time open a SQLite store: two processes cannot create its tables at once."""
    file = _sqlite_file(uri)
    if file is None:
        return nullcontext()
    file.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{file}.lock", timeout=MIGRATION_SECONDS)


def _last_steps(run: Run) -> dict[str, int]:
    # The public `metrics` has no steps, and the public histories hold every value of the run.
    metrics = mlflow.get_run(run.info.run_id).data._metric_objs
    return {metric.key: metric.step for metric in metrics if not metric.key.startswith("system/")}


def _record_options(run: Run, configs: tuple[Any, ...], tags: dict[str, Any], *, is_new: bool) -> None:
    options = public_options(configs)
    params = flat_options(options, MAX_PARAM_VAL_LENGTH)
    seeds = [config.seed for config in configs if hasattr(config, "seed")]
    tags |= {"seed": seeds[0]} if seeds else {}
    if not is_new:  # parameters and tags keep the values of the first start
        known = run.data.params | run.data.tags
        now = {name: str(value) for name, value in (params | tags).items()}
        changed = {name: value for name, value in now.items() if known.get(name, value) != value}
        params = {name: value for name, value in params.items() if name not in known}
        tags = {name: value for name, value in tags.items() if name not in changed}
        tags |= {f"resume.{name.removeprefix('resume.')}": value for name, value in changed.items()}
    tags |= {"group": config_group(options)}  # `config.yaml` is replaced too
    mlflow.set_tags(by_clean_name(tags))
    items = list(by_clean_name(params).items())
    for start in range(0, len(items), MAX_PARAMS_TAGS_PER_BATCH):
        batch = [Param(name, value) for name, value in items[start : start + MAX_PARAMS_TAGS_PER_BATCH]]
        mlflow.MlflowClient().log_batch(run.info.run_id, params=batch)
    if options:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "config.yaml")
            path.write_text(yaml.safe_dump(options, sort_keys=False), encoding="utf-8")
            mlflow.log_artifact(str(path))


def _record_inputs(run: Run, model_ids: list[str]) -> None:
    client = mlflow.MlflowClient()
    for model_id in model_ids:
        try:
            client.get_logged_model(model_id)  # MLflow would also accept an unknown model
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # the run is in another store
                raise
        else:
            client.log_inputs(run.info.run_id, models=[LoggedModelInput(model_id)])


def end_run(tracking: TrackingArguments, run_id: str, status: str, output_dir: str | None) -> None:
    """End a run that another process opened."""
    configure_mlflow()
    try:
        mlflow.MlflowClient(tracking_uri(tracking)).set_terminated(run_id, status)
        note_end(output_dir)
    except MlflowException:
        logger.warning(f"MLflow does not answer: the run {run_id} has ended as {status} and stays RUNNING there.")


def ui_command(tracking: TrackingArguments) -> str:
    """Return the address of the server, or the command that starts one."""
    uri = tracking_uri(tracking)
    mlflow_command = Path(sys.executable).with_name("mlflow")
    shown = without_credentials(uri)
    return shown if is_address(uri) else f"{mlflow_command} ui --backend-store-uri {shown}"


@contextmanager
def system_metrics(run_id: str, *, resumed: bool) -> Iterator[None]:
    """Record processor, memory, disk, network and GPUs inside, as metrics `system/*`.

    MLflow's own switch is not used: its thread would not stop if the store does not answer at the end.
    """
    wanted = MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.get() or not MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.defined
    if not wanted:
        yield
        return
    monitor = SystemMetricsMonitor(run_id, resume_logging=resumed)
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()
