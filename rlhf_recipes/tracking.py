"""MLflow runs, owned by the recipe.

Layer L2. transformers' callback logs metrics into the run that is open; who opens and ends it is decided here, so that
a crash is recorded as FAILED and an evaluation after training does not open a run of its own.
"""

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import mlflow
import yaml
from accelerate import PartialState

from rlhf_recipes.configs import TrackingArguments

SECRETS = ("token", "password", "secret", "key")


@contextmanager
def track_run(tracking: TrackingArguments, run_name: str, stage: str, *configs: Any) -> Iterator[None]:
    """Record what happens inside as one MLflow run, on the main process.

    A run that raises ends as FAILED. The resolved configuration becomes the artifact `config.yaml`.

    Args:
        tracking: Where to record, or not at all.
        run_name: Name shown in MLflow.
        stage: `sft`, `reward_modeling`, `ppo` or `evaluation`; a tag to filter by.
        configs: Dataclasses with the run's options. MLflow is added to, or taken from, a `report_to` among them.
    """
    for config in configs:
        if hasattr(config, "report_to"):
            others = [name for name in config.report_to if name != "mlflow"]
            config.report_to = [*others, "mlflow"] if tracking.tracking else others
    if not tracking.tracking or not PartialState().is_main_process:
        yield
        return
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    for name in ("alembic", "mlflow.store.db.utils", "mlflow.tracking.fluent"):  # migrations of a new store
        logging.getLogger(name).setLevel(logging.WARNING)
    mlflow.set_tracking_uri(tracking_uri(tracking))
    mlflow.set_experiment(tracking.experiment_name or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "rlhf_recipes")
    with mlflow.start_run(run_name=run_name, tags={"stage": stage}):
        _log_config(configs)
        yield


def tracking_uri(tracking: TrackingArguments) -> str:
    """Return the store: the option, else the environment's, else a SQLite file here."""
    return tracking.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"


def log_results(metrics: dict[str, float], *files: Path) -> None:
    """Record metrics and files in the open run; without one, do nothing."""
    if mlflow.active_run() is None:
        return
    mlflow.log_metrics(metrics)
    for file in files:
        mlflow.log_artifact(str(file))


def _log_config(configs: tuple[Any, ...]) -> None:
    options = {type(config).__name__: _public_options(config) for config in configs if is_dataclass(config)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        path.write_text(yaml.safe_dump(options, sort_keys=False), encoding="utf-8")
        mlflow.log_artifact(str(path))


def _public_options(config: Any) -> dict[str, Any]:
    options = config.to_dict() if hasattr(config, "to_dict") else asdict(config)
    return {
        name: value if isinstance(value, str | int | float | bool | list | dict | None) else str(value)
        for name, value in options.items()
        if not any(secret in name for secret in SECRETS) or name == "eos_token"
    }
