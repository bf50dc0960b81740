"""Two processes agree that a number is not finite, and have saved the model before the last evaluation can fail."""

import math
from pathlib import Path

import pytest
import tiny
import torch
from processes import run_in_processes

from rlhf_recipes.durability.finite import DivergedError, all_finite

pytestmark = pytest.mark.distributed


def _agree(rank, world_size, spoiled):
    return all_finite([torch.tensor(math.inf if rank == spoiled else 1.0), torch.ones(2)])


@pytest.mark.parametrize("spoiled", [0, 1, None])
def test_one_rank_speaks_for_all(spoiled):
    assert run_in_processes(_agree, 2, spoiled) == [spoiled is None] * 2


def _train(rank, world_size, directory, infinite):
    """Return the error of a run, and whether the model was there at each evaluation."""
    trainer = tiny.reward_trainer(directory, max_steps=2, eval_strategy="steps", eval_steps=1)
    there, loop, compute_loss = [], trainer.evaluation_loop, trainer.compute_loss

    def watched(*args, **kwargs):
        there.append(Path(directory, "model.safetensors").is_file())
        trainer.accelerator.wait_for_everyone()
        return loop(*args, **kwargs)

    def spoiled(*args, **kwargs):
        loss = compute_loss(*args, **kwargs)
        if rank == 1 and infinite and trainer.state.global_step == 1 and trainer.model.training:
            return loss + math.inf
        return loss

    trainer.evaluation_loop, trainer.compute_loss = watched, spoiled
    try:
        trainer.train()
    except DivergedError as error:
        return str(error), there
    return None, there


def test_the_model_is_saved_before_the_last_evaluation(tmp_path):
    results = run_in_processes(_train, 2, str(tmp_path), False)
    assert results == [(None, [False, True])] * 2


def test_an_infinite_loss_of_one_rank_ends_both(tmp_path):
    (first, there), (second, _) = run_in_processes(_train, 2, str(tmp_path), True)
    assert first == second
    assert first.startswith("Step 2: the loss or its gradient is not finite")
    assert there == [False]
    assert not (tmp_path / "model.safetensors").exists()
