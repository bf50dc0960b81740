"""A process that hangs keeps the others no longer than `ddp_timeout`, and they say why they end."""

import time
from pathlib import Path

import pytest
import tiny
from accelerate import PartialState
from processes import run_in_processes, wait_for
from transformers import TrainerCallback

from rlhf_recipes.durability.collectives import hangs_named, limit_collectives
from rlhf_recipes.durability.ending import leave_together

pytestmark = pytest.mark.distributed


class _Hang(TrainerCallback):
    def __init__(self, end):
        self.end = end

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            wait_for(self.end)
            raise RuntimeError("the other rank has given this one up")


def _train(rank, world_size, directory, make, options):
    """Return how long the first rank has waited for the second one, and what it said."""
    given_up = Path(directory, "given_up")
    options = options | ({"data": tiny.prompts(count=32)} if make == "ppo_trainer" else {})
    trainer = getattr(tiny, make)(directory, max_steps=3, ddp_timeout=8, use_cpu=True, **options)
    if rank == 1:
        trainer.add_callback(_Hang(given_up))
    start = time.monotonic()
    try:
        trainer.train()
    except (TimeoutError, RuntimeError) as error:
        seconds = time.monotonic() - start
        given_up.touch()
        return f"{type(error).__name__}: {error}", seconds
    return None


@pytest.mark.parametrize(
    ("make", "options"),
    [
        ("reward_trainer", {}),
        pytest.param("ppo_trainer", {"reward_timeout": 1.0, "reward_retries": 0}, marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_hangs_is_given_up_after_ddp_timeout(tmp_path, make, options):
    (message, seconds), _ = run_in_processes(_train, 2, str(tmp_path), make, options)
    assert message.startswith("TimeoutError: Another process has not answered for 8 s (`ddp_timeout`): it hangs, or")
    assert "resume_from_checkpoint: true" in message
    assert seconds < 60


def _leave(rank, world_size):
    PartialState(cpu=True)
    limit_collectives(2)
    if rank == 1:
        time.sleep(5)
        return None
    try:
        with leave_together():
            PartialState().wait_for_everyone()
    except TimeoutError as error:
        time.sleep(4)
        return str(error)
    return None


def test_a_recipe_names_a_process_that_hangs_outside_of_training():
    message = run_in_processes(_leave, 2)[0]
    assert message.startswith("Another process has not answered for 2 s (`ddp_timeout`)")
    assert "A training can raise `ddp_timeout`" in message


def test_another_error_stays_what_it_is():
    with pytest.raises(RuntimeError, match="^a bug$"), hangs_named():
        raise RuntimeError("a bug")
