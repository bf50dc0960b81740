"""Loading of policies and tokenizers.

TRL's `ModelConfig` decides on classes, precision, quantisation and LoRA. Nothing is trained here.
"""

import functools
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import PeftModel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl import ModelConfig, get_quantization_config
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import create_model_from_path

from rlhf_recipes.models.adapter_base import at_saved_revision, find_base
from rlhf_recipes.models.fingerprint import is_adapter
from rlhf_recipes.models.frozen_head import keep_head_weights_uncopied
from rlhf_recipes.models.quantization import keep_unpacked, load_adapter, saved_quantization
from rlhf_recipes.models.safe_loading import safe_kwargs, safe_loading
from rlhf_recipes.models.vocabulary import fit_to_adapter
from rlhf_recipes.options.packages import check_packages

# Tables of positions in transformers' models. They are layers, or buffers in GPT-J's attention.
POSITION_TABLES = re.compile(r"\b(wpe|embed_positions|positions_embed|position_embeddings?)$")

SHARDED = (DistributedType.DEEPSPEED, DistributedType.FSDP)  # weights are whole only in a forward


def mixed_precision(args: Any) -> torch.dtype | None:
    """Return the precision of autocast in a run; `None` without it."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def load_tokenizer(path: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer. Without a padding token it pads with its EOS token."""
    with safe_loading(path):
        tokenizer = AutoTokenizer.from_pretrained(path, **{"trust_remote_code": False, **kwargs})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def model_init_kwargs(model_args: ModelConfig) -> dict[str, Any]:
    """Return the `from_pretrained` options for TRL's `ModelConfig`.

    Raises:
        ValueError: If a package that they need is missing.
    """
    check_packages(vars(model_args))
    kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "quantization_config": get_quantization_config(model_args),
        "use_safetensors": True,
    }
    return {name: value for name, value in kwargs.items() if value is not None}


def from_pretrained_kwargs(args: Any, quantization_config: Any) -> dict[str, Any]:
    """Return the `from_pretrained` options for a trainer's arguments.

    Args:
        args: `PPOConfig` or `RewardModelConfig`.
        quantization_config: Quantisation by bitsandbytes. `None` stands for no quantisation.
    """
    kwargs = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        kwargs["device_map"] = None
    return kwargs


def load_causal_lm(path: str, kwargs: dict[str, Any]) -> PreTrainedModel:
    """Load a whole causal LM for training, by the class that its configuration names, as TRL does.

    Args:
        path: Directory or Hub name.
        kwargs: Options of `from_pretrained`.

    Raises:
        ValueError: See `check_causal_lm`.
    """
    model, report = create_model_from_path(path, output_loading_info=True, **safe_kwargs(path, kwargs))
    check_causal_lm(model, report["missing_keys"], path)
    return keep_unpacked(model)


def check_causal_lm(model: PreTrainedModel, missing: Iterable[str], path: str) -> None:
    """Check that a model that was just loaded is a causal LM, and that none of its weights was drawn at random.

    Raises:
        ValueError: If it is of another kind, or lacks weights.
    """
    kinds = model.config.architectures or []
    other = next((name for name in kinds if name.endswith(("Classification", "MaskedLM"))), None)
    if other or not model.can_generate() or model.config.is_encoder_decoder:
        raise ValueError(f"{path} is a {other or type(model).__name__}, and no causal LM that could be a policy.")
    check_no_weights_missing(model, missing, path)


def check_no_weights_missing(model: PreTrainedModel, missing: Iterable[str], path: str) -> None:
    """Check that no weight was drawn at random because the files lack it.

    Raises:
        ValueError: If there is one.
    """
    if names := sorted(missing):
        others = f" and {len(names) - 1} others" if len(names) > 1 else ""
        raise ValueError(
            f"{path} does not hold all weights of a {type(model).__name__}: `{names[0]}`{others} would be random. "
            "Copy or download the whole directory."
        )


def load_policy(
    path: str, *, base: str | None = None, base_quantization: BitsAndBytesConfig | None = None, **kwargs: Any
) -> PreTrainedModel | PeftModel:
    """Load a causal LM for evaluation or export: a plain model, or an adapter on the base that it names.

    The adapter is merged into its base. An adapter that was trained on a 4-bit base is merged into a dequantised copy
    of it, because it was trained to correct these weights. With a `quantization_config`, the base stays quantised and
    the adapter stays separate.

    Args:
        path: Directory or Hub name.
        base: Directory or Hub name of an adapter's base. Default: the base that the adapter names.
        base_quantization: Quantisation that rounds the weights before they are dequantised again. A policy that was
            trained on such a base started from these weights. An adapter that was trained on one does not need this.
        kwargs: Options of `from_pretrained`. The default precision is float32.
    """
    kwargs.setdefault("dtype", "float32")
    stays_quantized = "quantization_config" in kwargs
    rounding = (saved_quantization(path) if is_adapter(path) else None) or base_quantization
    kwargs.setdefault("quantization_config", rounding)
    if is_adapter(path) and base is None:
        kwargs = at_saved_revision(path, kwargs)
    base_path = find_base(path, base, kwargs.get("revision")) if is_adapter(path) else path
    with safe_loading(path, base_path):
        loaded = AutoModelForCausalLM.from_pretrained(
            base_path, output_loading_info=True, **safe_kwargs(base_path, kwargs)
        )
    model = keep_unpacked(loaded[0])
    check_causal_lm(model, loaded[1]["missing_keys"], base_path)
    if is_adapter(path):
        fit_to_adapter(model, path)
    if rounding is not None and not stays_quantized:
        model = model.dequantize()
    if is_adapter(path) and stays_quantized:
        model = load_adapter(model, path)
    elif is_adapter(path):
        model = PeftModel.from_pretrained(model, path).merge_and_unload()
    keep_head_weights_uncopied(model)
    return model


@contextmanager
def only_active_adapter(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Let every call of `save_pretrained` on a `PeftModel` save only the active adapter, the policy's."""
    if not isinstance(model, PeftModel):
        yield
        return
    model.save_pretrained = functools.partial(model.save_pretrained, selected_adapters=[model.active_adapter])
    try:
        yield
    finally:
        del model.save_pretrained


def position_limit(model: PreTrainedModel | PeftModel) -> int | None:
    """Return the number of tokens that a model can read at most; `None` if its architecture sets no limit.

    Learned positions (GPT-2, OPT) and tables of a fixed size (GPT-J, MPT) set one. With rotary positions,
    `max_position_embeddings` sets none.
    """
    sizes = [
        module.num_embeddings - getattr(module, "offset", 0)  # OPT and BioGPT leave the first rows unused
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and POSITION_TABLES.search(name)
    ]
    sizes += [len(table) for name, table in model.named_buffers() if POSITION_TABLES.search(name)]
    if model.config.model_type == "mpt":
        sizes.append(model.config.max_seq_len)
    return min(sizes, default=None)


def prepare_frozen(model: PreTrainedModel, accelerator: Accelerator) -> Any:
    """Prepare a model that is only evaluated. It is sharded like the policy.

    It is not compiled, because a policy without gradient is not: compiled code rounds in another way, and the first KL
    would not be 0.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return prepare_deepspeed(model, accelerator)
    if accelerator.distributed_type == DistributedType.FSDP:
        return prepare_fsdp(model, accelerator)
    prepared = accelerator.prepare_model(model, evaluation_mode=True)
    return accelerator.unwrap_model(prepared, keep_torch_compile=False)
