"""A step with a finite loss and a finite gradient can still spoil the weights. Nothing uses or saves such weights."""

import math

import pytest
import tiny
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback
from trl import SFTConfig

from rlhf_recipes.durability import checkpoints
from rlhf_recipes.durability.checkpoints import checkpoints_by_age, find_defect
from rlhf_recipes.durability.finite import DivergedError, all_finite
from rlhf_recipes.durability.state import STATE_FILE, load_ppo_state
from rlhf_recipes.trainers.rollback import Rollback, RollbackError
from rlhf_recipes.trainers.sft import SFTTrainer

pytestmark = [pytest.mark.tiny, pytest.mark.portable]
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 8}


class After(TrainerCallback):
    """Change a model or its optimizer right after some optimiser steps, each so many times."""

    def __init__(self, change, **times):
        self.change, self.times = change, {int(step[1:]): count for step, count in times.items()}
        self.seen = []

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        step = state.global_step + 1
        self.seen.append(step)
        if self.times.get(step, 0):
            self.times[step] -= 1
            self.change(model, optimizer)


@torch.no_grad()
def _spoil(model, optimizer, value=math.nan, name=""):
    weights = [weight for key, weight in model.named_parameters() if weight.requires_grad and name in key]
    weights[-1].view(-1)[-1] = value


def _spoil_moments(model, optimizer):
    state = next(reversed(optimizer.state.values()))
    state["exp_avg_sq"].view(-1)[0] = math.inf


def _sft(directory, **options):
    tok = tiny.tokenizer()
    data = Dataset.from_dict({"text": tiny.TEXTS})
    args = SFTConfig(str(directory), **{**tiny.QUIET, **SAVING, **options})
    return SFTTrainer(tiny.policy(tok), args, train_dataset=data, eval_dataset=data, processing_class=tok)


def _rm(directory, **options):
    return tiny.reward_trainer(directory, **{**SAVING, **options})


def _ppo(directory, **options):
    return tiny.ppo_trainer(directory, **{**SAVING, **options})


def _check_saved(directory):
    for path in checkpoints_by_age(directory):
        assert find_defect(path) is None
        assert all_finite(load_file(path / "model.safetensors").values())
        moments = torch.load(path / "optimizer.pt", weights_only=True)["state"].values()
        assert all_finite(x for state in moments for x in state.values())


@pytest.mark.parametrize("make", [_sft, _rm])
@pytest.mark.parametrize("step", [3, 4, 8])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_step_that_spoils_the_weights_ends_the_run(tmp_path, make, step, value):
    """Also the last step of a run, and a step after which a checkpoint or an evaluation is due."""
    trainer = make(tmp_path, eval_strategy="steps", eval_steps=4)
    trainer.add_callback(After(lambda *given: _spoil(*given, value=value), **{f"_{step}": 1}))
    good = step - 1 if step % 2 else step - 2
    message = rf"Step {step} made weights that are not finite, .*last good checkpoint is \S*checkpoint-{good}\. Lower"
    with pytest.raises(DivergedError, match=message):
        trainer.train()
    _check_saved(tmp_path)
    assert checkpoints_by_age(tmp_path)[-1].name == f"checkpoint-{good}"
    assert not any("eval_loss" in entry and entry["step"] == step for entry in trainer.state.log_history)


OPTIONS = [
    {"adam_epsilon": 0.0, "learning_rate": 1e-2},
    {"learning_rate": 1e38},
    {"weight_decay": math.nan},
    {"weight_decay": math.inf},
    {"learning_rate": math.inf},
]


@pytest.mark.parametrize("make", [_sft, _rm, _ppo])
@pytest.mark.parametrize("options", OPTIONS, ids=[" ".join(map(str, options)) for options in OPTIONS])
def test_options_that_spoil_the_weights(tmp_path, make, options):
    with pytest.raises(ValueError, match="not finite|must be (a number|finite|positive)"):
        make(tmp_path, **options).train()
    _check_saved(tmp_path)


@pytest.mark.parametrize("step", [3, 4, 8])
@pytest.mark.parametrize("name", ["", "value_head"])
def test_ppo_goes_back_before_a_step_that_spoiled_the_weights(tmp_path, step, name, caplog):
    """A rollout is four steps: after step 4 the next one would be sampled. Step 8 is the last."""
    trainer = _ppo(tmp_path)
    steps = After(lambda *given: _spoil(*given, name=name), **{f"_{step}": 1})
    trainer.add_callback(steps)
    trainer.train()
    good = step - 1 if step % 2 else step - 2
    assert steps.seen == [*range(1, step + 1), *range(good + 1, 9)]
    assert f"Going back to {tmp_path}/checkpoint-{good} with 0.5 of the learning rate" in caplog.text
    assert trainer.guard.rollback.count == 1
    assert all_finite(trainer.model.parameters())
    _check_saved(tmp_path)


