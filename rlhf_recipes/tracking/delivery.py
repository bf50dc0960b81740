"""Send the records of a run to MLflow. A failure of the store does not stop the training.

One thread sends in order. Records that cannot be sent are kept in a file of JSON lines. This command sends them later:

    python -m rlhf_recipes.tracking.delivery runs/my_model/ppo/mlflow_unsent.jsonl
"""

import json
import logging
import math
import signal
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from numbers import Real
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_RUN_NOTE
from mlflow.utils.validation import MAX_DATASET_NAME_SIZE, MAX_METRICS_PER_BATCH

from rlhf_recipes.durability.notes import write_whole
from rlhf_recipes.durability.termination import TerminatedError, signals_held
from rlhf_recipes.tracking.deadline import limit_requests
from rlhf_recipes.tracking.description import with_own_text
from rlhf_recipes.tracking.lineage import note_model
from rlhf_recipes.tracking.logged_model import send_model
from rlhf_recipes.tracking.names import Names, clean_name
from rlhf_recipes.tracking.unfinished import note_end

UNSENT_FILE = "mlflow_unsent.jsonl"
PAUSE_SECONDS = 60.0  # between two attempts at a store that does not answer
SIGNAL_SECONDS = 0.05  # until a signal is noticed while the last records are sent
CLOSE_SECONDS = 600.0  # at the end of a run, for the records that wait
logger = logging.getLogger(__name__)


