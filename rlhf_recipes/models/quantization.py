"""4-bit bases: their quantisation is saved beside the adapter, and bitsandbytes cannot repack them on a CPU."""

import functools
import json
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import load_peft_weights
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

QUANTIZATION_FILE = "quantization_config.json"


def keep_unpacked(model: Any) -> Any:
    """Keep the 4-bit weights of a model as they are on the CPU, in place. Do nothing for any other model.

    On processors with AVX512-BF16, bitsandbytes repacks the weights in the first forward without gradient, for a
    kernel that has no backward. The gradients of every later step are then wrong (cosine .60 with the right ones), and
    so are merged or saved weights.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def load_adapter(base: PreTrainedModel, directory: str) -> PeftModel:
    """Load an adapter onto a quantised base, in the precision in which it was trained and saved."""
    model = PeftModel.from_pretrained(base, directory)
    restore_precision(model, load_peft_weights(directory, device="cpu"), "default")
    return model


def restore_precision(model: PeftModel, saved: dict[str, Tensor], adapter: str) -> None:
    """Give an adapter the precision of its saved weights.

    PEFT would widen it to float32. On a quantised base it was trained in bfloat16, so the products and the logits
    would differ from those in training.
    """
    for name, parameter in model.named_parameters():
        weight = saved.get(name.replace(f".{adapter}.", "."))
        if weight is not None and f".{adapter}." in name:
            parameter.data = parameter.data.to(weight.dtype)


def keep_adapter_precision(model: nn.Module) -> None:
    """Let the adapters of a model keep their precision when a checkpoint is loaded into them, in place.

    PEFT would widen them to float32. The products of a resumed run would then differ from those before the stop.
    """
    if isinstance(model, PeftModel):
        model.load_adapter = functools.partial(model.load_adapter, autocast_adapter_dtype=False)


def quantization_of(model: nn.Module) -> BitsAndBytesConfig | None:
    """Return the bitsandbytes quantisation of a model's base, or `None`."""
    config = getattr(model.config, "quantization_config", None)
    return config if isinstance(config, BitsAndBytesConfig) else None


def save_quantization(model: nn.Module, directory: str | Path) -> None:
    """Write the quantisation of an adapter's base beside the adapter, whose own files do not name it.

    For a base without quantisation, remove a file that an earlier run left.
    """
    path = Path(directory, QUANTIZATION_FILE)
    config = quantization_of(model)
    if config is not None:
        path.write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
    else:
        path.unlink(missing_ok=True)


def saved_quantization(directory: str | Path) -> BitsAndBytesConfig | None:
    """Return the quantisation of the base on which the adapter in `directory` was trained, or `None`."""
    path = Path(directory, QUANTIZATION_FILE)
    return BitsAndBytesConfig(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
