"""Saving: a checkpoint holds the whole state, and a final save is a plain policy."""

import json
import shutil

import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tolerances import EXACT, FP32, MERGED, assert_close
from transformers import AutoModelForCausalLM

from rlhf_recipes.algorithm.value_head import ValueHead
from rlhf_recipes.durability.checkpoints import publish
from rlhf_recipes.models.critic import VALUE_HEAD_FILE, trained_value_head
from rlhf_recipes.models.loading import load_policy

pytestmark = pytest.mark.tiny

LONGER = {"kl_controller": "adaptive", "kl_horizon": 64, "allow_changes_on_resume": True}
PEFT = [pytest.param(False, id="full"), pytest.param(True, id="lora")]


def _trained(tmp_path, peft, **kwargs):
    options = {
        "save_strategy": "steps",
        "save_steps": 4,
        "kl_controller": "adaptive",
        "kl_horizon": 64,
        "max_steps": 8,
    }
    trainer = tiny.ppo_trainer(tmp_path, peft=tiny.lora() if peft else None, **{**options, **kwargs})
    trainer.train()
    return trainer


@pytest.mark.parametrize("peft", PEFT)
def test_checkpoint_restores_head_normaliser_and_controller(tmp_path, peft):
    first = _trained(tmp_path, peft)
    checkpoint = str(tmp_path / "checkpoint-8")
    state = json.loads((tmp_path / "checkpoint-8" / "ppo_state.json").read_text())
    assert state["kl_controller"] == first.kl_controller.state_dict() != {"kl_coef": first.args.kl_coef}
    assert state["reward_normalizer"] == first.reward_normalizer.state_dict()

    second = tiny.ppo_trainer(
        tmp_path / "resumed", peft=tiny.lora() if peft else None, kl_controller="adaptive", kl_horizon=64, max_steps=8
    )
    second.train(resume_from_checkpoint=checkpoint)
    assert second.reward_normalizer.state_dict() == first.reward_normalizer.state_dict()
    assert second.kl_controller.state_dict() == first.kl_controller.state_dict()
    head, restored = trained_value_head(first.model), trained_value_head(second.model)
    assert head.output.weight.abs().sum() > 0
    for name, tensor in head.state_dict().items():
        assert_close(restored.state_dict()[name], tensor, EXACT)


def test_resuming_continues_from_the_restored_state(tmp_path):
    _trained(tmp_path, peft=False)
    trainer = tiny.ppo_trainer(tmp_path / "resumed", max_steps=12, **LONGER)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert trainer.state.global_step == 12
    weights = trainer.reward_normalizer.state_dict()["weight"]
    rollouts = 12 / 4
    assert weights == pytest.approx(1 - trainer.args.reward_norm_decay**rollouts)


def test_resuming_without_the_state_is_refused(tmp_path):
    _trained(tmp_path, peft=False)
    checkpoint, staged = tmp_path / "checkpoint-8", tmp_path / "staged" / "checkpoint-8"
    shutil.copytree(checkpoint, staged, ignore=shutil.ignore_patterns("ppo_state.json"))
    publish(staged, checkpoint)  # whole, like a checkpoint of another trainer
    trainer = tiny.ppo_trainer(tmp_path / "resumed", max_steps=12, **LONGER)
    with pytest.raises(FileNotFoundError, match="ppo_state.json is missing"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


def test_a_full_policy_is_saved_plain_with_its_head_beside_it(tmp_path):
    trainer = _trained(tmp_path, peft=False, save_strategy="no")
    trainer.save_model(str(tmp_path / "final"))
    assert not [name for name in load_file(tmp_path / "final" / "model.safetensors") if "value_head" in name]
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert isinstance(trainer.model.value_head, ValueHead), "saving must not take the head off the model in training"

    follow_up = tiny.ppo_trainer(tmp_path / "follow_up", model=str(tmp_path / "final"))
    for name, tensor in trainer.model.value_head.state_dict().items():
        assert_close(follow_up.model.value_head.state_dict()[name], tensor, EXACT)


def test_an_adapter_is_saved_plain_and_merges(tmp_path):
    base = tiny.save(tiny.policy(tiny.tokenizer()), tmp_path / "base")
    trainer = tiny.ppo_trainer(tmp_path, model=base, peft=tiny.lora(), max_steps=8, learning_rate=1e-2)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    names = load_file(tmp_path / "final" / "adapter_model.safetensors")
    assert names
    assert not [name for name in names if "value_head" in name]
    assert "value_head" not in (tmp_path / "final" / "adapter_config.json").read_text()
    assert (tmp_path / "final" / VALUE_HEAD_FILE).is_file()

    ids = torch.tensor([[5, 6, 7, 8]])
    expected = trainer.model.eval()(input_ids=ids).logits
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "final")
    assert_close(loaded.eval()(input_ids=ids).logits, expected, FP32)
    assert_close(load_policy(str(tmp_path / "final")).eval()(input_ids=ids).logits, expected, MERGED)


def test_the_saved_policy_still_stops(tmp_path):
    trainer = _trained(tmp_path, peft=False, save_strategy="no")
    trainer.save_model(str(tmp_path / "final"))
    config = json.loads((tmp_path / "final" / "generation_config.json").read_text())
    assert config["eos_token_id"] == tiny.END_IDS


def test_a_head_of_another_size_is_refused(tmp_path):
    trainer = _trained(tmp_path, peft=False, save_strategy="no", value_head_size=16)
    trainer.save_model(str(tmp_path / "final"))
    with pytest.raises(ValueError, match="Set `value_head_size` to 16"):
        tiny.ppo_trainer(tmp_path, model=str(tmp_path / "final"))


def _episodes(trainer):
    return {entry["step"]: entry["episode"] for entry in trainer.state.log_history if "episode" in entry}


def test_episodes_count_completions_also_after_a_resume(tmp_path):
    """A rollout has 4 x 2 completions and 4 optimiser steps. The end of training logs no second value."""
    expected = {step: 8 if step <= 4 else 16 if step <= 8 else 24 for step in range(1, 13)}
    first = _trained(tmp_path, peft=False)
    assert _episodes(first) == {step: count for step, count in expected.items() if step <= 8}
    assert "episode" not in first.state.log_history[-1]
    trainer = tiny.ppo_trainer(tmp_path / "resumed", max_steps=12, **LONGER)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert _episodes(trainer) == expected


def test_episodes_are_not_averaged_over_the_logging_interval(tmp_path):
    assert _episodes(_trained(tmp_path, peft=False, save_strategy="no", logging_steps=8)) == {8: 16}
