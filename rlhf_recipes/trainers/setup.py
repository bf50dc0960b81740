"""Check the arguments of a PPO run, and load the models, before TRL sees any of them."""

import copy
import inspect
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from accelerate import Accelerator
from datasets import Dataset
from peft import PeftConfig, PeftModel
from peft.utils import TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from rlhf_recipes.data.prompts import AnyDataset, add_separator, check_prompts_fit, first_prompts
from rlhf_recipes.data.rows import check_rendering, mend_transcripts, readable_rows
from rlhf_recipes.durability.earlier_run import check_output_dir
from rlhf_recipes.evaluation.policies import eos_token_ids
from rlhf_recipes.models.adapter_base import at_saved_revision, find_base
from rlhf_recipes.models.adapters import copy_adapter
from rlhf_recipes.models.critic import attach_value_head, causal_lm
from rlhf_recipes.models.fingerprint import is_adapter
from rlhf_recipes.models.forward import add_completion_forward
from rlhf_recipes.models.generation import check_generation_kwargs
from rlhf_recipes.models.loading import (
    from_pretrained_kwargs,
    load_causal_lm,
    load_tokenizer,
    prepare_frozen,
)
from rlhf_recipes.models.quantization import keep_adapter_precision, keep_unpacked, saved_quantization
from rlhf_recipes.models.rope import use_one_rope
from rlhf_recipes.models.safe_loading import safe_loading
from rlhf_recipes.models.vocabulary import check_padding, fit_to_adapter, inner_tokenizer, with_end_token
from rlhf_recipes.options.changes import with_changes
from rlhf_recipes.options.ppo import PPOConfig
from rlhf_recipes.preflight.policy import check_ends
from rlhf_recipes.rewards.adapter import RewardAdapterScorer
from rlhf_recipes.rewards.functions import as_reward_functions, check_reward_functions, check_used_once
from rlhf_recipes.rewards.protocol import scorer_of
from rlhf_recipes.trainers.adapter_critic import check_adapter_critic
from rlhf_recipes.trainers.numbers import given_model
from rlhf_recipes.trainers.reference_answers import check_reference_answers
from rlhf_recipes.trainers.reward_critic import check_critic
from rlhf_recipes.trainers.run_identity import facts_of_network, facts_of_run

logger = logging.getLogger(__name__)
REFERENCE_ADAPTER = "ref"  # TRL's name for the frozen copy of the adapter that training starts from


@dataclass(frozen=True)
class Parts:
    """The parts of a PPO run, checked and loaded.

    Args:
        model: Policy.
        directory: Directory or name that the policy was loaded from; "" if unknown.
        reference: Frozen copy of the policy; `None` with PEFT, where the same network serves as the reference.
        keeps_start_adapter: Whether the policy came with an adapter, whose copy is then the reference.
        reward_funcs: Scorers and functions.
        critic_dataset: Preferences for the critic, whose prompts end with the separator.
        data: Arguments of TRL's trainer: datasets of prompts that end with the separator, and the policy's tokenizer.
        facts: Facts that must be the same when the run is resumed.
        start: A short row and its log-probabilities by the policy as it was given; see `given_model`.
    """

    model: Any
    directory: str
    reference: Any
    keeps_start_adapter: bool
    reward_funcs: list[Any]
    critic_dataset: Any
    data: dict[str, Any]
    facts: dict[str, Any]
    start: Any


