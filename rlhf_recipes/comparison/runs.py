"""Read the PPO, RLOO, GRPO and DPO runs of an MLflow experiment: curves, options, lineage, cost and evaluations.

Nothing is written to the store. A record that a run does not have is no error.
"""

import json
import posixpath
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import mlflow
import pandas as pd
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from rlhf_recipes.options.baselines import CONFIGS
from rlhf_recipes.options.relevance import flat
from rlhf_recipes.options.secrets import reason_of, redact, without_credentials
from rlhf_recipes.tracking.store import configure_mlflow

# The stages that train a policy.
METHODS = ("ppo", *CONFIGS)
# The curves that the comparison draws, lists or checks for alarms.
CURVES = (
    *("episode", "num_tokens", "objective/scores", "objective/kl", "entropy"),
    *("completions/mean_length", "completions/clipped_ratio", "val/explained_variance"),
    "completions/repeated_ngrams",
)
RANKED_CURVES = ("objective/kl", "objective/scores")
# The SQL stores of MLflow replace infinity by the largest double.
STORED_INFINITY = 1.7e308
MEMORY = re.compile(r"system/(?:.*/)?(system|gpu_\d+)_memory_usage_megabytes")
COMMIT_TAGS = ("git.commit", "mlflow.source.git.commit")  # ours, and the one that MLflow sets


@dataclass(frozen=True)
class Evaluation:
    """One policy against its baseline on held-out prompts.

    Args:
        run_id: Id of the run of the evaluation.
        name: Name of that run.
        metrics: Metrics that `compare_policies` returned.
        rows: One row per completion: `prompt`, `policy_completion`, `baseline_completion`, `policy_<judge>`,
            `baseline_<judge>`.
        reward_model: Identity of the judge `reward_model`. Scores of two reward models cannot be compared.
        judge_paths: Path of each judge that is a reward model, by the name of the judge.
    """

    run_id: str
    name: str
    metrics: dict[str, float]
    rows: list[dict[str, Any]]
    reward_model: str
    judge_paths: dict[str, str] = field(default_factory=dict)

    @property
    def reward_models(self) -> dict[str, set[str]]:
        """The judges that are reward models, each with its path and the run that trained it, as far as known."""
        known = {name: {_path(path)} for name, path in self.judge_paths.items()}
        return known | {"reward_model": known.get("reward_model", set()) | {_path(self.reward_model)}}


@dataclass(frozen=True)
class TrackedRun:
    """One run that trained a policy.

    Args:
        run_id: Id in MLflow.
        name: Name in MLflow.
        status: RUNNING, FINISHED, FAILED or KILLED.
        seed: Seed as text. Empty if unknown.
        options: Values of the options by name. Empty if the run recorded none.
        metrics: Last value of every metric.
        curves: The logged ones of `CURVES`, each indexed by step. Those of the evaluations, if the training logs no
            score or KL of the policy's answers: DPO samples none.
        lineage: Names and short ids of the runs that this run used, by role.
        commit: Commit of the code. Empty if unknown.
        link: Page of the run. Empty for a store without a server.
        hours: Wall time. None if MLflow has none.
        peak_memory: Gigabytes by device, from the system metrics.
        evaluation: Latest finished evaluation, if any.
        held_out: Whether the curves are those of the evaluations.
        reward_model: Id of the run that trained the reward model. Empty if unknown.
    """

    run_id: str
    name: str
    status: str
    seed: str
    options: dict[str, Any]
    metrics: dict[str, float]
    curves: dict[str, pd.Series]
    lineage: dict[str, str] = field(default_factory=dict)
    commit: str = ""
    link: str = ""
    hours: float | None = None
    peak_memory: dict[str, float] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    held_out: bool = False
    reward_model: str = ""

    @property
    def failed(self) -> bool:
        """Whether the run failed or was killed."""
        return self.status in ("FAILED", "KILLED")

    @property
    def reward(self) -> str:
        """The rewards of the run. The scores of two runs have the same unit only if this is equal."""
        model = self.lineage.get("reward model") or self.options.get("reward_model_path")
        return str((model, self.options.get("reward_adapter"), self.options.get("reward_functions")))

    @property
    def reward_models(self) -> set[str]:
        """The reward models that the run was trained on: paths, and the run that trained one, as far as known."""
        paths = (self.options.get("reward_model_path"), self.options.get("reward_adapter"))
        return {_path(str(name)) for name in (self.reward_model, *paths) if name}


