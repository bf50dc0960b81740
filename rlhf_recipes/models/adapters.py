"""Adapters beside the policy's on one backbone: which weights are theirs, and copies of them."""

import torch
from peft import PeftModel
from torch import nn


def adapter_weights(policy: PeftModel, adapter: str) -> dict[str, nn.Parameter]:
    """Return the parameters of an adapter, by their name without the adapter's."""
    found = {}
    for name, parameter in policy.named_parameters():
        parts = name.split(".")  # the adapter's name is the last one where PEFT adapts an embedding
        if adapter in parts:
            found[".".join(part for part in parts if part != adapter)] = parameter
    return found


def copy_adapter(policy: PeftModel, source: str, target: str, *, dtype: torch.dtype | None = None) -> None:
    """Give the weights of an adapter to another one of the same shape, which then is frozen.

    Args:
        policy: Model with both.
        source: Name of the adapter that has the weights.
        target: Name of the adapter that gets them. Parameters that it does not have are left out.
        dtype: Precision of the copy. Default: that of the source.
    """
    copies = adapter_weights(policy, target)
    for name, parameter in adapter_weights(policy, source).items():
        if name in copies:
            copies[name].data = parameter.data.to(dtype or parameter.dtype, copy=True)
            copies[name].requires_grad_(False)
