"""Inputs of the recipes beside models, data and trainers.

Everything that can be checked without a model or a dataset is checked here, before anything is loaded.
"""

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sqlalchemy.engine import make_url
from trl import ScriptArguments

from rlhf_recipes.options.checks import check_range
from rlhf_recipes.options.reward_calls import RewardCallConfig


def _check_list(config: Any, name: str) -> None:
    value = getattr(config, name)
    if not isinstance(value, list):
        raise ValueError(f"`{name}` must be a list, got {value!r}: write `{name}: [{value}]`.")


@dataclass
class BoundaryArguments:
    """The boundary between prompt and response, for recipes whose TRL configuration has none."""

    response_separator: str = field(
        default="\n\n", metadata={"help": "As in reward modelling and PPO; plain text only."}
    )


@dataclass
class JudgeArguments(ScriptArguments):
    """Judges that a policy is not trained on."""

    judge_models: list[str] = field(
        default_factory=list,
        metadata={"help": "Further reward models that judge: directories, Hub names or addresses."},
    )
    judge_functions: list[str] = field(
        default_factory=list,
        metadata={"help": "Python judges of TRL's reward signature, each as `package.module:function`."},
    )
    pairwise_judges: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Python judges that see both answers, each as `package.module:function`; asked in both orders. "
            "Their signature is in `rlhf_recipes.evaluation.statistics.swapped_preferences`."
        },
    )

    def __post_init__(self) -> None:
        for option in ("judge_models", "judge_functions", "pairwise_judges"):
            _check_list(self, option)
        judges = (*self.judge_models, *self.judge_functions, *self.pairwise_judges)
        names = [j if j.startswith("http") else re.split("[:/]", j.rstrip("/"))[-1] for j in judges]
        if len(set(names)) < len(names):
            raise ValueError(f"Judges must have different names, got {', '.join(names)}.")