def _path(path: str) -> str:
    return posixpath.normpath(path)


def read_experiment(experiment: str, run_ids: Iterable[str], tracking_uri: str) -> list[TrackedRun]:
    """Return the runs of an experiment that trained a policy, oldest first, each with its curves and its evaluation.

    Args:
        experiment: Name of the experiment.
        run_ids: Ids, beginnings of ids, or names of the runs to read. Empty for all.
        tracking_uri: Address of the MLflow store.

    Raises:
        FileNotFoundError: If the store is a SQLite file that does not exist.
        ValueError: If the store cannot be read, or has no such experiment or run. The message lists the existing ones.
    """
    configure_mlflow()
    _check_file(tracking_uri)
    try:
        client = MlflowClient(tracking_uri)
        runs = list(_runs(client, experiment, tracking_uri))
        trained = _selected([run for run in runs if run.data.tags.get("stage") in METHODS], runs, experiment, run_ids)
        evaluations = _latest_evaluations(runs)
        return [_read_run(client, run, evaluations.get(run.info.run_id), tracking_uri) for run in trained]
    except MlflowException as error:
        reason = reason_of(error)
        raise ValueError(f"`tracking_uri` {without_credentials(tracking_uri)} cannot be read: {reason}") from error


def _check_file(tracking_uri: str) -> None:
    """Refuse a SQLite file that does not exist, because MLflow would create it."""
    path = tracking_uri.removeprefix("sqlite:///")
    if path != tracking_uri and not Path(path).is_file():
        raise FileNotFoundError(
            f"`tracking_uri` is {redact(tracking_uri)}, which does not exist: start from the directory of the runs, "
            "or set `--tracking_uri` or MLFLOW_TRACKING_URI to their store."
        )


