"""The range of each option that is a number, and the values of each option that is a choice, of all recipes.

The names are those of this library, TRL and transformers. Nobody else checks many of these ranges. A value outside of
one fails late, without the name of its option, or trains nothing.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeVar

from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Range:
    """A set of numbers, and the end of the sentence "`name` must ..."."""

    claim: str
    holds: Callable[[Any], bool]


POSITIVE = Range("be positive", lambda x: x > 0)
NOT_NEGATIVE = Range("not be negative", lambda x: x >= 0)
FINITE = Range("be finite", math.isfinite)
SHARE = Range("lie in [0, 1]", lambda x: 0 <= x <= 1)
SHARE_WITHOUT_0 = Range("lie in (0, 1]", lambda x: 0 < x <= 1)
SHARE_WITHOUT_1 = Range("lie in [0, 1)", lambda x: 0 <= x < 1)
SMOOTHING = Range("lie in [0, 0.5)", lambda x: 0 <= x < 0.5)
SEED = Range("lie in [0, 2**32)", lambda x: 0 <= x < 2**32)
PORT = Range("lie in [1, 65535]", lambda x: 0 < x < 65536)
SECONDS = Range("be positive and at most 10**9 seconds", lambda x: 0 < x <= 1e9)
LIMIT_OF_SECONDS = Range("be positive and at most 10**9 seconds (`null` for no limit)", SECONDS.holds)
RETRIES = Range("not be negative and at most 1000", lambda x: 0 <= x <= 1000)
WORKERS = Range("lie in [0, 1024]", lambda x: 0 <= x <= 1024)
WIDTH = Range("be positive and at most 65536", lambda x: 1 <= x <= 65536)
STEPS = Range("be positive, or -1 for the length of `num_train_epochs`", lambda x: x == -1 or x > 0)
RANK = Range("not be lower than -1", lambda x: x >= -1)

GROUPS = {
    POSITIVE: (
        *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "batch_size"),
        *("steps_per_generation", "generation_batch_size", "num_generations", "num_generations_eval"),
        "generation_batch_rows",
        *("num_iterations", "max_completion_length", "max_length", "num_train_epochs", "temperature"),
        *("adam_epsilon", "repetition_penalty", "lora_alpha", "delta", "vllm_max_model_length"),
        *("sapo_temperature_neg", "sapo_temperature_pos", "discopop_tau", "ref_model_sync_steps"),
        *("vllm_importance_sampling_cap", "vllm_importance_sampling_clip_max", "vllm_tensor_parallel_size"),
        *("dataloader_prefetch_factor", "torch_empty_cache_steps", "eval_accumulation_steps", "ddp_bucket_cap_mb"),
        *("dataset_num_proc", "precompute_ref_batch_size", "DPOConfig.beta"),
        *("reward_norm_clip", "target_kl", "kl_horizon", "early_stopping_patience", "cliprange_value"),
        *("critic_epochs", "critic_pairs", "max_update_kl", "max_kl", "max_skipped_steps", "best_of"),
        *("num_prompts", "num_samples", "max_request_bytes", "max_waiting", "max_tokens"),
        *("score_heads", "reward_heads_coef"),
    ),
    NOT_NEGATIVE: (
        *("learning_rate", "weight_decay", "warmup_steps", "max_grad_norm", "epsilon", "epsilon_high", "beta"),
        *("save_total_limit", "eval_delay", "neftune_noise_alpha", "top_k", "l2_coefficient", "vf_coef", "kl_coef"),
        *("center_rewards_coefficient", "router_aux_loss_coef", "entropy_coef_delta", "entropy_coef_max"),
        *("entropy_coef_min", "entropy_target", "off_policy_mask_threshold", "vllm_importance_sampling_clip_min"),
        *("vespo_k_neg", "vespo_k_pos", "vespo_lambda_neg", "vespo_lambda_pos", "max_tool_calling_iterations"),
        *("num_completions_to_print", "logged_samples", "critic_warmup_steps", "value_head_learning_rate"),
        *("max_rollbacks", "num_shown", "EvaluationArguments.temperature"),
    ),
    FINITE: (
        *("entropy_coef", "reward_weights", "loss_weights", "reward_clip_range", "missing_eos_penalty"),
        "f_alpha_divergence_coef",
    ),
    SHARE: (
        *("gamma", "lam", "value_lam", "min_p", "label_smoothing_factor", "top_entropy_quantile"),
        *("ref_model_mixup_alpha", "ld_alpha"),
    ),
    SHARE_WITHOUT_0: ("top_p", "rollback_learning_rate_factor", "vllm_gpu_memory_utilization"),
    SHARE_WITHOUT_1: ("adam_beta1", "adam_beta2", "lora_dropout", "reward_norm_decay"),
    SMOOTHING: ("label_smoothing",),
    SEED: ("seed", "data_seed"),
    PORT: ("port", "vllm_server_port", "vllm_group_port"),
    SECONDS: ("ddp_timeout", "vllm_server_timeout"),
    LIMIT_OF_SECONDS: ("reward_timeout",),
    RETRIES: ("reward_retries",),
    WORKERS: ("dataloader_num_workers",),
    WIDTH: ("lora_r", "value_head_size", "pad_to_multiple_of"),
    STEPS: ("max_steps",),
    RANK: ("local_rank",),
}
RANGES = {name: group for group, names in GROUPS.items() for name in names}
LARGEST = 2**63  # more than torch and Arrow can hold
# Intervals in steps. Nothing reads one with another strategy, so each value is right then.
INTERVALS = {"logging_steps": "logging_strategy", "save_steps": "save_strategy", "eval_steps": "eval_strategy"}
UNBOUNDED = {"max_grad_norm", "off_policy_mask_threshold"}  # infinity: no clipping, and no limit

LEVELS = ("debug", "info", "warning", "error", "critical", "passive", "detail")
CHOICES: dict[str, tuple[Any, ...]] = {
    "log_level": LEVELS,
    "log_level_replica": LEVELS,
    "bnb_4bit_quant_type": ("nf4", "fp4"),
    "lora_task_type": ("CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"),
    "dtype": ("auto", "float32", "float16", "bfloat16", None),
    "include_num_input_tokens_seen": ("all", "non_padding", "no", True, False),
    "dataloader_multiprocessing_context": ("fork", "spawn", "forkserver", None),
    "ddp_backend": ("nccl", "gloo", "mpi", "ccl", "xccl", "hccl", "cncl", "mccl", None),
    "train_sampling_strategy": ("random", "sequential", "group_by_length", "batch_rebalance"),
    "packing_strategy": ("bfd", "bfd_split", "bfd-requeue", "wrapped"),
    "truncation_mode": ("keep_start", "keep_end"),
    "vllm_mode": ("colocate", "server"),
    "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "scale_rewards": ("group", "batch", "none", True, False),
    "f_divergence_type": ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
    "cache_implementation": (*ALL_CACHE_IMPLEMENTATIONS, "paged", None),
    "GRPOConfig.importance_sampling_level": ("token", "sequence"),
    "PPOConfig.importance_sampling_level": ("token", "sequence", "prefix"),
    "SFTConfig.loss_type": ("nll", "chunked_nll", "dft"),
    "DPOConfig.loss_type": (
        *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
        *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
    ),
    "GRPOConfig.loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"),
}
EXCLUSIVE = (("load_in_4bit", "load_in_8bit"), ("fp16", "bf16"), ("fp16_full_eval", "bf16_full_eval"))


def check_values(kind: type, options: Mapping[str, Any]) -> None:
    """Check options that are numbers or choices. Texts in place of numbers and `None` pass.

    Args:
        kind: Class of the options.
        options: Options by name.

    Raises:
        ValueError: If one is out of its range. The message names it.
    """
    if options.get("output_dir") == "":
        raise ValueError("`output_dir` must name a directory, got ''.")
    for one, other in EXCLUSIVE:
        if options.get(one) and options.get(other):
            raise ValueError(f"`{one}` and `{other}` exclude each other: leave one out.")
    for name, value in options.items():
        choices = _entry(CHOICES, kind, name)
        chosen = value if isinstance(value, list) else [value]
        if choices is not None and not all(entry in choices for entry in chosen):
            allowed = ", ".join("null" if choice is None else str(choice) for choice in choices)
            raise ValueError(f"`{name}` must be one of {allowed}, got {value!r}.")
        for number in _numbers(value):
            _check_number(name, number, _range(kind, name, options))


def _numbers(value: Any) -> Iterator[Any]:
    values = value if isinstance(value, list | tuple) else [value]
    return (entry for entry in values if isinstance(entry, Real) and not isinstance(entry, bool))


def _range(kind: type, name: str, options: Mapping[str, Any]) -> Range | None:
    if name in INTERVALS:
        is_read = str(getattr(options.get(INTERVALS[name]), "value", options.get(INTERVALS[name]))) == "steps"
        return POSITIVE if is_read else None
    return _entry(RANGES, kind, name)


def _entry(table: Mapping[str, Entry], kind: type, name: str) -> Entry | None:
    own = (table.get(f"{parent.__name__}.{name}") for parent in kind.__mro__)
    return next(filter(None, own), table.get(name))


def _check_number(name: str, number: Any, limits: Range | None) -> None:
    if limits is None:
        return
    if not math.isfinite(number) and not (number == math.inf and name in UNBOUNDED):
        raise ValueError(f"`{name}` must be finite, got {number}.")
    if isinstance(number, int) and abs(number) >= LARGEST:
        raise ValueError(f"`{name}` must be lower than 2**63, got {number}.")
    if not limits.holds(number):
        raise ValueError(f"`{name}` must {limits.claim}, got {number}.")
