"""Loading of policies and tokenizers.

Layer L2. Chooses classes, precision, quantisation and LoRA from TRL's `ModelConfig`; trains nothing.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import ModulesToSaveWrapper
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig, get_quantization_config
from trl.trainer.utils import create_model_from_path

from rlhf_recipes.configs import PPOConfig
from rlhf_recipes.reward_model import is_adapter


def load_tokenizer(path: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer; one without a padding token pads with its EOS token."""
    tokenizer = AutoTokenizer.from_pretrained(path, **kwargs)
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
    }
    return {name: value for name, value in kwargs.items() if value is not None}


def load_policy(path: str, dtype: str | torch.dtype = "float32") -> PreTrainedModel:
    """Load a causal LM for evaluation: a plain model, or an adapter merged into the base that it names."""
    if not is_adapter(path):
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    base = AutoModelForCausalLM.from_pretrained(PeftConfig.from_pretrained(path).base_model_name_or_path, dtype=dtype)
    return PeftModel.from_pretrained(base, path).merge_and_unload()


def add_to_modules_to_save(model: PeftModel, name: str) -> None:
    """Make the module `name` of a `PeftModel`'s base part of its active adapter: trained, saved, switched with it."""
    base, adapter = model.get_base_model(), model.active_adapter
    setattr(base, name, ModulesToSaveWrapper(getattr(base, name), adapter))
    model.peft_config[adapter].modules_to_save = sorted({*(model.peft_config[adapter].modules_to_save or []), name})


def policy_loader(model: Any, args: PPOConfig, quantization_config: Any) -> Callable[..., Any]:
    """Return a function that gives the policy, or with `frozen=True` an independent copy of it to refer to."""
    if not isinstance(model, str):
        return lambda frozen=False: copy.deepcopy(model).requires_grad_(False) if frozen else model
    init_kwargs = dict(args.model_init_kwargs or {})
    args.model_init_kwargs = None  # used up here; TRL warns about it beside an instance
    if quantization_config is not None:
        init_kwargs["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        init_kwargs["device_map"] = None
    init_kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    return lambda frozen=False: create_model_from_path(model, **init_kwargs).requires_grad_(not frozen)