class Delivery:
    """Send the records of one MLflow run from a training loop.

    A metric has one value per step. A run that resumes, or goes back, repeats steps; these are not recorded again.

    Args:
        run_id: Id of the run.
        tracking_uri: Address of its store, without credentials. It is noted beside the unsent records.
        output_dir: Directory for `mlflow_unsent.jsonl`.
        last_steps: Last recorded step of each metric, by name.
    """

    def __init__(self, run_id: str, tracking_uri: str, output_dir: str | Path, last_steps: dict[str, int]) -> None:
        self.unsent = Path(output_dir, UNSENT_FILE)
        self._origin = {"run_id": run_id, "tracking_uri": tracking_uri}
        self._last_steps = dict(last_steps)
        self._names = Names()
        self._step = 0
        self._paused_until = 0.0
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mlflow-delivery")

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Send metrics, without waiting.

        Args:
            metrics: Values by name. Names that MLflow refuses are made fit, and values that are no numbers left out.
            step: Optimiser step. Default: the latest one. A metric that is recorded there is not sent again.
        """
        self._step = self._step if step is None else step
        names = self._names(name for name, value in metrics.items() if isinstance(value, Real))
        values = {clean: float(metrics[name]) for name, clean in names.items()}
        fresh = {name: value for name, value in values.items() if self._step > self._last_steps.get(name, -1)}
        self._last_steps |= dict.fromkeys(fresh, self._step)
        if fresh:
            self._submit({"metrics": fresh, "step": self._step})

    def log_artifact(self, file: Path, folder: str = "") -> None:
        """Send a file to a folder of the run. The file must not change until it is sent."""
        self._submit({"artifact": str(file.resolve()), "folder": folder})

    def log_missing_artifacts(self, files: list[Path], folder: str) -> None:
        """Send the files that a folder of the run does not have."""
        if files:
            self._submit({"missing": [str(file.resolve()) for file in files], "folder": folder})

    def log_dataset(self, name: str, digest: str, context: str) -> None:
        """Send the identity of a dataset and its purpose."""
        source = {"source_type": "hf", "source": json.dumps({"path": name})}
        name = name[-MAX_DATASET_NAME_SIZE:]
        self._submit({"dataset": {"name": name, "digest": digest, **source}, "context": context})

    def log_model(self, model: dict[str, Any]) -> None:
        """Send a model that `describe_model` returned. Its files must not change until they are sent."""
        self._submit({"model": model, "step": self._step})

    def set_tags(self, tags: dict[str, str]) -> None:
        """Send tags."""
        self._submit({"tags": {clean_name(name): value for name, value in tags.items()}})

    def describe(self, text: str) -> None:
        """Send the description of the run. Text of a user in it stays."""
        self._submit({"description": text})

    def set_killed(self) -> None:
        """Send the status KILLED, for a process that may not come to its end."""
        self._submit({"status": "KILLED"})

    def _submit(self, record: dict[str, Any]) -> None:
        self._worker.submit(self._send, self._origin | {"timestamp": int(time.time() * 1000)} | record)

    def _send(self, record: dict[str, Any]) -> None:
        if time.monotonic() < self._paused_until:
            self._keep(record)
            return
        try:
            _apply(mlflow.MlflowClient(), record)
        except Exception as error:  # no error of a store or of the network may stop a training
            self._keep(record)
            if getattr(error, "error_code", None) != "INVALID_PARAMETER_VALUE":  # else only this record is wrong
                self._paused_until = time.monotonic() + PAUSE_SECONDS

    def _keep(self, record: dict[str, Any]) -> None:
        self.unsent.parent.mkdir(parents=True, exist_ok=True)
        with self.unsent.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def close(self, status: str) -> None:
        """Wait until every record is sent or kept, end the active run, and warn of kept records.

        After `CLOSE_SECONDS`, wait only for the request in progress, and keep the remaining records. A signal ends the
        wait too, and the run is KILLED.
        """
        give_up = time.monotonic() + CLOSE_SECONDS
        with signals_held() as received:
            sent = self._worker.submit(bool)
            while not (sent.done() or received):
                wait([sent], timeout=SIGNAL_SECONDS)
                if time.monotonic() > give_up:
                    self._paused_until = math.inf  # from now on, the worker only keeps
            is_cut = not sent.done()
            if is_cut:
                self._paused_until = math.inf
            has_ended = self._end("KILLED" if is_cut else status)  # other signals come too late
        if is_cut:
            raise KeyboardInterrupt if received[0] == signal.SIGINT else TerminatedError(128 + received[0])
        self._worker.shutdown(wait=True)
        if has_ended and self._paused_until < math.inf:
            with suppress(Exception):  # the store may answer again
                send_unsent(self.unsent, mlflow.get_tracking_uri())
        if self.unsent.exists():
            count = len(self.unsent.read_text(encoding="utf-8").splitlines())
            logger.warning(
                f"MLflow at {self._origin['tracking_uri']} did not take {count} records of this run. They are kept; "
                f"send them with: {sys.executable} -m rlhf_recipes.tracking.delivery {self.unsent}"
            )

    def _end(self, status: str) -> bool:
        """End the active run. Return whether the store took it."""
        try:
            mlflow.end_run(status)
        except Exception:  # the model matters more than its record
            self._keep(self._origin | {"timestamp": int(time.time() * 1000), "status": status})
            return False
        note_end(str(self.unsent.parent))
        return True


def send_unsent(path: str | Path, tracking_uri: str | None = None) -> int:
    """Send the kept records of a run, and delete the file. A value that the store already has is not sent again.

    Args:
        path: Path of `mlflow_unsent.jsonl`.
        tracking_uri: Address of the store. Default: the address that the run noted, without credentials. If the store
            needs a password, give it here, or set `MLFLOW_TRACKING_USERNAME` and `MLFLOW_TRACKING_PASSWORD`.

    Returns:
        The number of records.

    Raises:
        MlflowException: If the store refuses a record. The file then does not change.
    """
    if not Path(path).exists():
        return 0
    records = _records(Path(path))
    runs = defaultdict(list)
    for record in records:
        runs[tracking_uri or record["tracking_uri"], record["run_id"]].append(record)
    kept: list[dict[str, Any]] = []
    for (uri, run_id), of_run in runs.items():
        try:
            _send_run(mlflow.MlflowClient(tracking_uri=uri), run_id, of_run)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            kept += of_run
            logger.warning(f"The store does not have the run {run_id}: its {len(of_run)} records stay in {path}.")
    if kept:
        write_whole(Path(path), "".join(json.dumps(record) + "\n" for record in kept))
    else:
        Path(path).unlink()
    return len(records) - len(kept)


def _send_run(client: mlflow.MlflowClient, run_id: str, records: list[dict[str, Any]]) -> None:
    names = Names()  # an earlier version kept names as they were
    missing = _missing(client, run_id, [metric for record in records for metric in _metrics(record, names)])
    for start in range(0, len(missing), MAX_METRICS_PER_BATCH):
        client.log_batch(run_id, metrics=missing[start : start + MAX_METRICS_PER_BATCH])
    for record in records:
        # A run that is not RUNNING has a newer status.
        if "metrics" not in record and ("status" not in record or _is_running(client, run_id)):
            _apply(client, record)


def _records(path: Path) -> list[dict[str, Any]]:
    """Return the kept records. A process that was killed may have left a part of one."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            records.append(json.loads(line))
        except ValueError:
            logger.warning(f"{path}, line {number}: the record is not whole, and is left out.")
    return records


