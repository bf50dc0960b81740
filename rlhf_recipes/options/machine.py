"""Device and precision that fit this machine, for a training that chooses neither."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available
from transformers.utils.generic import strtobool


def fit_to_machine(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of device and precision that the user left out and this machine needs.

    On a CPU, bfloat16 is mostly emulated and slow, so a training computes in float32 there. So does a GPU without
    bfloat16, because float16 needs a scale of the loss.

    Args:
        options: Options by name. `None` stands for one that is not set.

    Raises:
        ValueError: If the user asks for a device or a precision that this machine does not have.
    """
    asked, bf16 = options["use_cpu"], options["bf16"]
    has_gpu = _has_gpu()
    if asked is False and not has_gpu:
        raise ValueError(
            "`use_cpu: false` asks for a GPU, and there is none here (`rlhf doctor` shows what torch sees). Leave it "
            "out: the training then uses the CPU."
        )
    has_bf16 = is_torch_bf16_gpu_available() or is_torch_xla_available()
    if bf16 and not (asked or (has_gpu and has_bf16)):
        lack = "this GPU does not have" if has_gpu else "this machine does not have, because it has no GPU"
        other = "set `fp16: true`" if has_gpu else "add `use_cpu: true` to emulate it on the CPU, which is slow"
        raise ValueError(f"`bf16: true` needs bfloat16, which {lack}. Leave it out to compute in float32, or {other}.")
    if bf16 is not None or options["fp16"] or (has_gpu and has_bf16 and not asked):
        return {"use_cpu": bool(asked)}
    return {"use_cpu": bool(asked) or not has_gpu, "bf16": False}


def said(options: Mapping[str, Any], chosen: Mapping[str, Any]) -> str | None:
    """Return a line about the options that `fit_to_machine` has chosen; `None` if it has chosen none.

    Args:
        options: Options by name, as `fit_to_machine` got them.
        chosen: Its result.
    """
    if "bf16" not in chosen:
        return None
    if options["use_cpu"]:
        return "`use_cpu` is set, so the training computes in float32 (`bf16: false`)."
    if chosen["use_cpu"]:
        return "There is no GPU here, so the training uses the CPU and float32 (`use_cpu: true`, `bf16: false`)."
    return "This GPU has no bfloat16, so the training uses float32 (`bf16: false`). `fp16: true` needs less memory."


def _has_gpu() -> bool:
    is_launched_on_cpu = strtobool(os.environ.get("ACCELERATE_USE_CPU", "false"))
    return not is_launched_on_cpu and (torch.accelerator.is_available() or is_torch_xla_available())
