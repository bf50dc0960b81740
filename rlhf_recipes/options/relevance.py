"""Which option matters for what: resuming a run, its group in MLflow, and a comparison."""

import hashlib
import json
import re
from typing import Any

from rlhf_recipes.options.secrets import public_options

# Where a run writes and what it is called do not change its outcome; the seed is what repeats an experiment.
NOT_IN_GROUP = {
    *("seed", "data_seed", "output_dir", "run_name", "logging_dir", "report_to", "resume_from_checkpoint"),
    *("hub_model_id", "hub_revision", "num_shown", "disable_tqdm", "save_total_limit"),
}


def config_group(options: dict[str, dict[str, Any]]) -> str:
    """Return a short name shared by the runs that differ in the seed, or in what does not change the outcome.

    A directory that is named after a seed (`runs/seed-1/sft`) counts as the same for every seed.
    """
    asked = {
        section: {name: value for name, value in values.items() if name not in NOT_IN_GROUP}
        for section, values in options.items()
    }
    text = re.sub(r"(?<![a-z])seed[-_=]?\d+", "seed", json.dumps(asked, sort_keys=True), flags=re.IGNORECASE)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# Beginnings of options that change no weight: where a run writes, what it shows, how often it saves and evaluates, and
# how the work is spread, which the number of processes says as far as it matters.
FREE_OPTIONS = (
    *("log", "save", "eval", "per_device_eval", "batch_eval", "prediction_loss", "do_", "metric", "greater_is_better"),
    *("load_best", "early_stopping", "output", "run_name", "report_to", "project", "trackio", "push_to", "hub"),
    *("resume", "restore_callback", "allow_changes", "enable_jit", "disable_tqdm", "num_completions_to_print"),
    *("include", "skip_memory", "debug", "dataloader", "ddp", "deepspeed", "fsdp", "accelerator_config", "local_rank"),
    *("gradient_checkpointing", "activation_checkpointing", "torch_empty_cache", "ds3", "vllm_server", "vllm_group"),
    *("vllm_gpu", "vllm_enable", "vllm_tensor", "trust_remote_code", "remove_unused", "label_names", "reward_adapter"),
    # How long a reward is waited for, and what becomes of a completion whose reward never came.
    *("reward_timeout", "reward_retries", "failed_rewards"),
)


def options_that_count(args: Any) -> dict[str, Any]:
    """Return the options of a trainer that its numbers depend on.

    The length of the run is one of them unless the learning rate is constant: another schedule would lead elsewhere.
    """
    (options,) = public_options((args,)).values()
    free: tuple[str, ...] = FREE_OPTIONS
    if str(options["lr_scheduler_type"]).startswith("constant"):
        free += ("max_steps", "num_train_epochs")
    return {f"`{name}`": value for name, value in options.items() if not name.startswith(free)}


# Seeds, names, places and verbosity: they change where a run is seen, not what it learns.
IGNORED_OPTIONS = re.compile(
    r"seed|data_seed|output_dir|run_name|report_to|resume_from_checkpoint|project|disable_tqdm|num_shown"
    r"|(logging|log|hub|push_to_hub|trackio|save)(_.*)?"
)
SEED_IN_PATH = re.compile(r"seed[-_=]?\d+")  # runs/seed-0/sft and runs/seed-1/sft are one option
