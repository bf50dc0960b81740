"""Options of the recipes, beside those of models and trainers.

All checks that need neither a model nor a dataset are here. They run before anything is loaded.
"""

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from sqlalchemy.engine import make_url
from trl import ScriptArguments

from rlhf_recipes.options.checks import check_options
from rlhf_recipes.options.paths import function_name, is_address, is_function, is_judge_file
from rlhf_recipes.options.reward_calls import RewardCallConfig

DEFAULT_EXPERIMENT = "rlhf_recipes"
# Limits of a served reward model.
MAX_REQUEST_BYTES, MAX_TOKENS = 2**24, 2**14


@dataclass
class BoundaryArguments:
    """The boundary between prompt and response, for SFT: TRL has no such option."""

    response_separator: str = field(
        default="\n\n", metadata={"help": "The same as in reward modelling and PPO; for plain text only."}
    )


@dataclass
class JudgeArguments(ScriptArguments):
    """Judges whose scores do not train the policy."""

    judge_models: list[str] = field(
        default_factory=list,
        metadata={"help": "Further reward models as judges: directories, Hub names or addresses."},
    )
    judge_functions: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Judges of single answers: Python functions with TRL's reward signature, each as "
            "`package.module:function`, or YAML files of language models as judges."
        },
    )
    pairwise_judges: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Judges that see both answers, in both orders: functions, each as `package.module:function` "
            "(`rlhf_recipes.evaluation.statistics.swapped_preferences` has the signature), or YAML files of language "
            "models as judges."
        },
    )

    def __post_init__(self) -> None:
        check_options(self)
        for option in ("judge_functions", "pairwise_judges", "reward_functions"):
            for reference in getattr(self, option, []):
                if not (is_function(reference) or is_judge_file(reference)):
                    raise ValueError(
                        f"`{option}` must name each function as `package.module:function`, got {reference!r}."
                    )
        models = [j if is_address(j) else re.split("[:/]", j.rstrip("/"))[-1] for j in self.judge_models]
        names = models + [function_name(judge) for judge in (*self.judge_functions, *self.pairwise_judges)]
        if len(set(names)) < len(names):
            raise ValueError(f"Judges must have different names, got {', '.join(names)}.")


@dataclass
class RewardArguments(JudgeArguments):
    """Rewards and judges of a recipe that trains a policy."""

    reward_model_path: str | None = field(
        default=None,
        metadata={
            "help": "Reward model: a directory, a Hub name, or the address of `rlhf serve`, of vLLM or of "
            "text-embeddings-inference (`http://..`)."
        },
    )
    reward_functions: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Rewards that are added to the reward model: Python functions, each as `package.module:function`, "
            "or YAML files of language models as judges."
        },
    )


@dataclass
class PPOArguments(RewardArguments):
    """Rewards, judges and answers for the critic of `recipes/ppo.py`."""

    critic_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Preferences, usually those of the reward model, for `critic: reward` or `adapter`: it is fitted "
            "to the reward model's scores of their answers before the first rollout."
        },
    )
    critic_pairs: int = field(
        default=800,
        metadata={
            "help": "Number of those pairs, from the first. With `critic: adapter` the backbone goes twice forward "
            "and backward over each of their answers, which the processes share."
        },
    )


