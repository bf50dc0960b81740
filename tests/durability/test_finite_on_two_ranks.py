"""Two processes agree that a number is not finite, and have saved the model before the last evaluation can fail."""

import math
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from processes import run_in_processes

from rlhf_recipes.durability.finite import DivergedError, all_finite
from rlhf_recipes.durability.preemption import PreemptionCallback

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


def _counted(started, name, collective, *args, **kwargs):
    started.append(name)
    return collective(*args, **kwargs)


def _collectives(rank, world_size, directory, name):
    """Return the collectives that Python starts in each optimiser step, from its backward pass on."""
    ppo = partial(tiny.ppo_trainer, data=tiny.prompts(count=16))
    trainer = {"reward_modeling": tiny.reward_trainer, "ppo": ppo}[name](directory, max_steps=3)
    trainer.add_callback(PreemptionCallback())
    started, steps = [], []
    for collective in ("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "broadcast"):
        setattr(dist, collective, partial(_counted, started, collective, getattr(dist, collective)))
    norm, end = trainer._get_grad_norm, trainer.callback_handler.on_step_end

    def begin_step(*args, **kwargs):
        started.clear()
        return norm(*args, **kwargs)

    def end_step(*args, **kwargs):
        control = end(*args, **kwargs)
        steps.append(list(started))
        return control

    trainer._get_grad_norm, trainer.callback_handler.on_step_end = begin_step, end_step
    trainer.train()
    return steps


@pytest.mark.parametrize(("name", "count"), [("reward_modeling", 2), ("ppo", 1)])
def test_a_step_costs_few_reductions(tmp_path, name, count):
    """Loss and gradient must be known before the step; after it, weights and signals are asked for together."""
    expected = [["all_reduce"] * count] * 3
    assert run_in_processes(_collectives, 2, str(tmp_path), name) == [expected] * 2
