"""Copies of adapters on one backbone."""

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

from rlhf_recipes.models.adapters import adapter_weights, copy_adapter
from rlhf_recipes.trainers.setup import REFERENCE_ADAPTER, keep_start_adapter

pytestmark = pytest.mark.tiny


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_a_copy_has_the_weights_of_every_kind_of_module(dtype):
    config = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], modules_to_save=["norm"])
    policy = get_peft_model(tiny.policy(tiny.tokenizer()), config)
    for weight in adapter_weights(policy, "default").values():
        torch.nn.init.normal_(weight)
    if dtype is None:
        keep_start_adapter(policy)
    else:
        policy.add_adapter(REFERENCE_ADAPTER, config)
        copy_adapter(policy, "default", REFERENCE_ADAPTER, dtype=dtype)
    own, copied = (adapter_weights(policy, name) for name in ("default", REFERENCE_ADAPTER))
    assert own.keys() == copied.keys()
    assert sum("lora_embedding" in name for name in own) == 2
    assert any("modules_to_save" in name for name in own)
    for name, weight in own.items():
        assert copied[name].dtype == (dtype or torch.float32)
        assert torch.equal(copied[name], weight.to(copied[name].dtype))
        assert copied[name].data_ptr() != weight.data_ptr()
        assert weight.requires_grad
        assert not copied[name].requires_grad