def _runs(client: MlflowClient, experiment: str, tracking_uri: str) -> Iterator[Run]:
    found = client.get_experiment_by_name(experiment)
    if found is None or found.lifecycle_stage == "deleted":
        names = ", ".join(sorted(e.name for e in client.search_experiments()))
        raise ValueError(
            f"`experiment` {experiment!r} is not in {without_credentials(tracking_uri)}, which has: {names}."
        )
    token = None
    while True:
        page = client.search_runs([found.experiment_id], order_by=["attributes.start_time ASC"], page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _selected(trained: list[Run], runs: list[Run], experiment: str, wanted: Iterable[str]) -> list[Run]:
    if not trained:
        stages = pd.Series([run.data.tags.get("stage", "without a stage") for run in runs], dtype=str).value_counts()
        others = ", ".join(f"{count} {stage}" for stage, count in stages.items()) or "none"
        raise ValueError(
            f"`experiment` {experiment!r} has no run of PPO, RLOO, GRPO or DPO (runs there: {others}): train with "
            f"`rlhf ppo --experiment_name {experiment}`, or choose another experiment."
        )
    chosen: list[Run] = []
    for name in wanted:
        matches = [run for run in trained if run.info.run_id.startswith(name) or run.info.run_name == name]
        if not matches:
            known = ", ".join(f"{run.info.run_id[:8]} ({run.info.run_name})" for run in trained)
            raise ValueError(f"`runs`: no run {name!r} in experiment {experiment!r}, which has: {known}.")
        chosen += matches
    ids = {run.info.run_id for run in chosen}
    return [run for run in trained if not ids or run.info.run_id in ids]


def _latest_evaluations(runs: list[Run]) -> dict[str, Run]:
    """Return the latest finished evaluation of each policy by the id of the run that trained the policy."""
    return {
        run.data.tags["lineage.policy"]: run
        for run in runs
        if run.data.tags.get("stage") == "evaluation"
        and run.info.status == "FINISHED"
        and "lineage.policy" in run.data.tags
    }


def _read_run(client: MlflowClient, run: Run, evaluation: Run | None, tracking_uri: str) -> TrackedRun:
    info, tags, metrics = run.info, run.data.tags, run.data.metrics
    options = _read_options(client, info.run_id, tracking_uri)
    if options:
        options = {"method": tags["stage"], **options}
    held_out = any(name not in metrics and f"eval_{name}" in metrics for name in RANKED_CURVES)
    logged = {name: f"eval_{name}" if held_out and f"eval_{name}" in metrics else name for name in CURVES}
    is_server = urlsplit(tracking_uri).scheme in ("http", "https")
    page = f"{without_credentials(tracking_uri).rstrip('/')}/#/experiments/{info.experiment_id}/runs/{info.run_id}"
    memory = [(match[1], name) for name in metrics if (match := MEMORY.fullmatch(name))]
    peaks = pd.Series([_history(client, info.run_id, name).max() / 1e3 for _, name in memory], dtype=float)
    lineage = {"started from": tags.get("lineage.policy"), "reward model": tags.get("lineage.reward_model")}
    return TrackedRun(
        run_id=info.run_id,
        name=info.run_name,
        status=info.status,
        seed=tags.get("seed") or str(options.get("seed", "")),
        options=options,
        metrics=metrics,
        curves={name: _history(client, info.run_id, own) for name, own in logged.items() if own in metrics},
        lineage={role: _run_title(client, run_id) for role, run_id in lineage.items() if run_id},
        commit=next((tags[name] for name in COMMIT_TAGS if name in tags), ""),
        link=page if is_server else "",
        hours=(info.end_time - info.start_time) / 3.6e6 if info.end_time else None,
        peak_memory=peaks.groupby([device for device, _ in memory]).max().to_dict() if memory else {},
        evaluation=None if evaluation is None else _read_evaluation(client, evaluation, tracking_uri),
        held_out=held_out,
        reward_model=tags.get("lineage.reward_model", ""),
    )


def _history(client: MlflowClient, run_id: str, name: str) -> pd.Series:
    """Return a metric by step. A resumed run may log a step twice; the later value counts."""
    entries = sorted(client.get_metric_history(run_id, name), key=lambda entry: (entry.step, entry.timestamp))
    curve = pd.Series({entry.step: entry.value for entry in entries}, dtype=float)
    return curve.where(curve.abs() < STORED_INFINITY)


def _run_title(client: MlflowClient, run_id: str) -> str:
    try:
        return f"{client.get_run(run_id).info.run_name} ({run_id[:8]})"
    except MlflowException:  # deleted for good, or in another store
        return run_id[:8]


def _read_options(client: MlflowClient, run_id: str, tracking_uri: str) -> dict[str, Any]:
    """Return the options of `config.yaml` by name."""
    return flat(yaml.safe_load(_read_artifact(client, run_id, "config.yaml", tracking_uri)) or {})


def _read_evaluation(client: MlflowClient, run: Run, tracking_uri: str) -> Evaluation:
    text = _read_artifact(client, run.info.run_id, "completions.jsonl", tracking_uri)
    options = _read_options(client, run.info.run_id, tracking_uri)
    paths = {posixpath.basename(_path(path)): path for path in options.get("judge_models") or ()}
    if path := options.get("reward_model_path"):
        paths["reward_model"] = path
    return Evaluation(
        run_id=run.info.run_id,
        name=run.info.run_name,
        metrics=run.data.metrics,
        rows=[json.loads(line) for line in text.split("\n") if line],
        reward_model=run.data.tags.get("lineage.reward_model") or str(options.get("reward_model_path")),
        judge_paths=paths,
    )


def _read_artifact(client: MlflowClient, run_id: str, name: str, tracking_uri: str) -> str:
    if name not in (artifact.path for artifact in client.list_artifacts(run_id)):
        return ""
    with tempfile.TemporaryDirectory() as folder:
        path = mlflow.artifacts.download_artifacts(
            run_id=run_id, artifact_path=name, dst_path=folder, tracking_uri=tracking_uri
        )
        return Path(path).read_text(encoding="utf-8")