def prepare_parts(
    model: Any,
    reward_funcs: Any,
    args: PPOConfig,
    *,
    datasets: tuple[Any, Any, Any],
    tokenizers: tuple[Any, Any],
    peft_config: PeftConfig | None,
    quantization_config: Any,
) -> Parts:
    """Check the arguments of `PPOTrainer` against each other, and load the models that are given by a path.

    Args:
        model: Policy, or its path.
        reward_funcs: Reward models and functions.
        args: Options.
        datasets: Training prompts, evaluation prompts, and preferences for the critic.
        tokenizers: Of the policy, and of reward models that are given as instances; `None` for the models' own.
        peft_config: Adapter to add to the policy.
        quantization_config: Quantisation of a policy that is given by its path.

    Raises:
        ValueError: If data, policy, reward model or batch sizes do not fit.
    """
    (train_dataset, eval_dataset, critic_dataset), (tokenizer, reward_tokenizers) = datasets, tokenizers
    sees_images = hasattr(tokenizer, "tokenizer")  # a processor holds a tokenizer
    train_dataset = readable_rows(train_dataset, ("prompt",), "train_dataset", keep_parts=sees_images)
    eval_dataset = readable_rows(eval_dataset, ("prompt",), "eval_dataset", keep_parts=sees_images)
    critic_dataset = readable_rows(critic_dataset, ("prompt", "chosen", "rejected"), "critic_dataset")
    check_rollout_fits(train_dataset, args)
    check_generation_kwargs(args)
    check_used_once(reward_funcs, args.reward_adapter)
    load = policy_loader(model, args, quantization_config)
    policy = load()
    directory = model if isinstance(model, str) else policy.config._name_or_path
    check_policy(policy, peft_config, args)
    if args.critic == "adapter":
        check_adapter_critic(policy, peft_config, sees_images=sees_images)
    uses_peft = peft_config is not None or isinstance(policy, PeftModel)
    check_output_dir(args.output_dir, adapter=uses_peft)
    tokenizer = load_tokenizer(directory, padding_side="left") if tokenizer is None else tokenizer
    tokenizer = with_end_token(tokenizer, policy)
    check_special_ids(policy, tokenizer, args)
    train_dataset, eval_dataset = (add_separator(x, args.response_separator) for x in (train_dataset, eval_dataset))
    named = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
    if not sees_images:
        for name, dataset in named.items():
            check_rendering(dataset, ("prompt",), name, tokenizer)
    fit = (tokenizer, policy.config, args.max_completion_length)
    longest = {name: check_prompts_fit(dataset, *fit, name) for name, dataset in named.items()}

    loading = {k: v for k, v in (args.model_init_kwargs or {}).items() if k in ("dtype", "attn_implementation")}
    scorers = as_reward_functions(reward_funcs, reward_tokenizers, **loading)
    facts = facts_of_run(args, policy=model, rewards=scorers, train_dataset=train_dataset)
    if args.reward_adapter is not None:
        scorers.append(RewardAdapterScorer(args.reward_adapter))
    check_critic(args.critic, critic_dataset, [scorer_of(function) for function in scorers], tokenizer)
    check_reward_functions(scorers, dataset=train_dataset, response_separator=args.response_separator)
    check_reference_answers(args, list(map(scorer_of, scorers)), named | {"critic_dataset": critic_dataset})
    reference = None if uses_peft else load(frozen=True)
    use_one_rope([network for network in (policy, reference) if network is not None], longest["train_dataset"])
    is_larger = getattr(peft_config, "layer_replication", None) is not None  # than the model that was given
    compares = args.check_numerics and not (sees_images or is_larger)
    prompts = first_prompts(train_dataset, tokenizer) if compares else None
    return Parts(
        model=policy,
        directory=directory,
        reference=reference,
        start=None if prompts is None else given_model(policy, prompts, args),
        keeps_start_adapter=isinstance(policy, PeftModel),
        reward_funcs=scorers,
        critic_dataset=add_separator(mend_transcripts(critic_dataset), args.response_separator),
        data={**named, "processing_class": tokenizer},
        facts=facts | facts_of_network(policy, peft_config),
    )


def options_for_trl(args: PPOConfig) -> PPOConfig:
    """Return a private copy of the options, in which TRL finds no model to load and PPO's surrogate.

    The policy is loaded already (`model_init_kwargs`). One reference serves both KL terms: with `beta`, TRL would load
    another. TRL's sequence level is GSPO. Ours is a mask on PPO's surrogate: TRL asks for a mask if there is
    an `off_policy_mask_threshold`.
    """
    changes: dict[str, Any] = {"model_init_kwargs": None, "beta": 0.0, "importance_sampling_level": "token"}
    if args.importance_sampling_level != "token":
        changes["off_policy_mask_threshold"] = math.inf
    return with_changes(args, **changes)


def check_rollout_fits(dataset: AnyDataset | None, args: Any) -> None:
    """Check that a dataset fills at least one rollout; a sampler would drop the rest silently.

    Raises:
        ValueError: If it does not.
    """
    prompts = args.generation_batch_size // args.num_generations
    if dataset is None:
        return
    count = len(dataset) if isinstance(dataset, Dataset) else sum(1 for _ in islice(dataset, prompts))
    if count < prompts:
        raise ValueError(
            f"`train_dataset` has {count} prompts, fewer than one rollout's {prompts} "
            "(`per_device_train_batch_size` x processes x `steps_per_generation` / `num_generations`). Add prompts "
            "or lower one of these."
        )


def check_policy(model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None, args: Any) -> None:
    """Check that the policy can learn. Without this check only the value head might learn, and nobody would notice.

    Raises:
        ValueError: If it is an adapter and should get another, has no parameter to train, has no adapter that a reward
            adapter could take turns with, or is quantised and cannot be sent to vLLM.
    """
    asked = vars(args)  # the baselines have no reward adapter, and DPO has no vLLM
    if asked.get("reward_adapter") is not None and peft_config is None and not isinstance(model, PeftModel):
        raise ValueError("`reward_adapter` needs a policy that is an adapter too: set `use_peft: true`.")
    if getattr(model, "is_quantized", False) and peft_config is None and not isinstance(model, PeftModel):
        raise ValueError("Quantised weights cannot be trained: set `use_peft: true` beside `load_in_4bit`.")
    if getattr(model, "is_quantized", False) and asked.get("use_vllm"):
        raise ValueError(
            "`use_vllm` does not go with a quantised policy: vLLM gets merged weights, and each merge would round "
            "them again. Leave out `load_in_4bit`, or `use_vllm`."
        )
    if isinstance(model, PeftModel) and peft_config is not None:
        raise ValueError(
            "The policy already has an adapter, which would be trained: leave out `peft_config` (`use_peft: false`)."
        )
    if not (peft_config or isinstance(model, PeftModel) or any(x.requires_grad for x in model.parameters())):
        raise ValueError("The policy has no weight to train: call `model.requires_grad_(True)` first.")
    if isinstance(model, PeftModel) and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "The policy's adapter is frozen: load it by `PeftModel.from_pretrained(.., is_trainable=True)`."
        )


