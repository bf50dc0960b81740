"""Loading of policies and tokenizers.

Chooses classes, precision, quantisation and LoRA from TRL's `ModelConfig`; trains nothing.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import PeftConfig, PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl import ModelConfig, get_quantization_config
from trl.models import prepare_deepspeed, prepare_fsdp

from rlhf_recipes.models.quantization import keep_unpacked, load_adapter, saved_quantization
from rlhf_recipes.models.reward_model import is_adapter
from rlhf_recipes.models.safe_loading import safe_kwargs, safe_loading


def load_tokenizer(path: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer; one without a padding token pads with its EOS token."""
    with safe_loading(path):
        tokenizer = AutoTokenizer.from_pretrained(path, **{"trust_remote_code": False, **kwargs})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def model_init_kwargs(model_args: ModelConfig) -> dict[str, Any]:
    """Return the `from_pretrained` options that TRL's `ModelConfig` stands for."""
    kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "quantization_config": get_quantization_config(model_args),
        "use_safetensors": True,
    }
    return {name: value for name, value in kwargs.items() if value is not None}


def from_pretrained_kwargs(args: Any, quantization_config: Any) -> dict[str, Any]:
    """Return the `from_pretrained` options that a trainer's arguments stand for.

    Args:
        args: `PPOConfig` or `RewardModelConfig`.
        quantization_config: For bitsandbytes; `None` for none.
    """
    kwargs = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        kwargs["device_map"] = None
    return kwargs


def load_policy(
    path: str, *, base: str | None = None, base_quantization: BitsAndBytesConfig | None = None, **kwargs: Any
) -> PreTrainedModel | PeftModel:
    """Load a causal LM for evaluation or export: a plain model, or an adapter on the base that it names.

    The adapter is merged into its base: into a dequantised copy if it was trained on a 4-bit one, because that is what
    it was trained to correct. Only with a `quantization_config` does the base stay quantised, the adapter beside it.

    Args:
        path: Directory or Hub name.
        base: Directory or Hub name of an adapter's base. Default: what the adapter names.
        base_quantization: Round the weights as a quantised base does, and dequantise them: a policy that was trained
            on such a base started from these. An adapter that was trained on one needs no telling.
        kwargs: Passed on to `from_pretrained`; float32 unless they say otherwise.
    """
    kwargs.setdefault("dtype", "float32")
    stays_quantized = "quantization_config" in kwargs
    rounding = (saved_quantization(path) if is_adapter(path) else None) or base_quantization
    kwargs.setdefault("quantization_config", rounding)
    base_path = base or PeftConfig.from_pretrained(path).base_model_name_or_path if is_adapter(path) else path
    with safe_loading(path, base_path):
        model = keep_unpacked(AutoModelForCausalLM.from_pretrained(base_path, **safe_kwargs(kwargs)))
    if stays_quantized:
        return load_adapter(model, path) if is_adapter(path) else model
    if rounding is not None:
        model = model.dequantize()
    return PeftModel.from_pretrained(model, path).merge_and_unload() if is_adapter(path) else model


@contextmanager
def only_active_adapter(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Let a `PeftModel` save its active adapter alone, the policy's, whoever calls `save_pretrained`."""
    if not isinstance(model, PeftModel):
        yield
        return
    model.save_pretrained = functools.partial(model.save_pretrained, selected_adapters=[model.active_adapter])
    try:
        yield
    finally:
        del model.save_pretrained


def check_output_dir(directory: str, *, adapter: bool) -> None:
    """Check that a run will not write weights of one kind beside weights of the other, which then win on loading.

    Args:
        directory: Where the run saves.
        adapter: Whether it saves an adapter, or a whole model.

    Raises:
        ValueError: If the directory holds the other kind.
    """
    kinds = {True: "an adapter", False: "a whole model"}
    patterns = {True: "adapter_model*", False: "model*.safetensors"}
    if any(Path(directory).glob(patterns[not adapter])):
        raise ValueError(
            f"`output_dir` {directory} holds {kinds[not adapter]}, and this run would save {kinds[adapter]} beside "
            "it. Choose another `output_dir`, or move what is there."
        )


def prepare_frozen(model: PreTrainedModel, accelerator: Accelerator) -> Any:
    """Prepare a model that is only evaluated, sharded as the policy is."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return prepare_deepspeed(model, accelerator)
    if accelerator.distributed_type == DistributedType.FSDP:
        return prepare_fsdp(model, accelerator)
    return accelerator.prepare_model(model, evaluation_mode=True)
