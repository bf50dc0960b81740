"""An error that only the main process finds ends the run on every rank, with one report."""

import contextlib
import io

import pytest
import tiny
from processes import run_in_processes

from rlhf_recipes.options.recipes import PreflightArguments, TrackingArguments
from rlhf_recipes.preflight import preflight

pytestmark = pytest.mark.distributed


def _check(rank, world_size, directory):
    """Return the error and the output of this rank. Only the main process sees a full disk."""
    preflight.free_disk = lambda path: 1 if rank == 0 else 10**15
    trainer = tiny.ppo_trainer(directory, data=tiny.prompts(count=16))
    printed, refusal = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        try:
            preflight.preflight(
                trainer, trainer.train_dataset, None, PreflightArguments(), TrackingArguments(tracking=False)
            )
        except ValueError as error:
            refusal = str(error)
    return refusal, printed.getvalue()


def test_every_rank_refuses(tmp_path):
    (first, report), (second, silence) = run_in_processes(_check, 2, str(tmp_path))
    assert "One checkpoint needs" in first
    assert second == first
    assert report.startswith("Preflight: 2 processes on cpu")
    assert "8 completions" not in report, "of one rank"
    assert "16 completions (4 x 2 processes x 2 steps)" in report
    assert "Preflight" not in silence
