"""A refusal of an option by a library is told from a fault."""

import pytest
import tiny
from peft import LoraConfig
from transformers import TrainingArguments

from rlhf_recipes.models.safe_loading import safe_loading
from rlhf_recipes.options.refusals import is_refusal


def _raised(function):
    with pytest.raises((ValueError, ImportError)) as caught:
        function()
    return caught.value


@pytest.mark.tiny
def test_a_library_refuses_and_its_callers_fail(tmp_path):
    assert is_refusal(_raised(lambda: TrainingArguments(str(tmp_path), logging_steps=0)))
    assert not is_refusal(_raised(lambda: int("x")))
    assert not is_refusal(ValueError("never raised"))


@pytest.mark.tiny
def test_a_refusal_in_a_constructor_names_the_option(tmp_path):
    peft = LoraConfig(target_modules=["nowhere"], task_type="SEQ_CLS")
    with pytest.raises(ValueError, match=r"arget modules .*\(`lora_target_modules`\)$"):
        tiny.reward_trainer(tmp_path, peft=peft)


@pytest.mark.tiny
@pytest.mark.parametrize("error", [ImportError("a package of the user"), ValueError("a fault"), NotImplementedError()])
def test_a_fault_in_a_constructor_keeps_its_class_and_its_place(tmp_path, monkeypatch, error):
    def broken(*args, **kwargs):
        raise error

    monkeypatch.setattr("transformers.Trainer.create_accelerator_and_postprocess", broken)
    with pytest.raises(type(error)) as caught:
        tiny.reward_trainer(tmp_path)
    assert caught.value is error


def test_a_fault_of_the_code_of_a_model_keeps_its_place(tmp_path):
    error = ValueError("a fault")
    with pytest.raises(ValueError, match="a fault") as caught, safe_loading(str(tmp_path)):
        raise error
    assert caught.value is error