def test_ppo_without_a_checkpoint_ends_with_the_cause(tmp_path):
    trainer = _ppo(tmp_path, save_strategy="no")
    trainer.add_callback(After(_spoil, _8=1))
    with pytest.raises(DivergedError, match=r"Step 8 made weights that are not finite, .*`adam_epsilon`"):
        trainer.train()


def test_weights_are_tested_in_the_warm_up_of_the_critic(tmp_path):
    trainer = _ppo(tmp_path, critic_warmup_steps=4)
    trainer.add_callback(After(lambda *given: _spoil(*given, name="value_head"), _3=1))
    trainer.train()
    assert trainer.guard.rollback.count == 1
    _check_saved(tmp_path)


@pytest.mark.parametrize("make", [_sft, _rm])
def test_a_spoiled_state_of_the_optimizer_is_not_saved(tmp_path, make):
    """Adam divides by it: its weights would stand still for ever."""
    trainer = make(tmp_path)
    trainer.add_callback(After(_spoil_moments, _3=1))
    with pytest.raises(DivergedError, match=r"Step 4: the state of the optimizer .* checkpoint is \S*checkpoint-2\. "):
        trainer.train()
    _check_saved(tmp_path)


def test_ppo_goes_back_before_a_spoiled_state_of_the_optimizer(tmp_path):
    trainer = _ppo(tmp_path)
    steps = After(_spoil_moments, _3=1)
    trainer.add_callback(steps)
    trainer.train()
    assert steps.seen == [1, 2, 3, 4, *range(3, 9)]
    _check_saved(tmp_path)


def test_ppo_goes_back_before_a_critic_that_is_not_finite(tmp_path, caplog):
    tok = tiny.tokenizer()
    trainer = _ppo(tmp_path, critic="reward", tok=tok, rewards=tiny.reward_model(tok), reward_tok=tok)
    fit, left = trainer.critic._step, [4]

    def spoiling(*batch):
        fit(*batch)
        if trainer.state.global_step in left:
            left.clear()
            trainer.critic.optimizer.state[next(trainer.critic.head.parameters())]["exp_avg"].fill_(math.inf)

    trainer.critic._step = spoiling
    trainer.train()
    assert (
        f"Step 4: the critic of `critic: reward` is not finite after it was fitted. Going back to {tmp_path}"
        in caplog.text
    )
    assert all_finite(trainer.critic.head.parameters())
    for path in checkpoints_by_age(tmp_path):
        assert all_finite(torch.load(path / "ppo_progress_0.pt", weights_only=True)["critic"]["head"].values())


# Which checkpoint is gone back to.


def test_a_checkpoint_that_failed_again_at_the_same_place_is_not_gone_back_to(tmp_path, caplog):
    trainer = _ppo(tmp_path)
    steps = After(_spoil, _5=3)
    trainer.add_callback(steps)
    trainer.train()
    assert steps.seen == [1, 2, 3, 4, 5, 5, 3, 4, 5, *range(5, 9)], "4, then 2, then the new 4"
    _check_saved(tmp_path)


def test_the_only_checkpoint_is_gone_back_to_again(tmp_path):
    trainer = _ppo(tmp_path, save_steps=4)
    steps = After(_spoil, _5=2)
    trainer.add_callback(steps)
    trainer.train()
    assert steps.seen == [1, 2, 3, 4, 5, 5, *range(5, 9)]


def test_a_checkpoint_that_led_further_may_be_gone_back_to_again(tmp_path):
    trainer = _ppo(tmp_path, save_steps=3)
    steps = After(_spoil, _4=1, _5=1)
    trainer.add_callback(steps)
    trainer.train()
    assert steps.seen == [1, 2, 3, 4, 4, 5, *range(4, 9)]


@pytest.mark.parametrize("place", ["deepspeed", "limit"])
def test_a_run_that_cannot_go_back_names_the_last_good_checkpoint(tmp_path, place, monkeypatch):
    _ppo(tmp_path, max_steps=2).train()
    monkeypatch.setattr(checkpoints, "_changed", lambda *_: pytest.fail("hashes take long, and the others wait"))
    args = tiny.ppo_config(tmp_path, max_rollbacks=0)
    rollback = Rollback(args, is_main=True, is_possible=place == "limit")
    rollback._saved_steps = {2}
    with pytest.raises(DivergedError, match=f"The last good checkpoint is {tmp_path}/checkpoint-2. Advice"):
        rollback.to_checkpoint(RollbackError("Reason.", "Advice.", 4))


@pytest.mark.parametrize(("part", "name"), [("reward_normalizer", "variance"), ("kl_controller", "kl_coef")])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_state_that_is_not_finite_is_not_resumed(tmp_path, part, name, value):
    class Part:
        def load_state_dict(self, state):
            raise AssertionError("nothing is restored")

    (tmp_path / STATE_FILE).write_text(f'{{"{part}": {{"{name}": {"NaN" if value != value else "Infinity"}}}}}')
    with pytest.raises(ValueError, match=f"{STATE_FILE} has {value} as `{name}` of `{part}`"):
        load_ppo_state(tmp_path, {part: Part()})
