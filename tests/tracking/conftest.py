"""A store of MLflow of its own for each test."""

import shutil

import mlflow
import pytest


@pytest.fixture
def client(tmp_path, empty_store, monkeypatch):
    """Return a client of a store of its own, in the working directory."""
    shutil.copy(empty_store, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    monkeypatch.setattr("mlflow.tracking.fluent._active_experiment_id", None)
    for name in ("RUN_ID", "EXPERIMENT_ID", "EXPERIMENT_NAME", "TAGS", "TRACKING_URI"):
        monkeypatch.delenv(f"MLFLOW_{name}", raising=False)
    monkeypatch.delenv("DISABLE_MLFLOW_INTEGRATION", raising=False)
    yield mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.set_tracking_uri(None)
