"""Loading of policies and tokenizers.

Layer L2. Chooses classes, precision, quantisation and LoRA from TRL's `ModelConfig`; trains nothing.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from peft.utils import ModulesToSaveWrapper
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig, get_quantization_config
from trl.trainer.utils import create_model_from_path

from rlhf_recipes.configs import PPOConfig, RewardModelConfig
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


def take_init_kwargs(args: PPOConfig | RewardModelConfig, quantization_config: Any) -> dict[str, Any]:
    """Take the `from_pretrained` options out of a trainer's arguments: beside a loaded model TRL warns about them."""
    kwargs = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    args.model_init_kwargs = None
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        kwargs["device_map"] = None
    return kwargs


def load_policy(path: str, **kwargs: Any) -> PreTrainedModel | PeftModel:
    """Load a causal LM for evaluation: a plain model, or an adapter on the base that it names.

    The adapter is merged, but into a quantised base, where rounding would change the policy.

    Args:
        path: Directory or Hub name.
        kwargs: Passed on to `from_pretrained`; float32 unless they say otherwise.
    """
    kwargs.setdefault("dtype", "float32")
    if not is_adapter(path):
        return AutoModelForCausalLM.from_pretrained(path, **kwargs)
    base = AutoModelForCausalLM.from_pretrained(PeftConfig.from_pretrained(path).base_model_name_or_path, **kwargs)
    model = PeftModel.from_pretrained(base, path)
    return model if "quantization_config" in kwargs else model.merge_and_unload()


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


def add_to_modules_to_save(model: PeftModel, name: str) -> None:
    """Make the module `name` of a `PeftModel`'s base part of its active adapter: trained, saved, switched with it."""
    base, adapter = model.get_base_model(), model.active_adapter
    setattr(base, name, ModulesToSaveWrapper(getattr(base, name), adapter))
    model.peft_config[adapter].modules_to_save = sorted({*(model.peft_config[adapter].modules_to_save or []), name})


def check_policy(model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None) -> None:
    """Check that the policy can learn as asked: the value head would hide that nothing else does.

    Raises:
        ValueError: If it is an adapter and should get another, or has no parameter to train.
    """
    if isinstance(model, PeftModel) and peft_config is not None:
        raise ValueError(
            "The policy already has an adapter, which would be trained: leave out `peft_config` (`use_peft: false`)."
        )
    if isinstance(model, PeftModel) and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "The policy's adapter is frozen: load it by `PeftModel.from_pretrained(.., is_trainable=True)`."
        )


def policy_loader(model: Any, args: PPOConfig, quantization_config: Any) -> Callable[..., Any]:
    """Return a function that gives the policy, or with `frozen=True` an independent copy of it to refer to.

    The path of an adapter gives a `PeftModel` on the base that the adapter names.
    """
    if not isinstance(model, str):
        return lambda frozen=False: copy.deepcopy(model).requires_grad_(False) if frozen else model
    init_kwargs = take_init_kwargs(args, quantization_config)
    if is_adapter(model):
        base = PeftConfig.from_pretrained(model).base_model_name_or_path
        return lambda: PeftModel.from_pretrained(create_model_from_path(base, **init_kwargs), model, is_trainable=True)
    return lambda frozen=False: create_model_from_path(model, **init_kwargs).requires_grad_(not frozen)