@dataclass
class EvaluationArguments(RewardCallConfig, JudgeArguments):
    """Options of `recipes/evaluate.py`: two policies, held-out prompts and judges."""

    baseline_path: str | None = field(
        default=None, metadata={"help": "Policy to compare with, usually the one after SFT."}
    )
    reward_model_path: str | None = field(default=None, metadata={"help": "Reward model as a judge."})
    best_of: list[int] = field(
        default_factory=list,
        metadata={
            "help": "Values of n: also report the best of n answers of the baseline, chosen by the reward model."
        },
    )
    num_prompts: int | None = field(default=None, metadata={"help": "Number of held-out prompts. Default: all."})
    num_samples: int = field(default=1, metadata={"help": "Completions per prompt and policy."})
    max_completion_length: int = field(default=256, metadata={"help": "Tokens per completion."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature. Use that of the training."})
    batch_size: int = field(default=32, metadata={"help": "Prompts per generation batch."})
    response_separator: str = field(default="\n\n", metadata={"help": "The same as in training; for plain text only."})
    num_shown: int = field(default=4, metadata={"help": "Number of completions to print side by side."})
    output_dir: str = field(default="runs/evaluation", metadata={"help": "Directory for results and samples."})
    seed: int = field(default=42, metadata={"help": "Seed of sampling and of the bootstrap."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.best_of and self.reward_model_path is None:
            raise ValueError("`best_of` needs `reward_model_path`: the reward model chooses the best answer.")
        if not (self.reward_model_path or self.judge_models or self.judge_functions or self.pairwise_judges):
            raise ValueError(
                "Nothing judges: set `reward_model_path`, `judge_models`, `judge_functions` or `pairwise_judges`."
            )


@dataclass
class ServeArguments:
    """Address and limits of `recipes/serve_reward_model.py`."""

    host: str = field(
        default="127.0.0.1", metadata={"help": "Address to listen at; `0.0.0.0` to serve other machines too."}
    )
    port: int = field(default=8000, metadata={"help": "Port to listen at."})
    batch_size: int = field(default=8, metadata={"help": "Completions per forward pass of the reward model."})
    max_request_bytes: int = field(
        default=MAX_REQUEST_BYTES, metadata={"help": "Size of the largest request, in bytes."}
    )
    max_waiting: int = field(
        default=64,
        metadata={"help": "Largest number of waiting requests. Further ones get the answer 503: try again later."},
    )
    max_tokens: int = field(
        default=MAX_TOKENS, metadata={"help": "Largest number of tokens of a prompt with its completion."}
    )

    def __post_init__(self) -> None:
        check_options(self)


@dataclass
class ExportArguments:
    """Output of `recipes/export.py`."""

    output_dir: str = field(metadata={"help": "Directory for the exported model."})
    overwrite: bool = field(
        default=False,
        metadata={
            "help": "Export to an `output_dir` that holds a model. Its files are moved to a directory beside it, "
            "`NAME.replaced-1`, before the export is written."
        },
    )


@dataclass
class ComparisonArguments:
    """Options of `recipes/compare.py`: the runs and the report."""

    experiment: str = field(metadata={"help": "MLflow experiment with the runs to compare."})
    runs: list[str] = field(
        default_factory=list,
        metadata={"help": "Run ids, beginnings of ids, or run names. Default: all PPO, RLOO, GRPO and DPO runs."},
    )
    tracking_uri: str | None = field(
        default=None,
        metadata={"help": "MLflow store. Default: $MLFLOW_TRACKING_URI, else `sqlite:///mlflow.db` here."},
    )
    output_dir: str = field(default="runs/compare", metadata={"help": "Directory for the report."})
    num_shown: int = field(default=4, metadata={"help": "Held-out prompts whose completions are shown side by side."})

    def __post_init__(self) -> None:
        check_options(self)


@dataclass
class TrackingArguments:
    """The record of a run and of its model in MLflow."""

    tracking: bool = field(default=True, metadata={"help": "Record the run in MLflow."})
    tracking_uri: str | None = field(
        default=None,
        metadata={"help": "MLflow store. Default: $MLFLOW_TRACKING_URI, else `sqlite:///mlflow.db` here."},
    )
    experiment_name: str | None = field(
        default=None,
        metadata={
            "help": "MLflow experiment. Default: $MLFLOW_EXPERIMENT_NAME, $MLFLOW_EXPERIMENT_ID, else `rlhf_recipes`."
        },
    )
    parent_run_id: str | None = field(
        default=None, metadata={"help": "MLflow run that lists this one under it, for example that of a pipeline."}
    )
    log_model: bool = field(
        default=True,
        metadata={"help": "Copy the trained model to the store: an adapter, or a full model with all its gigabytes."},
    )
    registered_model_name: str | None = field(
        default=None, metadata={"help": "Registered model in MLflow that gets the trained model as a new version."}
    )
    registered_model_alias: str | None = field(
        default=None,
        metadata={
            "help": "Alias of that version, for example `candidate`, for `models:/NAME@ALIAS`. An older version loses "
            "it."
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
    """Whether a training recipe may replace an earlier run, and whether it ends after its preflight."""

    overwrite: bool = field(
        default=False,
        metadata={
            "help": "Start a new run in an `output_dir` that holds an earlier one, whose files are moved to a "
            "directory beside it, `NAME.replaced-1`, after the preflight. Without effect on a run that resumes."
        },
    )
    preflight_only: bool = field(
        default=False,
        metadata={
            "help": "Load and check everything, print the result, and end before training: with exit code 0, or with "
            "1 if the run would fail. No run is recorded."
        },
    )

    def recorded(self, tracking: TrackingArguments) -> TrackingArguments:
        """Return the record of the run: none if it ends before training."""
        return replace(tracking, tracking=tracking.tracking and not self.preflight_only)


def experiment_of(tracking: TrackingArguments) -> str:
    """Return the name of the experiment, by the option or the environment."""
    return tracking.experiment_name or os.environ.get("MLFLOW_EXPERIMENT_NAME") or DEFAULT_EXPERIMENT


def is_recorded(tracking: TrackingArguments) -> bool:
    """Return whether MLflow records a run: by the option, and by the switch of transformers in the environment."""
    return tracking.tracking and os.environ.get("DISABLE_MLFLOW_INTEGRATION", "").upper() not in ("TRUE", "1", "YES")


def tracking_uri(tracking: TrackingArguments) -> str:
    """Return the store of the option, of the environment, or a SQLite file here; a file has its full path."""
    uri = tracking.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    file = _sqlite_file(uri)
    return uri if file is None else f"sqlite:///{file.resolve()}"


def _sqlite_file(uri: str) -> Path | None:
    if not uri.startswith("sqlite"):
        return None
    database = make_url(uri).database
    return Path(database) if database and database != ":memory:" else None
