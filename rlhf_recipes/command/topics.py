"""The options of a recipe by their owner and their topic."""

import dataclasses
import json
from collections.abc import Iterable
from enum import Enum
from fnmatch import fnmatchcase
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from rlhf_recipes.options.learning_rates import rates_of

# Names and patterns of names. The first topic that matches counts; the order is that of the list.
TOPICS = {
    "Method": "method",
    "Model": "model_name_or_path model_* dtype attn_* trust_remote_code baseline_path use_cache",
    "Data": """
        dataset_* response_separator shuffle_dataset max_length truncation_mode packing* padding_free eval_packing
        *_only_loss remove_unused_columns label_names length_column_name chat_template* eos_token pad_token num_prompts
        label_file pair_answers only_agreed earlier_pairs category_column
        """,
    "LoRA": "use_peft lora_* use_rslora use_dora",
    "4-bit and 8-bit weights": "load_in_* bnb_* use_bnb_*",
    "Reward models, reward functions and judges": """
        reward_* best_of* judge_* pairwise_judges failed_rewards critic_dataset_name critic_pairs missing_eos_penalty
        truncated_completions step_* train_on_last_step_only center_rewards_coefficient l2_coefficient
        score_heads remove_length_bias
        """,
    "KL to the reference": "kl_* target_kl beta *ref_model* use_bias_correction_kl precompute_ref_*",
    "Rollouts and sampling": """
        num_generations* max_completion_length steps_per_generation generation_* temperature num_samples top_p top_k
        min_p repetition_penalty cache_implementation max_tool_* *transformers_continuous* use_transformers_paged
        """,
    "vLLM": "use_vllm vllm_*",
    "Policy update": """
        num_iterations epsilon epsilon_high delta loss_type importance_sampling_level gamma lam whiten_advantages
        group_baseline scale_rewards max_update_kl disable_dropout *entropy* sapo_* router_aux_loss_coef loss_weights
        ld_alpha f_*divergence* label_smoothing use_weighting discopop_tau vespo_* off_policy_*
        mask_truncated_completions multi_objective_*
        """,
    "Critic": "critic* value_* vf_coef cliprange_value",
    "Guard": "max_kl max_skipped_steps max_rollbacks rollback_* check_numerics",
    "Length, batches and learning rate": """
        num_train_epochs max_steps per_device_train_* gradient_accumulation_steps batch_size learning_rate
        lr_scheduler_* warmup_* optim* weight_decay adam_* max_grad_norm seed data_seed label_smoothing_factor
        neftune_* average_tokens_*
        """,
    "Evaluation during training": """
        eval_* per_device_eval_* metric_for_best_model greater_is_better load_best_model_at_end
        early_stopping_patience stop_on_decline prediction_loss_only batch_eval_metrics
        """,
    "Output, checkpoints and resume": """
        output_dir run_name save_* resume_* restore_* allow_changes_* preflight_only overwrite
        ignore_data_skip enable_jit_checkpoint num_shown
        """,
    "MLflow": "tracking* experiment* parent_run_id log_model registered_* runs logged_samples",
    "Logs and other trackers": "log_* logging_* report_to project trackio_* disable_tqdm num_comp*",
    "Precision, memory and speed": """
        bf16* fp16* tf32 cast_* *gradient_checkpointing* *activation_* torch_* *liger* use_cpu auto_find_* dataloader_*
        """,
    "Several processes": "ddp_* ds3_* fsdp* deepspeed local_rank accelerator_* parallelism_*",
    "Server": "host port max_request_bytes max_waiting max_tokens",
    "Hub": "push_to_hub* hub_*",
}
OTHER = "Other"
OWNERS = {"rlhf_recipes": "rlhf_recipes", "trl": "TRL", "transformers": "transformers"}
_KINDS = {bool: "true or false", int: "whole number", float: "number", str: "text"}


class Option(NamedTuple):
    """An option as a reader sees it."""

    name: str
    default: str
    kind: str
    help: str
    owner: str
    topic: str


def options_of(kinds: Iterable[type]) -> list[Option]:
    """Return the options of a recipe: this library's first, then TRL's, then those of transformers; each by topic."""
    owners, topics = [*OWNERS.values()], [*TOPICS, OTHER]
    options = {option.name: option for kind in reversed([*kinds]) for option in _options(kind)}
    return sorted(options.values(), key=lambda option: (owners.index(option.owner), topics.index(option.topic)))


def topic_of(name: str) -> str:
    """Return the topic of an option."""
    return next((topic for topic, known in TOPICS.items() if any(fnmatchcase(name, p) for p in known.split())), OTHER)


def _options(kind: Any) -> Iterable[Option]:
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.init:
            name, text = field.name, " ".join(field.metadata.get("help", "").replace("%%", "%").split())
            default = _default(field) + _of_lora(kind, name)
            yield Option(name, default, _kind(hints[name]), text, _owner(kind, name), topic_of(name))


def _owner(kind: type, name: str) -> str:
    declared = next(base for base in kind.__mro__ if name in vars(base).get("__annotations__", {}))
    return OWNERS[declared.__module__.partition(".")[0]]


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return _yaml(field.default_factory())
    return "required" if field.default is dataclasses.MISSING else _yaml(field.default)


def _of_lora(kind: type, name: str) -> str:
    rates = rates_of(kind) if name == "learning_rate" else None
    return "" if rates is None else f" (with `use_peft`: {_yaml(rates.lora_default)})"


def _yaml(value: Any) -> str:
    """Return a value as a YAML file has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = str(value.value if isinstance(value, Enum) else value)
    return text if text.strip() else json.dumps(text)


def _kind(hint: Any) -> str:
    is_union = get_origin(hint) in (Union, UnionType)
    parts = [part for part in (get_args(hint) if is_union else (hint,)) if part is not type(None)]
    return " or ".join(dict.fromkeys(_one_kind(part) for part in parts))


def _one_kind(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " | ".join(map(str, get_args(hint)))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return " | ".join(str(choice.value) for choice in hint)
    if dict in (hint, get_origin(hint)):
        return "mapping"
    if list in (hint, get_origin(hint)) or tuple in (hint, get_origin(hint)):
        return "list"
    return _KINDS.get(hint, "text")
