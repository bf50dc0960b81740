"""Record several stages, each of which is a process and a run of its own, under one parent run."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

from rlhf_recipes.durability.stages import start_method
from rlhf_recipes.durability.termination import signals_held, terminate
from rlhf_recipes.options.recipes import TrackingArguments, is_recorded
from rlhf_recipes.tracking.description import outcome
from rlhf_recipes.tracking.session import signals_as_exceptions
from rlhf_recipes.tracking.store import end_run, open_run


@contextmanager
def track_pipeline(
    tracking: TrackingArguments, run_name: str, seed: int, output_dir: str | None = None
) -> Iterator[list[str]]:
    """Record a parent run of several stages, each of which runs in its own process.

    MLflow also works in its own process, because a forked stage must not inherit an open store.

    Args:
        tracking: Whether and where to record.
        run_name: Name in MLflow.
        seed: Seed of all stages.
        output_dir: Directory for the note of the open run, by which the next start closes it after a SIGKILL.

    Yields:
        Command-line options that put the run of a stage under the parent. Empty without tracking.
    """
    if not is_recorded(tracking):
        yield []
        return
    status, note = "FAILED", None
    with signals_as_exceptions():
        try:
            with signals_held() as received:  # else a run could be open whose id is not known here
                note = _in_own_process(_open_pipeline, tracking, run_name, seed, output_dir)
            if received:
                terminate(received[0], None)
            yield ["--parent_run_id", note["run_id"]]
            status = "FINISHED"
        except BaseException as error:
            status = outcome(error)
            raise
        finally:
            if note is not None:
                with signals_held():
                    _in_own_process(end_run, tracking, note["run_id"], status, output_dir)


def _open_pipeline(tracking: TrackingArguments, run_name: str, seed: int, output_dir: str | None) -> dict[str, str]:
    return open_run(tracking, run_name, "pipeline", (), output_dir, seed=seed).note


def _in_own_process(function: Any, *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(start_method())) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except ValueError as error:  # raised here again, so that the recipe shows only the message
            raise ValueError(str(error)) from None
