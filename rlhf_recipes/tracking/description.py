"""Describe a run on its page in MLflow: how it ended, what it started from, and its figures.

The text is Markdown in the tag `mlflow.note.content`. The page shows its first lines, so the end comes first.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mlflow.utils.validation import MAX_TAG_VAL_LENGTH

from rlhf_recipes.durability.termination import TerminatedError
from rlhf_recipes.evaluation.figures import rounded, title
from rlhf_recipes.options.secrets import redact
from rlhf_recipes.tracking.lineage import UPSTREAM, named_models
from rlhf_recipes.tracking.unfinished import find_run

# The last line of our part. A user may write below it.
LAST_LINE = "*rlhf_recipes writes the text above this line. Your own text below it stays.*"
TRAINING_VIEW = "workflowType=machine_learning"  # without it, MLflow opens a page in its view for applications
TITLES = {
    "process_reward_modeling": "Process reward modelling",
    **{"sft": "Supervised fine-tuning", "reward_modeling": "Reward modelling", "evaluation": "Evaluation"},
    "preferences": "New preferences",
    "reward_model_evaluation": "Evaluation of reward models",
    **{"ppo": "PPO", "rloo": "RLOO", "grpo": "GRPO", "dpo": "DPO", "pipeline": "Pipeline"},
}
ENDS = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "stopped"}
# Figures of the log and of evaluations that the page shows after all win rates.
SHOWN = (
    *("objective/scores", "eval_objective/scores", "objective/kl", "eval_objective/kl", "completions/mean_length"),
    *("eval_accuracy", "eval_calibration_error", "eval_length_correlation", "loss", "eval_loss"),
    *("policy/kl", "policy/length", "pairs/train", "pairs/test", "pairs/longer_chosen"),
)
LOSSES = ("loss", "eval_loss")  # they say little where the reward has a score
MAX_FIGURES, MAX_CELL, MAX_ALARMS = 16, 200, 5


class Input(NamedTuple):
    """Something that a run started from.

    Args:
        role: What it is for the run.
        name: Name of the run that made it, or its path.
        link: Page of that run; empty if MLflow does not have it.
    """

    role: str
    name: str
    link: str = ""


@dataclass
class Description:
    """Hold the parts of the description of one run.

    Args:
        stage: Value of the tag `stage`.
        inputs: Models that the run started from.
        data: Datasets.
        figures: Values of each figure by step.
        alarms: Sentences of the alarms.
        end: Sentence about the end; empty while the run goes on.
        best_step: Step whose weights the model has, if the best ones were loaded at the end.
    """

    stage: str
    inputs: list[Input] = field(default_factory=list)
    data: list[Input] = field(default_factory=list)
    figures: dict[str, dict[int, float]] = field(default_factory=dict)
    alarms: list[str] = field(default_factory=list)
    end: str = ""
    best_step: int | None = None

    def add_log(self, log_history: Iterable[Mapping[str, Any]]) -> None:
        """Add the figures of a trainer's log."""
        for record in log_history:
            self.add_figures(record, int(record["step"]))

    def add_figures(self, figures: Mapping[str, Any], step: int) -> None:
        """Add figures of one step."""
        for name, value in figures.items():
            if isinstance(value, int | float):
                self.figures.setdefault(name, {})[step] = float(value)

    def text(self) -> str:
        """Return the Markdown, with `LAST_LINE` as its last line."""
        stage = f"**{TITLES.get(self.stage, _plain(self.stage))}**"
        parts = [f"{stage}: {self.end}" if self.end else stage]
        alarms = [("alarm", _plain(alarm)) for alarm in self.alarms[:MAX_ALARMS]]
        inputs = [(given.role, _linked(given)) for given in (*self.inputs, *self.data)]
        parts += [_listed(rows) for rows in (alarms, self._shown_figures(), inputs) if rows]
        return "\n\n".join([*parts, LAST_LINE])

    def _shown_figures(self) -> list[tuple[str, str]]:
        rates = sorted(name for name in self.figures if name.endswith("/win_rate"))
        labels = {name: f"win rate by {_judge(name)}" for name in rates} | {name: title(name) for name in SHOWN}
        ranked = (name for name in self.figures if name.endswith("/accuracy") and name.count("/") == 1)
        labels |= {name: f"accuracy of {name.removesuffix('/accuracy')}" for name in ranked}
        shown = [name for name in labels if name in self.figures and not (self._has_scores and name in LOSSES)]
        return [(_plain(labels[name]), self._value(name)) for name in shown[:MAX_FIGURES]]

    @property
    def _has_scores(self) -> bool:
        return any(name.endswith("objective/scores") for name in self.figures)

    def _value(self, name: str) -> str:
        """Return the value of the model with its interval, after the first one if there are several.

        The value is the last one. Of a held-out figure, it is that of the best weights, if these were loaded.
        """
        values, interval = self.figures[name], ""
        first, last = min(values), max(values)
        if name.startswith("eval_") and self.best_step is not None and self.best_step in values:
            last = self.best_step
        low, high = (self.figures.get(f"{name}_{end}", {}).get(last) for end in ("low", "high"))
        if low is not None and high is not None:
            interval = f" (95 %: {rounded(low)} to {rounded(high)})"
        start = f"{rounded(values[first])} at step {first}, " if first < last else ""
        return f"{start}{rounded(values[last])}{interval}" + (f" at step {last}" if start else "")


