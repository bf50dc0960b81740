"""Say which options matter for what: for the group of a run, for a comparison, and for a resume."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from fnmatch import fnmatchcase
from typing import Any

from rlhf_recipes.options.secrets import public_options

# The class of an option: its name, or a beginning of names that ends with `*`. Every other option is of "outcome".
CLASSES = {
    "seed": ("seed", "data_seed"),
    "length": ("max_steps", "num_train_epochs"),
    "place and name": ("output_dir", "run_name", "report_to", "project", "trackio_*", "push_to_hub*", "hub_*"),
    "logging and saving": (
        *("log_*", "logging_*", "logged_samples", "num_completions_to_print", "num_shown", "disable_tqdm", "debug"),
        *("include_num_input_tokens_seen", "skip_memory_metrics", "save_*", "enable_jit_checkpoint"),
        *("resume_from_checkpoint", "restore_callback_states_from_checkpoint", "allow_changes_on_resume"),
    ),
    "evaluation": (
        *("do_*", "eval_*", "per_device_eval_*", "batch_eval_metrics", "prediction_loss_only", "include_for_metrics"),
        *("label_names", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
        *("early_stopping_patience", "stop_on_decline"),
    ),
    # How the work is spread over devices and processes, and how long a reward may take. `generation_batch_rows`
    # changes the random numbers, too, but a run that had too little memory must be able to go on with fewer rows.
    "execution": (
        *("accelerator_config", "dataloader_*", "ddp_*", "deepspeed", "ds3_*", "fsdp*", "local_rank"),
        *("activation_checkpointing*", "gradient_checkpointing*", "torch_empty_cache_steps", "trust_remote_code"),
        *("vllm_server_*", "vllm_group_port", "vllm_gpu_*", "vllm_enable_*", "vllm_tensor_*", "remove_unused_columns"),
        "dataset_num_proc",
        *("reward_timeout", "reward_retries", "failed_rewards", "reward_overflow", "check_numerics"),
        "generation_batch_rows",
    ),
    # A resume compares the files of these models.
    "models": ("reward_adapter", "model_init_kwargs"),
}
# Runs that differ only in other classes have one `group` tag in MLflow and are one group in a comparison.
COMPARED = {"outcome", "length", "evaluation", "execution", "models"}
# A run resumes only with equal options of these classes: they make its numbers.
RESUMED = {"outcome", "length", "seed"}
SEED_IN_PATH = re.compile(r"(?<![a-z])seed[-_=]?\d+", re.IGNORECASE)


def class_of(option: str) -> str:
    """Return the class of an option."""
    matches = (name for name, patterns in CLASSES.items() if any(fnmatchcase(option, each) for each in patterns))
    return next(matches, "outcome")


def flat(options: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return every option once, without its dataclass.

    The first dataclass that has a name keeps it. A later one with another value has it as `Dataclass.name`.

    Args:
        options: Options by dataclass, as `public_options` returns them.
    """
    known: dict[str, Any] = {}
    for dataclass, values in options.items():
        for name, value in values.items():
            if known.setdefault(name, value) != value:
                known[f"{dataclass}.{name}"] = value
    return known


def compared_options(options: Mapping[str, Any]) -> dict[str, str]:
    """Return as text the options that decide which runs are one group.

    A directory that is named after a seed (`runs/seed-1/sft`) is the same for every seed.

    Args:
        options: Options by name, as `flat` returns them.
    """
    texts = {
        name: value if isinstance(value, str) else json.dumps(value, sort_keys=True) for name, value in options.items()
    }
    return {
        name: SEED_IN_PATH.sub("seed*", text)
        for name, text in texts.items()
        if class_of(name.rpartition(".")[2]) in COMPARED
    }


def config_group(options: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a short name that all runs of one group share.

    Args:
        options: Options by dataclass, as `public_options` returns them.
    """
    text = json.dumps(compared_options(flat(options)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def options_that_count(args: Any, *, length_is_free: bool = False) -> dict[str, Any]:
    """Return the options of a trainer that must be equal on a resume.

    With PPO, the length of the run is one of them, because a learning rate that decays depends on it. With a constant
    learning rate, the length is free.

    Args:
        args: Options.
        length_is_free: Whether the length is free with every schedule, because the trainer warns of a change.
    """
    (options,) = public_options((args,)).values()
    is_free = length_is_free or str(options["lr_scheduler_type"]).startswith("constant")
    counting = RESUMED - {"length"} if is_free else RESUMED
    return {f"`{name}`": value for name, value in options.items() if class_of(name) in counting}


def defaults_of(args: Any) -> dict[str, Any]:
    """Return the defaults of a trainer's options, by the names of `options_that_count`.

    A checkpoint of an earlier version lacks the options that came later. Its run had their defaults.
    """
    return {f"`{each.name}`": each.default for each in fields(args) if each.default is not MISSING}
