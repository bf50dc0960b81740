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
from rlhf_recipes.models.critic import VALUE_HEAD_FILE
from rlhf_recipes.models.loading import load_policy

pytestmark = pytest.mark.tiny

LONGER = {"kl_controller": "adaptive", "kl_horizon": 64, "allow_changes_on_resume": True}


def _trained(tmp_path, **kwargs):
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8, **LONGER}
    trainer = tiny.ppo_trainer(tmp_path, **{**options, **kwargs})
    trainer.train()
    return trainer


def test_resuming_without_the_state_is_refused(tmp_path):
    first = _trained(tmp_path)
    checkpoint, staged = tmp_path / "checkpoint-8", tmp_path / "staged" / "checkpoint-8"
    state = json.loads((checkpoint / "ppo_state.json").read_text())
    assert state["kl_controller"] == first.kl_controller.state_dict() != {"kl_coef": first.args.kl_coef}
    assert state["reward_normalizer"] == first.reward_normalizer.state_dict()
    shutil.copytree(checkpoint, staged, ignore=shutil.ignore_patterns("ppo_state.json"))
    publish(staged, checkpoint)  # whole, like a checkpoint of another trainer
    trainer = tiny.ppo_trainer(tmp_path / "resumed", max_steps=12, **LONGER)
    with pytest.raises(FileNotFoundError, match="ppo_state.json is missing"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


def test_a_full_policy_is_saved_plain_with_its_head_beside_it(tmp_path):
    trainer = _trained(tmp_path, save_strategy="no")
    trainer.save_model(str(tmp_path / "final"))
    config = json.loads((tmp_path / "final" / "generation_config.json").read_text())
    assert config["eos_token_id"] == tiny.END_IDS, "the saved policy still stops"
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


def test_a_head_of_another_size_is_refused(tmp_path):
    trainer = _trained(tmp_path, save_strategy="no", value_head_size=16)
    trainer.save_model(str(tmp_path / "final"))
    with pytest.raises(ValueError, match="Set `value_head_size` to 16"):
        tiny.ppo_trainer(tmp_path, model=str(tmp_path / "final"))


def test_episodes_count_completions(tmp_path):
    """A rollout has 4 x 2 completions and 4 optimiser steps. The end of training logs no second value."""
    trainer = _trained(tmp_path)
    assert tiny.logged(trainer, "episode") == {step: 8 if step <= 4 else 16 for step in range(1, 9)}
    assert "episode" not in trainer.state.log_history[-1]


def test_episodes_are_not_averaged_over_the_logging_interval(tmp_path):
    trainer = _trained(tmp_path, save_strategy="no", logging_steps=8)
    assert tiny.logged(trainer, "episode") == {8: 16}
