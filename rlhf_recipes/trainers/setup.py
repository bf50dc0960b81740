"""Check, load and build what a PPO run needs."""

import copy
from collections.abc import Callable
from typing import Any

from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel
from trl.trainer.utils import create_model_from_path

from rlhf_recipes.data.prompts import AnyDataset
from rlhf_recipes.models.quantization import keep_unpacked, saved_quantization
from rlhf_recipes.models.reward_model import is_adapter
from rlhf_recipes.models.safe_loading import safe_kwargs, safe_loading
from rlhf_recipes.options.ppo import PPOConfig
from rlhf_recipes.options.reward_modeling import RewardModelConfig


def check_rollout_fits(dataset: AnyDataset | None, args: PPOConfig) -> None:
    """Check that a dataset fills at least one rollout; a sampler would drop the rest silently.

    Raises:
        ValueError: If it does not.
    """
    prompts = args.generation_batch_size // args.num_generations
    if isinstance(dataset, Dataset) and len(dataset) < prompts:
        raise ValueError(
            f"`train_dataset` has {len(dataset)} prompts, fewer than one rollout's {prompts} "
            "(`per_device_train_batch_size` x processes x `steps_per_generation` / `num_generations`). Add prompts "
            "or lower one of these."
        )


def take_init_kwargs(args: PPOConfig | RewardModelConfig, quantization_config: Any) -> dict[str, Any]:
    """Take the `from_pretrained` options out of a trainer's arguments: beside a loaded model TRL warns about them."""
    kwargs = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    args.model_init_kwargs = None
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        kwargs["device_map"] = None
    return kwargs


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