@dataclass
class PPOArguments(JudgeArguments):
    """Inputs of `recipes/ppo.py` beside the policy and the data."""

    reward_model_path: str | None = field(
        default=None,
        metadata={
            "help": "Reward model to score with: a directory, a Hub name, or where one is served (`http://..`)."
        },
    )
    reward_functions: list[str] = field(
        default_factory=list,
        metadata={"help": "Python reward functions, each as `package.module:function`, added to the reward model."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_list(self, "reward_functions")


@dataclass
class EvaluationArguments(RewardCallConfig, JudgeArguments):
    """Inputs of `recipes/evaluate.py`: two policies, held-out prompts and judges."""

    baseline_path: str | None = field(default=None, metadata={"help": "Policy to compare with, usually the SFT one."})
    reward_model_path: str | None = field(default=None, metadata={"help": "Reward model that judges."})
    num_prompts: int | None = field(default=None, metadata={"help": "Held-out prompts to use. Default: all."})
    num_samples: int = field(default=1, metadata={"help": "Completions per prompt and policy."})
    max_completion_length: int = field(default=256, metadata={"help": "Tokens per completion."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature; the one of training compares."})
    batch_size: int = field(default=32, metadata={"help": "Prompts per generation batch."})
    response_separator: str = field(default="\n\n", metadata={"help": "As in training; plain text only."})
    num_shown: int = field(default=4, metadata={"help": "Completions to print side by side."})
    output_dir: str = field(default="runs/evaluation", metadata={"help": "Where results and samples are written."})
    seed: int = field(default=42, metadata={"help": "Seed of sampling and of the bootstrap."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_reward_calls()
        for name in ("num_prompts", "num_samples", "max_completion_length", "batch_size"):
            check_range(self, name, lambda x: x > 0, "be positive")
        check_range(self, "temperature", lambda x: x >= 0, "not be negative")
        if not (self.reward_model_path or self.judge_models or self.judge_functions or self.pairwise_judges):
            raise ValueError(
                "Nothing judges: set `reward_model_path`, `judge_models`, `judge_functions` or `pairwise_judges`."
            )


@dataclass
class ServeArguments:
    """Where `recipes/serve_reward_model.py` listens, and how much it takes at a time."""

    host: str = field(
        default="127.0.0.1", metadata={"help": "Address to listen at; `0.0.0.0` for other machines too."}
    )
    port: int = field(default=8000, metadata={"help": "Port to listen at."})
    batch_size: int = field(default=8, metadata={"help": "Completions per forward of the reward model."})
    max_request_bytes: int = field(default=2**24, metadata={"help": "Size of the largest request."})
    max_waiting: int = field(
        default=64, metadata={"help": "Requests that wait at most; further ones are told to come back (503)."}
    )

    def __post_init__(self) -> None:
        check_range(self, "port", lambda x: 0 < x < 65536, "lie in [1, 65535]")
        for name in ("batch_size", "max_request_bytes", "max_waiting"):
            check_range(self, name, lambda x: x > 0, "be positive")


@dataclass
class ExportArguments:
    """Where `recipes/export.py` writes."""

    output_dir: str = field(metadata={"help": "Directory for the exported model."})


@dataclass
class ComparisonArguments:
    """Inputs of `recipes/compare.py`: which runs, and where the report goes."""

    experiment: str = field(metadata={"help": "MLflow experiment whose PPO runs are compared."})
    runs: list[str] = field(
        default_factory=list,
        metadata={"help": "Run ids, beginnings of ids, or run names. Default: all PPO runs of the experiment."},
    )
    tracking_uri: str | None = field(
        default=None,
        metadata={"help": "MLflow store. Default: $MLFLOW_TRACKING_URI, else `sqlite:///mlflow.db` here."},
    )
    output_dir: str = field(default="runs/compare", metadata={"help": "Where the report and its figures are written."})
    num_shown: int = field(default=4, metadata={"help": "Held-out prompts whose completions are shown side by side."})

    def __post_init__(self) -> None:
        _check_list(self, "runs")
        check_range(self, "num_shown", lambda x: x >= 0, "not be negative")


@dataclass
class TrackingArguments:
    """Where runs and the models that they train are recorded."""

    tracking: bool = field(default=True, metadata={"help": "Record the run in MLflow."})
    tracking_uri: str | None = field(
        default=None,
        metadata={"help": "MLflow store. Default: $MLFLOW_TRACKING_URI, else `sqlite:///mlflow.db` here."},
    )
    experiment_name: str | None = field(
        default=None, metadata={"help": "MLflow experiment. Default: $MLFLOW_EXPERIMENT_NAME, else `rlhf_recipes`."}
    )
    parent_run_id: str | None = field(
        default=None, metadata={"help": "MLflow run, say of a pipeline, under which this one is listed."}
    )
    log_model: bool = field(
        default=True,
        metadata={
            "help": "Copy the trained model to the store: an adapter, or a full model whole, with all its gigabytes."
        },
    )
    registered_model_name: str | None = field(
        default=None, metadata={"help": "Registered model in MLflow of which the trained model becomes a new version."}
    )
    registered_model_alias: str | None = field(
        default=None,
        metadata={
            "help": "Alias for that version, say `candidate`, for `models:/NAME@ALIAS`; taken from an older one."
        },
    )

    def __post_init__(self) -> None:
        if self.registered_model_alias is not None and self.registered_model_name is None:
            raise ValueError(
                "`registered_model_alias` needs `registered_model_name`: it names a version of that model."
            )
        if self.registered_model_name is not None and not self.log_model:
            raise ValueError("`registered_model_name` needs `log_model: true`: a version is of a model in the store.")


@dataclass
class PreflightArguments:
    """How far a training recipe goes."""

    preflight_only: bool = field(
        default=False,
        metadata={
            "help": "Load and check everything, print it, and leave before training: with 0, or with 1 if something "
            "is bound to fail. No run is recorded."
        },
    )

    def recorded(self, tracking: TrackingArguments) -> TrackingArguments:
        """Return where the run is recorded: nowhere if it ends before training."""
        return replace(tracking, tracking=tracking.tracking and not self.preflight_only)


def tracking_uri(tracking: TrackingArguments) -> str:
    """Return the store: the option, else the environment's, else a SQLite file here; a file with its full path."""
    uri = tracking.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    file = _sqlite_file(uri)
    return uri if file is None else f"sqlite:///{file.resolve()}"


def _sqlite_file(uri: str) -> Path | None:
    if not uri.startswith("sqlite"):
        return None
    database = make_url(uri).database
    return Path(database) if database and database != ":memory:" else None
