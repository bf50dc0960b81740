"""Switch off the dropout that is no `nn.Dropout`, which TRL's `disable_dropout` does not find."""

import copy
from typing import Any

from peft import PeftModel
from torch import nn

from rlhf_recipes.models.critic import causal_lm


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability of a causal LM or classifier to zero, in place.

    Many architectures keep a probability as a number (`attention_dropout` of Llama, `residual_dropout` of StarCoder2).
    Others read it from their configuration in each forward (Falcon, GPT-J): their layers get a copy, because the
    model saves its configuration with the weights.
    """
    root = causal_lm(model)
    copies: dict[int, Any] = {}  # by the identity of the configuration
    for module in root.modules():
        for name in _probabilities(vars(module)):
            setattr(module, name, 0.0)
        config = vars(module).get("config")
        if config is None or module is root:
            continue
        if found := _probabilities(vars(config)):
            copies.setdefault(id(config), _with_zeros(config, found))
            module.config = copies[id(config)]


def dropouts(model: nn.Module) -> dict[str, float]:
    """Return the dropout probabilities of a model that are not zero, by the name of the attribute.

    Only the active adapter counts: a reward adapter is never run in training mode.
    """
    found: dict[str, float] = {}
    active = getattr(model, "active_adapter", None) if isinstance(model, PeftModel) else None
    for name, module in model.named_modules():
        is_idle = ".lora_dropout." in name and not name.endswith(f".{active}")
        if isinstance(module, nn.Dropout) and module.p > 0 and not is_idle:
            found["dropout"] = module.p
        found |= _probabilities(vars(module))
        if (config := vars(module).get("config")) is not None and module is not causal_lm(model):
            found |= _probabilities(vars(config))
    return found


def _probabilities(attributes: dict[str, Any]) -> dict[str, float]:
    """Return the attributes that are dropout probabilities (`dropout`, `resid_pdrop`, `layerdrop`, ..)."""
    return {name: x for name, x in attributes.items() if "drop" in name and isinstance(x, float) and 0 < x <= 1}


def _with_zeros(config: Any, names: dict[str, float]) -> Any:
    quiet = copy.copy(config)
    for name in names:
        setattr(quiet, name, 0.0)
    return quiet
