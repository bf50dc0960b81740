"""Print the progress of a training: a bar in a terminal, and short lines everywhere."""

import sys
import time
from typing import Any

from rich.console import Console
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from rlhf_recipes.console import duration, print_lines, visible
from rlhf_recipes.evaluation.figures import log_line


class FigureCallback(ProgressCallback):
    """Print one line per log, with the figures that matter most, and in a terminal a bar.

    Without a terminal there is no bar: its carriage returns would fill a file with one line.

    Args:
        has_bar: Whether to draw a bar.
    """

    def __init__(self, *, has_bar: bool) -> None:
        super().__init__()
        self._has_bar = has_bar
        self._began, self._first_step = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin the bar."""
        self._began, self._first_step = time.monotonic(), state.global_step
        if self._has_bar:
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if self._has_bar:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar of an evaluation."""
        if self._has_bar:
            super().on_prediction_step(args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the bar."""
        if self._has_bar:
            super().on_train_end(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Print the line of a log."""
        if not (state.is_world_process_zero and logs):
            return
        left, console = self._left(state), Console()
        width = console.width - (len(left) if console.is_terminal else 0)  # a file has room beside its 80 characters
        line = log_line(logs, state.global_step, state.max_steps, width, self._first_step) + left
        if self.training_bar is None:
            print_lines(line)
        else:
            self.training_bar.write(visible(line))

    def _left(self, state: Any) -> str:
        """Return the time that is left, where no bar shows it."""
        done, to_do = state.global_step - self._first_step, state.max_steps - state.global_step
        if self._has_bar or done <= 0 or to_do <= 0:
            return ""
        return f"  {duration((time.monotonic() - self._began) / done * to_do)} left"


def print_short_lines(trainer: Trainer) -> None:
    """Let a trainer print our lines in place of the dictionaries of transformers. A notebook keeps its table.

    A callback of the user's own, also a subclass of theirs, stays.
    """
    for callback in trainer.callback_handler.callbacks:
        if type(callback) in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)
            has_bar = type(callback) is ProgressCallback and sys.stderr.isatty()
            trainer.add_callback(FigureCallback(has_bar=has_bar))
            return
