"""4-bit bases: remembered beside the adapter that was trained on one, and kept from harm on the CPU."""

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
    """Keep the 4-bit weights of a model on the CPU as they are, in place; any other model is left alone.

    On processors with AVX512-BF16, bitsandbytes repacks them in the first forward without gradient, for a kernel that
    has no backward: the gradients of every later step are then wrong (cosine .60 with the right ones), and so is what
    is merged or saved.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def load_adapter(base: PreTrainedModel, directory: str) -> PeftModel:
    """Put an adapter on a quantised base, in the precision in which it was trained and saved."""
    model = PeftModel.from_pretrained(base, directory)
    restore_precision(model, load_peft_weights(directory, device="cpu"), "default")
    return model


def restore_precision(model: PeftModel, saved: dict[str, Tensor], adapter: str) -> None:
    """Give an adapter the precision of its saved weights.

    PEFT widens it to float32; on a quantised base, where it was trained in bfloat16, the products, and so the logits,
    would not be those of training.
    """
    for name, parameter in model.named_parameters():
        weight = saved.get(name.replace(f".{adapter}.", "."))
        if weight is not None and f".{adapter}." in name:
            parameter.data = parameter.data.to(weight.dtype)


def keep_adapter_precision(model: nn.Module) -> None:
    """Let the adapters of a model keep their precision when a checkpoint is loaded into them, in place.

    PEFT would widen them to float32, and a resumed run would go on with other products than it stopped with.
    """
    if isinstance(model, PeftModel):
        model.load_adapter = functools.partial(model.load_adapter, autocast_adapter_dtype=False)


def quantization_of(model: nn.Module) -> BitsAndBytesConfig | None:
    """Return how the base of a model is quantised by bitsandbytes, if it is."""
    config = getattr(model.config, "quantization_config", None)
    return config if isinstance(config, BitsAndBytesConfig) else None


def save_quantization(model: nn.Module, directory: str | Path) -> None:
    """Write how the base of an adapter is quantised beside the adapter, which does not say; nothing if it is not."""
    path = Path(directory, QUANTIZATION_FILE)
    config = quantization_of(model)
    if config is not None:
        path.write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
    else:
        path.unlink(missing_ok=True)  # of an earlier run


def saved_quantization(directory: str | Path) -> BitsAndBytesConfig | None:
    """Return how the base of the adapter in `directory` was quantised when it was trained, if it was."""
    path = Path(directory, QUANTIZATION_FILE)
    return BitsAndBytesConfig(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
