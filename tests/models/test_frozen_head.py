"""A frozen LM head on a CPU: its weights are not copied for each row, and the logits stay the same."""

import tiny
import torch
from peft import get_peft_model
from tolerances import FP32, assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_recipes.models.frozen_head import keep_head_weights_uncopied
from rlhf_recipes.models.loading import load_policy


class Operations(TorchDispatchMode):
    """Note the names of all operations inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.append(operation.overloadpacket.__name__)
        return operation(*args, **(kwargs or {}))


def last_logits(model):
    """Return the logits of the last three of eight tokens, and whether torch multiplied by row."""
    ids = torch.arange(5, 21).view(2, 8)
    with torch.no_grad(), Operations() as operations:
        logits = model.eval()(input_ids=ids, logits_to_keep=3).logits
    return logits, "bmm" in operations.names


def test_logits_stay_the_same_without_copies():
    model = tiny.policy(tiny.tokenizer()).requires_grad_(False)
    theirs, by_row = last_logits(model)
    assert by_row, "torch folds it by itself now: this module is no longer needed"
    keep_head_weights_uncopied(model)
    logits, by_row = last_logits(model)
    assert not by_row
    assert_close(logits, theirs, FP32)


def test_an_adapter_that_is_loaded_or_trained_has_no_copies(tmp_path):
    base = tiny.save(tiny.policy(tiny.tokenizer()), tmp_path / "base")
    get_peft_model(tiny.policy(tiny.tokenizer()), tiny.lora()).save_pretrained(tmp_path / "adapter")
    assert not last_logits(load_policy(str(tmp_path / "adapter"), base=base))[1]
    trainer = tiny.ppo_trainer(tmp_path / "run", peft=tiny.lora())
    assert not last_logits(trainer.model)[1]
