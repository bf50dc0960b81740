"""TRL 1.12's PPO in `benchmarks/league.py`: the budget of the other methods, and the options that the league sends."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, HfArgumentParser

ROOT = Path(__file__).parents[1]
TRL_1_12_PATH = ROOT / "build" / "trl-1.12"
sys.path.append(str(ROOT / "benchmarks"))

from instruction_base import as_arguments  # noqa: E402
from league import Cell, methods_of, options_of  # noqa: E402
from league_methods import METHODS, TRL_1_12, WORLDS  # noqa: E402
from league_trl_1_12 import Run, batch_options  # noqa: E402


def budget(per_device_train_batch_size, gradient_accumulation_steps, num_mini_batches, num_ppo_epochs, total_episodes):
    """Walk through the loops of TRL 1.12, and return its completions, optimiser steps and completions per step."""
    batch = per_device_train_batch_size * gradient_accumulation_steps
    rollouts, mini_batch = math.ceil(total_episodes / batch), batch // num_mini_batches
    passes = 0
    for _ in range(rollouts * num_ppo_epochs):
        for _ in range(0, batch, mini_batch):
            passes += len(range(0, mini_batch, per_device_train_batch_size))
    steps = passes // gradient_accumulation_steps
    return rollouts * batch, steps, rollouts * num_ppo_epochs * batch // steps


def test_trl_1_12_has_the_budget_of_the_other_methods():
    assert budget(**batch_options(60)) == (1_920, 60, 64)
    assert budget(**batch_options(4)) == (128, 4, 64)
    with pytest.raises(ValueError, match="62 optimiser steps are no multiple of the 4 of a rollout"):
        batch_options(62)


def test_options_that_look_equal_have_another_budget():
    options = batch_options(60) | {"per_device_train_batch_size": 64}
    assert budget(**options)[1] == 120
    assert budget(**options | {"gradient_accumulation_steps": 2})[1] == 30


def test_trl_1_12_understands_the_options_of_the_league(tmp_path):
    world, method = WORLDS["quickstart"], METHODS[TRL_1_12]
    cell = Cell(world, method, 1, 3, tmp_path, tmp_path / "trl")
    (run,) = HfArgumentParser(Run).parse_args_into_dataclasses(as_arguments(options_of(cell)))
    assert run.model_name_or_path == str(cell.base / "sft")
    assert run.dataset_name == str(cell.base / "prompts")
    assert run.output_dir == str(cell.folder / "run")
    assert (run.seed, run.max_steps, run.save_steps) == (3, world.steps, world.steps // 4)
    assert run.max_completion_length == world.max_completion_length
    assert run.kl_coef == method.settings[1]["kl_coef"]


def test_trl_1_12_is_left_out_where_it_is_not_installed(tmp_path):
    assert methods_of(["rloo", TRL_1_12], tmp_path) == ["rloo"]
    (tmp_path / "trl" / "experimental" / "ppo").mkdir(parents=True)
    assert methods_of(["rloo", TRL_1_12], tmp_path) == ["rloo", TRL_1_12]


@pytest.mark.tiny
@pytest.mark.skipif(not TRL_1_12_PATH.is_dir(), reason="TRL 1.12 is not in build/trl-1.12")
def test_trl_1_12_takes_the_steps_that_it_may_take_and_saves_within_a_rollout(tmp_path):
    tokenizer = tiny.tokenizer()
    policy = tiny.save(tiny.policy(tokenizer), tmp_path / "sft")
    reward_model = tiny.save(tiny.reward_model(tokenizer), tmp_path / "reward_model")
    tiny.write_splits(tiny.prompts(count=400), tmp_path / "prompts")  # the last of three batches always has a step
    options = {"model_name_or_path": policy, "reward_model_path": reward_model, "dataset_name": tmp_path / "prompts"}
    options |= {"output_dir": tmp_path / "out", "run_name": "", "seed": 0, "max_steps": 8, "save_steps": 2}
    options |= {"max_completion_length": 4, "kl_coef": 0.1, "report_to": "none"}
    script = ROOT / "benchmarks" / "league_trl_1_12.py"
    environment = {**os.environ, "PYTHONPATH": str(TRL_1_12_PATH)}
    subprocess.run(
        [sys.executable, str(script), *as_arguments(options)], env=environment, check=True
    )  # it fails at another count

    folders = [tmp_path / "sft", *(tmp_path / "out" / f"checkpoint-{step}" for step in (2, 4, 6, 8))]
    heads = [AutoModelForCausalLM.from_pretrained(folder).lm_head.weight for folder in folders]
    assert not any(torch.equal(a, b) for a, b in zip(heads, heads[1:], strict=False))
    assert not (tmp_path / "out" / "checkpoint-10").exists()
