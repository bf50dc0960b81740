"""Send the records of a training to the open MLflow run, as a callback of transformers."""

import json
from pathlib import Path
from typing import Any

from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS as LOGGED_ARTIFACTS
from transformers.integrations import MLflowCallback

from rlhf_recipes.evaluation.alarms import current_alarms
from rlhf_recipes.evaluation.samples import LATEST, SAMPLES_DIRECTORY, latest_table, tables_of_step, tables_until
from rlhf_recipes.options.ppo import PPOConfig
from rlhf_recipes.options.secrets import reason_of
from rlhf_recipes.tracking.delivery import Delivery
from rlhf_recipes.tracking.description import Description, sentence_of_end
from rlhf_recipes.tracking.lineage import write_run_file

SHOWN_TABLES = 60  # the latest ones, which the page of MLflow shows: a tag holds at most 8,000 characters


class RunCallback(MLflowCallback):
    """The callback of transformers, which sends the records of the open run by a `Delivery`."""

    def __init__(
        self,
        delivery: Delivery,
        output_dir: str,
        run: dict[str, str],
        description: Description,
        *,
        is_continued: bool = False,
    ) -> None:
        super().__init__()
        self.delivery = self._ml_flow = delivery
        self.description = description
        self._output_dir = output_dir
        self._run, self._is_continued = run, is_continued
        self._tables: list[Path] = []
        self._has_latest = False  # the table of the latest evaluation, under one name in all runs
        self._alarms: list[str] | None = None
        self._state: Any = None  # transformers' TrainerState, once training has begun
        self.has_noted = False

    def setup(self, args: Any, state: Any, model: Any) -> None:
        """Do not open a run or record parameters: `open_run` does both before training."""
        self._async_log = False  # a delivery does not wait
        self._initialized = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Send again what a killed process may not have sent: the figures and tables until the checkpoint."""
        super().on_train_begin(args, state, control, **kwargs)
        self._state = state
        self._tables = tables_until(self._output_dir, state.global_step)
        if self._is_continued and state.is_world_process_zero:
            for entry in state.log_history:
                figures = {name: value for name, value in entry.items() if name != "step"}
                self._ml_flow.log_metrics(figures, step=entry["step"])  # sends only those that the run does not have
            self._ml_flow.log_missing_artifacts(self._tables, SAMPLES_DIRECTORY)
            self._has_latest = latest_table(self._output_dir) is not None
            self._show_tables()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, model: Any = None, **kwargs: Any) -> None:
        """Send the metrics, and the tables of completions that the trainer wrote at this step."""
        if not state.is_world_process_zero:
            return
        self._ml_flow.log_metrics(logs, step=state.global_step)  # transformers would make two names one
        tables = [table for table in tables_of_step(self._output_dir, state.global_step) if table not in self._tables]
        for table in tables:
            self._ml_flow.log_artifact(table, SAMPLES_DIRECTORY)
        if any(table.name.startswith("evaluation") for table in tables):
            self.send_latest()
        if tables:
            self._tables += tables
            self._show_tables()

    def send_latest(self) -> None:
        """Send the table of the latest evaluation, which MLflow shows beside those of other runs."""
        table = latest_table(self._output_dir)
        if table is not None:
            self._ml_flow.log_artifact(table, SAMPLES_DIRECTORY)
            self._has_latest = True
            self._show_tables()

    def _show_tables(self) -> None:
        names = [LATEST] * self._has_latest + [table.name for table in self._tables[-SHOWN_TABLES:]]
        shown = [{"path": f"{SAMPLES_DIRECTORY}/{name}", "type": "table"} for name in names]
        if shown:
            self._ml_flow.set_tags({LOGGED_ARTIFACTS: json.dumps(shown)})

    def save_into(self, folder: Path) -> None:
        """Write the note of the run into a checkpoint, which a resume then cannot take for that of another run."""
        write_run_file(folder, self._run)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the note of the run for a resume, and record the alarms."""
        if state.is_world_process_zero:
            self.note()
        self.on_evaluate(args, state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the alarms of the log so far, if they have changed."""
        if isinstance(args, PPOConfig):
            alarms = current_alarms(args, state)
            if alarms != self._alarms:
                self._ml_flow.set_tags({"alarms": " ".join(alarms) or "none"})
            self._alarms = alarms

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the note of the run before the weights are saved, and record the alarms."""
        if args.load_best_model_at_end:
            self.description.best_step = state.best_global_step
        self.on_save(args, state, control)

    def describe_end(self, status: str, error: BaseException | None) -> None:
        """Send the description with the end of the run and its figures."""
        reason = reason_of(error) if isinstance(error, Exception) else ""
        step, max_steps = None, 0
        if (state := self._state) is not None:
            self.description.add_log(state.log_history)
            step, max_steps = state.global_step, state.max_steps
        self.description.alarms = self._alarms or []
        self.description.end = sentence_of_end(status, step, max_steps, reason)
        self.delivery.describe(self.description.text())

    @property
    def run_id(self) -> str:
        """Id of the run in MLflow."""
        return self._run["run_id"]

    @property
    def step(self) -> int:
        """Optimiser step of the training; 0 if the run trains nothing."""
        return 0 if self._state is None else int(self._state.global_step)

    def note(self) -> None:
        """Write the note of the run into the output directory."""
        write_run_file(self._output_dir, self._run)
        self.has_noted = True
