"""Loading of policies and tokenizers.

Layer L2. Chooses classes, precision, quantisation and LoRA from TRL's `ModelConfig`; trains nothing.
"""

import copy
import functools
from collections.abc import Callable, Iterator
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
from trl.trainer.utils import create_model_from_path

from rlhf_recipes.configs import PPOConfig, RewardModelConfig
from rlhf_recipes.quantization import keep_unpacked, load_adapter, saved_quantization
from rlhf_recipes.reward_model import is_adapter
from rlhf_recipes.safe_loading import safe_kwargs, safe_loading


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


def take_init_kwargs(args: PPOConfig | RewardModelConfig, quantization_config: Any) -> dict[str, Any]:
    """Take the `from_pretrained` options out of a trainer's arguments: beside a loaded model TRL warns about them."""
    kwargs = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    args.model_init_kwargs = None
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


def check_policy(model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None, args: PPOConfig) -> None:
    """Check that the policy can learn as asked: the value head would hide that nothing else does.

    Raises:
        ValueError: If it is an adapter and should get another, has no parameter to train, has no adapter that a reward
            adapter could take turns with, or is quantised and cannot be sent to vLLM.
    """
    if args.reward_adapter is not None and peft_config is None and not isinstance(model, PeftModel):
        raise ValueError("`reward_adapter` needs a policy that is an adapter too: set `use_peft: true`.")
    if getattr(model, "is_quantized", False) and peft_config is None and not isinstance(model, PeftModel):
        raise ValueError("Quantised weights cannot be trained: set `use_peft: true` beside `load_in_4bit`.")
    if getattr(model, "is_quantized", False) and args.use_vllm:
        raise ValueError(
            "`use_vllm` does not go with a quantised policy: vLLM is sent merged weights, and a merge would round "
            "them anew at each rollout. Leave out `load_in_4bit`, or `use_vllm`."
        )
    if isinstance(model, PeftModel) and peft_config is not None:
        raise ValueError(
            "The policy already has an adapter, which would be trained: leave out `peft_config` (`use_peft: false`)."
        )
    if isinstance(model, PeftModel) and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "The policy's adapter is frozen: load it by `PeftModel.from_pretrained(.., is_trainable=True)`."
        )


def round_reference_adapter(model: PreTrainedModel | PeftModel) -> None:
    """Let the frozen copy of an SFT adapter begin as the policy does.

    On a quantised base TRL rounds what is trained to bfloat16, after it has taken the copy.
    """
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        reference = parameters.get(name.replace(".default.", ".ref."))
        if reference is not None and reference is not parameter:
            reference.data = parameter.data.clone()


def prepare_frozen(model: PreTrainedModel, accelerator: Accelerator) -> Any:
    """Prepare a model that is only evaluated, sharded as the policy is."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return prepare_deepspeed(model, accelerator)
    if accelerator.distributed_type == DistributedType.FSDP:
        return prepare_fsdp(model, accelerator)
    return accelerator.prepare_model(model, evaluation_mode=True)


def policy_loader(model: Any, args: PPOConfig, quantization_config: Any) -> Callable[..., Any]:
    """Return a function that gives the policy, or with `frozen=True` an independent copy of it to refer to.

    The path of an adapter gives a `PeftModel` on the base that the adapter names, quantised as when it was trained.
    """
    if not isinstance(model, str):
        keep_unpacked(model)
        return lambda frozen=False: copy.deepcopy(model).requires_grad_(False) if frozen else model
    init_kwargs = take_init_kwargs(args, quantization_config)
    base = model
    if is_adapter(model):
        base = PeftConfig.from_pretrained(model).base_model_name_or_path
        init_kwargs.setdefault("quantization_config", saved_quantization(model))

    def load(frozen: bool = False) -> PreTrainedModel | PeftModel:
        with safe_loading(model, base):
            policy = keep_unpacked(create_model_from_path(base, **safe_kwargs(init_kwargs)))
        if is_adapter(model):
            policy = PeftModel.from_pretrained(policy, model, is_trainable=True)
        return policy.requires_grad_(False) if frozen else policy

    return load