def check_special_ids(policy: PreTrainedModel | PeftModel, tokenizer: Any, args: Any) -> None:
    """Check that some token ends an answer, and that the policy knows the padding token.

    Raises:
        ValueError: If not.
    """
    if not eos_token_ids(policy, inner_tokenizer(tokenizer)):
        check_ends([], policy.config, args)
    check_padding(tokenizer, policy.config)


def policy_loader(model: Any, args: Any, quantization_config: Any) -> Callable[..., Any]:
    """Return a function that gives the policy, or with `frozen=True` an independent copy of it as the reference.

    The path of an adapter gives a `PeftModel` on the base that the adapter names, quantised as it was in training.
    """
    if not isinstance(model, str):
        keep_unpacked(model)
        return lambda frozen=False: copy.deepcopy(model).requires_grad_(False) if frozen else model
    kwargs = from_pretrained_kwargs(args, quantization_config)
    base = model
    if is_adapter(model):
        kwargs = at_saved_revision(model, kwargs)
        base = find_base(model, revision=kwargs.get("revision"))
        kwargs.setdefault("quantization_config", saved_quantization(model))

    def load(frozen: bool = False) -> PreTrainedModel | PeftModel:
        with safe_loading(model, base):
            policy = load_causal_lm(base, kwargs)
        if is_adapter(model):
            policy = PeftModel.from_pretrained(fit_to_adapter(policy, model), model, is_trainable=True)
        return policy.requires_grad_(False) if frozen else policy

    return load


def keep_start_adapter(policy: PeftModel) -> None:
    """Keep a frozen copy of the policy's adapter as the reference.

    Call this after TRL has rounded the weights that it trains on a quantised base: the reference starts where the
    policy does. The copy is not initialised like the original, because some initialisations (PiSSA, OLoRA) change the
    weights of the base.
    """
    if REFERENCE_ADAPTER not in policy.peft_config:  # a model that was trained before has it already
        config = policy.peft_config[policy.active_adapter]
        initialisation = {"init_lora_weights": True} if hasattr(config, "init_lora_weights") else {}
        policy.add_adapter(REFERENCE_ADAPTER, with_changes(config, **initialisation))
    for name, module in policy.named_modules():
        if isinstance(module, nn.Dropout) and name.endswith(f".{REFERENCE_ADAPTER}"):
            module.p = 0.0  # while the policy trains, its network is in training mode
    copy_adapter(policy, policy.active_adapter, REFERENCE_ADAPTER)


def add_networks(policy: PreTrainedModel | PeftModel, parts: Parts, args: PPOConfig) -> None:
    """Add the adapter of the reference, the value head and the forward that serves both to a policy."""
    if parts.keeps_start_adapter:
        keep_start_adapter(policy)
    give_bias_to_wrapped_head(policy)
    keep_adapter_precision(policy)
    if args.critic == "policy":
        size, activation = args.value_head_size, args.value_head_activation
        attach_value_head(policy, parts.directory, head_size=size, activation=activation, seed=args.seed)
    head = {"temperature": args.temperature, "cast_lm_head_to_fp32": args.cast_lm_head_to_fp32}
    into_backbone = args.value_gradient_to_backbone
    add_completion_forward(causal_lm(policy), **head, value_gradient_to_backbone=into_backbone)


def give_bias_to_wrapped_head(policy: PreTrainedModel | PeftModel) -> None:
    """Let TRL's fused LM head find the bias of a head whose embeddings PEFT trains (`trainable_token_indices`)."""
    head = causal_lm(policy).get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper):
        head.bias = head.original_module.bias


def prepare_reference(reference: PreTrainedModel, args: PPOConfig, accelerator: Accelerator) -> Any:
    """Give a frozen copy of the policy the same forward, and put it on the devices of the run."""
    reference.eval()  # no dropout: an instance may come in training mode
    head = {"temperature": args.temperature, "cast_lm_head_to_fp32": args.cast_lm_head_to_fp32}
    add_fused_lm_head(reference, **head)
    add_completion_forward(reference, **head)
    return prepare_frozen(reference, accelerator)


def takes_positions(policy: PreTrainedModel | PeftModel) -> bool:
    """Return whether a policy can be told the position of each token."""
    return "position_ids" in inspect.signature(causal_lm(policy).forward).parameters