def _is_running(client: mlflow.MlflowClient, run_id: str) -> bool:
    return client.get_run(run_id).info.status == "RUNNING"


def _missing(client: mlflow.MlflowClient, run_id: str, metrics: list[Metric]) -> list[Metric]:
    wanted = {(metric.key, metric.step): metric for metric in reversed(metrics)}  # the first value of each step
    for name in {metric.key for metric in metrics}:
        for metric in client.get_metric_history(run_id, name):
            wanted.pop((name, metric.step), None)
    return list(wanted.values())


def _metrics(record: dict[str, Any], names: Names) -> list[Metric]:
    values = record.get("metrics", {})
    clean = names(values)
    return [Metric(clean[name], value, record["timestamp"], record["step"]) for name, value in values.items()]


def _apply(client: mlflow.MlflowClient, record: dict[str, Any]) -> None:
    run_id = record["run_id"]
    if "metrics" in record:
        client.log_batch(run_id, metrics=_metrics(record, Names()))
    if "dataset" in record:
        context = InputTag(MLFLOW_DATASET_CONTEXT, record["context"])
        client.log_inputs(run_id, datasets=[DatasetInput(Dataset(**record["dataset"]), tags=[context])])
    if "artifact" in record:
        _send_file(client, run_id, record["artifact"], record["folder"])
    if "missing" in record:
        known = {Path(file.path).name for file in client.list_artifacts(run_id, record["folder"])}
        for path in record["missing"]:
            if Path(path).name not in known:
                _send_file(client, run_id, path, record["folder"])
    if "model" in record:
        model_id = send_model(client, run_id, record["model"], step=record["step"], timestamp=record["timestamp"])
        note_model(record["model"]["directory"], run_id, model_id)
    _apply_tags(client, run_id, record)
    if "status" in record:
        client.set_terminated(run_id, record["status"], record["timestamp"])


def _apply_tags(client: mlflow.MlflowClient, run_id: str, record: dict[str, Any]) -> None:
    for name, value in record.get("tags", {}).items():
        client.set_tag(run_id, clean_name(name), value)
    if "description" in record:
        known = client.get_run(run_id).data.tags.get(MLFLOW_RUN_NOTE, "")
        client.set_tag(run_id, MLFLOW_RUN_NOTE, with_own_text(known, record["description"]))


def _send_file(client: mlflow.MlflowClient, run_id: str, path: str, folder: str) -> None:
    if Path(path).is_file():
        client.log_artifact(run_id, path, folder or None)
    else:
        logger.warning(f"{path} is gone: the run {run_id} is recorded without it.")


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    limit_requests()
    logger.warning(f"Sent {send_unsent(*sys.argv[1:3])} records.")
