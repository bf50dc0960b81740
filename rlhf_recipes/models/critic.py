"""Attach a value head to a causal LM, save it and load it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from peft.utils.integrations import gather_params_ctx
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from rlhf_recipes.algorithm.value_head import ValueHead

VALUE_HEAD_NAME = "value_head"
VALUE_HEAD_FILE = "value_head.safetensors"


def causal_lm(model: PreTrainedModel | PeftModel) -> Any:
    """Return the causal LM inside a `PeftModel`, and any other model as it is."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw new weights from a seed inside, the same on every rank. The random state outside does not change."""
    with torch.random.fork_rng(devices=[]):  # `torch.manual_seed` would also seed every GPU
        torch.default_generator.manual_seed(seed)
        yield


def attach_value_head(
    model: PreTrainedModel | PeftModel, directory: str, *, head_size: int | None, activation: str, seed: int
) -> None:
    """Give a causal LM a value head: the one saved in `directory`, or a new one, the same on every rank.

    Call this after PEFT, which would otherwise adapt the head's layers too. The head becomes part of the active
    adapter: it is trained, saved and switched with it. Call this before an accelerator wraps the model.
    """
    base = causal_lm(model)
    with seeded(seed):
        head = ValueHead(base.config.get_text_config().hidden_size, head_size, activation)
    load_value_head(head, directory)
    head.to(base.device)
    if is_deepspeed_zero3_enabled():  # it puts all trained weights into one buffer, in one precision
        head.to(next(parameter.dtype for parameter in model.parameters() if parameter.requires_grad))
    setattr(base, VALUE_HEAD_NAME, head)
    if isinstance(model, PeftModel):
        setattr(base, VALUE_HEAD_NAME, ModulesToSaveWrapper(head, model.active_adapter))
        adapter_config = model.peft_config[model.active_adapter]
        adapter_config.modules_to_save = sorted({*(adapter_config.modules_to_save or []), VALUE_HEAD_NAME})


@contextmanager
def without_value_head(model: nn.Module) -> Iterator[None]:
    """Remove the head from a model and its PEFT configuration while a plain policy is saved."""
    owner = next((m for m in model.modules() if VALUE_HEAD_NAME in m._modules), None)
    adapter_configs = getattr(model, "peft_config", {}).values()
    saved_modules = [adapter_config.modules_to_save for adapter_config in adapter_configs]
    head = owner._modules.pop(VALUE_HEAD_NAME) if owner is not None else None
    for adapter_config in adapter_configs:
        kept = [name for name in adapter_config.modules_to_save or [] if name != VALUE_HEAD_NAME]
        adapter_config.modules_to_save = kept or None
    try:
        yield
    finally:
        for adapter_config, modules in zip(adapter_configs, saved_modules, strict=True):
            adapter_config.modules_to_save = modules
        if owner is not None:
            owner._modules[VALUE_HEAD_NAME] = head


def trained_value_head(model: nn.Module) -> ValueHead:
    """Return the head that is trained: under PEFT, the adapter's copy and not the frozen original."""
    heads = (module for module in model.modules() if isinstance(module, ValueHead))
    return next(head for head in heads if all(parameter.requires_grad for parameter in head.parameters()))


def save_value_head(model: nn.Module, directory: str | Path, *, should_save: bool = True) -> None:
    """Write the trained head beside a policy that was saved without it. Every rank must call this.

    Args:
        model: Policy with whole or sharded parameters (ZeRO-3, FSDP2).
        directory: Directory of the saved policy.
        should_save: Whether this rank writes.
    """
    head = trained_value_head(model)
    with gather_params_ctx(list(head.parameters())):
        state: dict[str, Any] = get_model_state_dict(head, options=StateDictOptions(full_state_dict=True))
        if should_save:
            save_file({name: x.float().contiguous() for name, x in state.items()}, Path(directory, VALUE_HEAD_FILE))


def load_value_head(head: ValueHead, directory: str | Path) -> bool:
    """Load the head that `save_value_head` wrote, and return whether there was one.

    A model that was not loaded from a directory has the directory "" and no saved head.

    Raises:
        ValueError: If the saved head's size is not the run's `value_head_size`.
    """
    path = Path(directory, VALUE_HEAD_FILE)
    if not directory or not path.is_file():
        return False
    state = load_file(path)
    if state["hidden.weight"].shape != head.hidden.weight.shape:
        raise ValueError(
            f"The value head in {directory} has shape {tuple(state['hidden.weight'].shape)}, and this run's head has "
            f"shape {tuple(head.hidden.weight.shape)}. Set `value_head_size` to {state['hidden.weight'].size(0)}."
        )
    head.load_state_dict(state)
    return True