def described_inputs(configs: tuple[Any, ...], upstream: Mapping[str, Mapping[str, str]]) -> list[Input]:
    """Return the models that the options name, each by the run that made it if this store has that run.

    Args:
        configs: Dataclasses with the options of the run.
        upstream: Notes of the runs that made the models, by role.
    """
    found = []
    for option in UPSTREAM:
        named = next(filter(None, (named_models(config, option) for config in configs)), {})
        for role, path in named.items():
            run, label = find_run(upstream[role]["run_id"]) if role in upstream else None, role.replace("_", " ")
            if run is None:
                found.append(Input(label, str(path)))
            else:
                link = run_link(run.info.experiment_id, run.info.run_id)
                found.append(Input(label, f"{run.info.run_name} ({path})", link))
    return found


def run_link(experiment_id: str, run_id: str) -> str:
    """Return the address of a run's page, relative to the server."""
    return f"#/experiments/{experiment_id}/runs/{run_id}?{TRAINING_VIEW}"


def outcome(error: BaseException) -> str:
    """Return the status of a run that an exception ended."""
    if isinstance(error, KeyboardInterrupt | TerminatedError):
        return "KILLED"
    return "FINISHED" if isinstance(error, SystemExit) and not error.code else "FAILED"


def sentence_of_end(status: str, step: int | None, max_steps: int, reason: str = "") -> str:
    """Return a sentence about the end of a run.

    Args:
        status: FINISHED, FAILED or KILLED.
        step: Optimiser step of the end; `None` if the run trains nothing.
        max_steps: Planned number of steps.
        reason: First line of the error.
    """
    steps = "" if step is None else f" at step {step:,} of {max_steps:,}"
    return f"{ENDS[status]}{steps}." + (f" {_plain(reason)}" if reason and status == "FAILED" else "")


def with_own_text(known: str, text: str) -> str:
    """Return a new description that keeps what a user has written: below our last line, or in place of our part."""
    before, mark, own = known.partition(LAST_LINE)
    whole = text + (own if mark else f"\n\n{before}" if before.strip() else "")
    return whole if len(whole) <= MAX_TAG_VAL_LENGTH else known


def _judge(name: str) -> str:
    return name.removesuffix("/win_rate").removeprefix("eval_")


def _linked(given: Input) -> str:
    name = _plain(given.name)
    return f"[{name}]({given.link})" if given.link else name


def _listed(rows: list[tuple[str, str]]) -> str:
    """Return a list, because MLflow shows the columns of a table without a space between them."""
    return "\n".join(f"- {name}: {value}" for name, value in rows)


def _plain(text: str) -> str:
    """Return text on one line, without secrets, in which Markdown sees no marks."""
    line = " ".join(redact(text).split())
    line = line if len(line) <= MAX_CELL else f"{line[: MAX_CELL - 1]}…"
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", line)
