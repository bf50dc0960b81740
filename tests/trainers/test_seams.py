"""Pin every private name of other libraries that the package relies on. An upgrade that moves one fails here.

The package is the oracle for the lists: a test finds the names in its syntax trees and compares.
"""

import ast
import functools
import importlib
import inspect
import re
import textwrap
from pathlib import Path

import mlflow.utils.rest_utils
import mlflow.utils.validation
import pytest
import tiny
import torch
import torch.distributed.checkpoint.utils
import trl
from mlflow.entities import RunData
from packaging.version import Version
from transformers import GenerationMixin, PretrainedConfig, Trainer
from transformers.integrations import MLflowCallback
from transformers.trainer_callback import ExportableState
from trl import DPOTrainer, GRPOTrainer, RewardTrainer, RLOOTrainer, SFTTrainer
from trl.models import utils as models_utils
from trl.trainer import reward_trainer, utils

pytestmark = pytest.mark.tiny

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "rlhf_recipes"
TREES = {path: ast.parse(path.read_text("utf-8")) for path in sorted((ROOT / PACKAGE).rglob("*.py"))}
LIBRARIES = {"accelerate", "mlflow", "peft", "transformers", "trl"}
DOCUMENTED = {"_asdict", "_exit", "_replace"}  # the standard library documents these names

GET_AND_SET = {"getattr", "setattr", "hasattr"}

# Methods, functions and classes, with the names of their parameters.
SIGNATURES = {
    (GRPOTrainer, "_compute_loss"): ["self", "model", "inputs"],
    (GRPOTrainer, "_calculate_rewards"): ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    (GRPOTrainer, "_generate_and_score_completions"): ["self", "inputs"],
    (GRPOTrainer, "_get_per_token_logps_and_entropies"): [
        "self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy",
        "compute_aux_loss", "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes",
        "num_tiles", "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
    ],
    (GRPOTrainer, "get_off_policy_mask"): [
        "advantages", "per_token_logps", "sampling_per_token_logps", "mask", "off_policy_threshold",
    ],
    (GRPOTrainer, "_prepare_inputs"): ["self", "generation_batch"],
    (GRPOTrainer, "training_step"): ["self", "model", "inputs", "num_items_in_batch"],
    (GRPOTrainer, "log"): ["self", "logs", "start_time"],
    (GRPOTrainer, "create_optimizer"): ["self", "model"],
    (GRPOTrainer, "evaluation_loop"): [
        "self", "dataloader", "description", "prediction_loss_only", "ignore_keys", "metric_key_prefix",
    ],
    (GRPOTrainer, "_get_grad_norm"): ["self", "model", "grad_norm"],
    (GRPOTrainer, "_generate"): ["self", "prompts"],
    (GRPOTrainer, "_save_checkpoint"): ["self", "model", "trial"],
    (GRPOTrainer, "_load_optimizer_and_scheduler"): ["self", "checkpoint"],
    (GRPOTrainer, "_get_train_sampler"): ["self", "dataset"],
    (GRPOTrainer, "_tokenize_prompts"): ["self", "prompts"],
    (RLOOTrainer, "_calculate_rewards"): ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    (RLOOTrainer, "_generate_and_score_completions"): ["self", "inputs"],
    (RLOOTrainer, "_get_train_sampler"): ["self", "dataset"],
    (RLOOTrainer, "_tokenize_prompts"): ["self", "prompts"],
    (DPOTrainer, "_prepare_dataset"): ["self", "dataset", "processing_class", "args", "dataset_name"],
    (SFTTrainer, "_prepare_dataset"): [
        "self", "dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name",
    ],
    (RewardTrainer, "compute_loss"): ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
    (RewardTrainer, "evaluate"): ["self", "eval_dataset", "ignore_keys", "metric_key_prefix"],
    (RewardTrainer, "log"): ["self", "logs", "start_time"],
    (RewardTrainer, "_prepare_dataset"): ["self", "dataset", "processing_class", "args", "dataset_name"],
    (RewardTrainer, "_save"): ["self", "output_dir", "state_dict"],
    (RewardTrainer, "_set_signature_columns_if_needed"): ["self"],
    (Trainer, "train"): ["self", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
    (Trainer, "save_model"): ["self", "output_dir", "_internal_call"],
    (Trainer, "_save"): ["self", "output_dir", "state_dict"],
    (Trainer, "_push_from_checkpoint"): ["self", "checkpoint_folder"],
    (Trainer, "_finish_current_push"): ["self"],
    (Trainer, "init_hf_repo"): ["self", "token", "private"],
    (Trainer, "push_to_hub"): ["self", "commit_message", "blocking", "token", "revision", "private", "kwargs"],
    (GRPOTrainer, "create_model_card"): ["self", "model_name", "dataset_name", "tags"],
    (Trainer, "_get_dataloader"): [
        "self", "dataset", "description", "batch_size", "sampler_fn", "is_training", "dataloader_key",
    ],
    (Trainer, "_get_output_dir"): ["self", "trial"],
    (Trainer, "_save_checkpoint"): ["self", "model", "trial"],
    (Trainer, "_evaluate"): ["self", "trial", "ignore_keys_for_eval", "skip_scheduler"],
    (Trainer, "_determine_best_metric"): ["self", "metrics", "trial"],
    (Trainer, "_finalize_training"): ["self", "trial", "num_train_samples", "start_time"],
    (Trainer, "_issue_warnings_after_load"): ["self", "load_result"],
    (Trainer, "_load_best_model"): ["self"],
    (Trainer, "_init_training_state"): [
        "self", "max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint", "trial",
    ],
    (Trainer, "create_accelerator_and_postprocess"): ["self"],
    (Trainer, "_run_epoch"): [
        "self", "model", "epoch", "train_dataloader", "steps_in_epoch", "num_update_steps_per_epoch", "trial",
        "ignore_keys_for_eval", "start_time", "resume_from_checkpoint", "epochs_trained",
        "steps_trained_in_current_epoch",
    ],
    (Trainer, "_maybe_log_save_evaluate"): [
        "self", "tr_loss", "grad_norm", "model", "trial", "epoch", "ignore_keys_for_eval", "start_time",
        "learning_rate",
    ],
    (Trainer, "_load_rng_state"): ["self", "checkpoint"],
    (Trainer, "_save_rng_state"): ["self", "output_dir"],
    (MLflowCallback, "setup"): ["self", "args", "state", "model"],
    (ExportableState, "state"): ["self"],
    (torch.distributed.distributed_c10d, "_get_default_store"): [],
    (torch.distributed.distributed_c10d, "_set_pg_timeout"): ["timeout", "group"],
    (mlflow.utils.rest_utils, "_get_http_response_with_retries"): [
        "method", "url", "max_retries", "backoff_factor", "backoff_jitter", "retry_codes", "raise_on_status",
        "allow_redirects", "respect_retry_after_header", "kwargs",
    ],
    (mlflow.utils.validation, "_validate_model_name"): ["model_name"],
    (mlflow.utils.validation, "_validate_model_alias_name"): ["model_alias_name"],
    (mlflow.utils.validation, "_validate_model_alias_name_reserved"): ["model_alias_name"],
    (models_utils, "disable_gradient_checkpointing"): ["model", "gradient_checkpointing_kwargs"],
    (models_utils, "prepare_deepspeed"): ["model", "accelerator"],
    (models_utils, "prepare_fsdp"): ["model", "accelerator"],
    (GenerationMixin, "_sample"): [
        "self", "input_ids", "logits_processor", "stopping_criteria", "generation_config", "synced_gpus", "streamer",
        "model_kwargs",
    ],
    (GenerationMixin, "_update_model_kwargs_for_generation"): [
        "self", "outputs", "model_kwargs", "is_encoder_decoder", "num_new_tokens",
    ],
    (models_utils, "unwrap_model_for_generation"): [
        "model", "accelerator", "gather_deepspeed3_params", "generation_kwargs", "gradient_checkpointing_kwargs",
    ],
    (reward_trainer, "suppress_seqcls_warning"): [],
    (torch.distributed.checkpoint.utils, "_create_file_view"): ["file", "offset", "length"],
    (trl.TrlParser, "parse_args_and_config"): [
        "self", "args", "return_remaining_strings", "fail_with_unknown_args", "separate_remaining_strings",
    ],
    (utils, "FusedCausalLMOutput"): [
        "loss", "log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask", "aux_loss",
    ],
    (utils, "RepeatSampler"): ["data_source", "mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed"],
    (utils, "add_fused_lm_head"): ["model", "temperature", "cast_lm_head_to_fp32", "outputs"],
    (utils, "create_model_from_path"): ["model_id", "architecture", "kwargs"],
    (utils, "get_callable_name"): ["func"],
    (utils, "is_async_callable"): ["func"],
    (utils, "pad"): ["tensors", "padding_value", "padding_side", "pad_to_multiple_of"],
    (utils, "start_event_loop_in_daemon"): ["name"],
    (utils, "use_adapter"): ["model", "adapter_name"],
}  # fmt: skip

# Attributes that are read or written.
ATTRIBUTES = [
    (GRPOTrainer, "_buffered_inputs"),
    (GRPOTrainer, "_entropy_bonus_enabled"),
    (GRPOTrainer, "_is_vlm"),
    (GRPOTrainer, "_logs"),
    (GRPOTrainer, "_metrics"),
    (GRPOTrainer, "_step"),
    (GRPOTrainer, "_tokenizer"),
    (DPOTrainer, "_metrics"),
    (RLOOTrainer, "_buffered_inputs"),
    (RLOOTrainer, "_metrics"),
    (RLOOTrainer, "_step"),
    (RewardTrainer, "_metrics"),
    (Trainer, "_globalstep_last_logged"),
    (Trainer, "_initial_global_step"),
    (Trainer, "_initial_num_input_tokens_seen"),
    (Trainer, "_internal_call"),  # a parameter
    (Trainer, "_total_loss_scalar"),
    (Trainer, "_signature_columns"),
    (Trainer, "_tr_loss"),
    (SFTTrainer, "_metrics"),
    (PretrainedConfig, "_attn_implementation"),
    (PretrainedConfig, "_name_or_path"),
    (MLflowCallback, "_async_log"),
    (MLflowCallback, "_initialized"),
    (MLflowCallback, "_ml_flow"),
    (RunData, "_metric_objs"),
    (torch.nn.Module, "_modules"),
    (torch.optim.lr_scheduler.LRScheduler, "_last_lr"),
]


def is_private(name):
    return name.isidentifier() and name.startswith("_") and not name.startswith("__") and name != "_"


@functools.cache
def names_set_in(cls):
    """Return the names that the body of a class defines or sets on `self`, and the names of private parameters."""
    names = set()
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(cls)))):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                names.add(name)
            case ast.arg(arg=name) if is_private(name):
                names.add(name)
    return names


def names_held_by(cls, libraries):
    """Return the names that a class and its bases set, as far as they are from one of the libraries."""
    bases = [base for base in cls.__mro__ if base.__module__.split(".")[0] in libraries]
    return set().union(*map(names_set_in, bases))


def classes():
    """Yield every class of the package as a syntax tree, the names of its library bases and the names of its own."""
    for path, tree in TREES.items():
        module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                cls = getattr(module, node.name)
                yield path, node, names_held_by(cls, LIBRARIES), names_held_by(cls, {PACKAGE})


def is_of_self(node):
    return isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "super()")


def names_shared_with_bases():
    """Yield the methods that classes of the package override, and the private names that they share with their bases.

    The events of callbacks (`on_...`) are left out, because transformers documents them.
    """
    for path, tree, held, _ in classes():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name in held and not node.name.startswith(("__", "on_")):
                yield node.name, path, node.lineno
            elif is_of_self(node) and node.attr in held and is_private(node.attr):
                yield node.attr, path, node.lineno


def names_set_nowhere_here():
    """Yield every private name in the package that no function, class, variable or `self` of the package has."""
    shared = {name for name, *_ in names_shared_with_bases()}
    own = {name for _, tree, held, mine in classes() for name in mine - held}
    for tree in TREES.values():
        own |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)} - shared
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            yield from (
                (name, path, node.lineno)
                for name in private_names_of(node)
                if name not in own | DOCUMENTED or (name in shared and not is_of_self(node))
            )


def private_names_of(node):
    """Return the private names that one node of a syntax tree uses, also as text for `getattr`."""
    match node:
        case ast.Attribute(attr=name) | ast.keyword(arg=str(name)):
            found = [name]
        case ast.ImportFrom(module=module, names=names) if not module.startswith(PACKAGE):
            found = [part for alias in names for part in f"{module}.{alias.name}".split(".")]
        case ast.stmt() if not isinstance(node, ast.FunctionDef | ast.ClassDef) and GET_AND_SET & called_by(node):
            found = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
        case _:
            found = []
    return [name for name in found if isinstance(name, str) and is_private(name)]


def called_by(node):
    return {ast.unparse(part.func) for part in ast.walk(node) if isinstance(part, ast.Call)}


def names_inside_trl():
    """Yield the names that are imported from a module of TRL because `trl` itself does not offer them."""
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("trl."):
                yield from ((x.name, path, node.lineno) for x in node.names if not hasattr(trl, x.name))


def test_the_lists_above_name_what_the_package_relies_on_and_nothing_else():
    places = {}
    for name, path, line in [*names_shared_with_bases(), *names_set_nowhere_here(), *names_inside_trl()]:
        places.setdefault(name, f"{path.relative_to(ROOT)}:{line}")
    pinned = {name for _, name in [*SIGNATURES, *ATTRIBUTES]}
    missing = [f"`{name}` ({place})" for name, place in sorted(places.items()) if name not in pinned]
    stale = [f"`{name}`" for name in sorted(pinned - places.keys())]
    assert not missing, (
        f"Used, but not pinned: {', '.join(missing)}. Add a function to SIGNATURES and an attribute to ATTRIBUTES. "
        "If the name was meant to be new, rename it: a base class from a library has it already."
    )
    assert not stale, f"Pinned, but no longer used: {', '.join(stale)}. Delete them from SIGNATURES and ATTRIBUTES."


def test_every_attribute_of_self_is_set_in_the_class_or_in_a_base():
    """An attribute of TRL or transformers, also a public one, can disappear with a new version."""
    unknown = [
        f"`{node.attr}` ({path.relative_to(ROOT)}:{node.lineno})"
        for path, tree, held, mine in classes()
        if held
        for node in ast.walk(tree)
        if is_of_self(node) and node.attr not in held | mine
    ]
    assert not unknown, f"Set nowhere: {', '.join(unknown)}. The installed version of a library may have renamed it."


def test_version():
    assert trl.__version__.startswith("1.16.")


def test_compat_tests_the_lower_bounds():
    oldest = dict(re.findall(r"^([\w-]+)==(.+)$", (ROOT / "constraints-oldest.txt").read_text(), re.MULTILINE))
    bounds = dict(re.findall(r'^    "([\w-]+)>=([\d.]+)', (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    for name in ("torch", "transformers"):
        assert Version(oldest[name]) == Version(bounds[name])


@pytest.mark.parametrize(("owner", "name"), SIGNATURES, ids=lambda x: getattr(x, "__name__", x))
def test_signature(owner, name):
    assert list(inspect.signature(getattr(owner, name)).parameters) == SIGNATURES[owner, name]


@pytest.mark.parametrize(("cls", "name"), ATTRIBUTES, ids=lambda x: getattr(x, "__name__", x))
def test_attribute(cls, name):
    assert name in names_held_by(cls, LIBRARIES | {"torch"})


def test_rollout_has_the_keys_we_read(tmp_path):
    trainer = tiny.ppo_trainer(tmp_path)
    batch = tiny.rollout(trainer)
    assert {
        "prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "num_items_in_batch",
        "old_per_token_logps", "ref_per_token_logps",
    } <= batch.keys()  # fmt: skip


def test_how_reward_functions_are_told_apart():
    async def judge(**kwargs):
        return []

    assert utils.is_async_callable(functools.partial(judge))
    assert not utils.is_async_callable(tiny.length_reward)
    assert utils.get_callable_name(functools.partial(judge)) == "judge"


def test_extra_tensors_travel_with_their_rows(tmp_path):
    """TRL shuffles and cuts what it finds in the batch: our columns must stay aligned with the tokens."""
    trainer = tiny.ppo_trainer(tmp_path, num_iterations=1)
    trainer.model.train()
    original = trainer._generate_and_score_completions

    def marked(inputs):
        batch = original(inputs)
        batch["returns"] = batch["completion_ids"].float()
        return batch

    trainer._generate_and_score_completions = marked
    inputs = trainer._prepare_inputs([trainer.train_dataset[i] for i in range(8)])
    assert inputs["returns"].shape == inputs["completion_ids"].shape
    assert inputs["returns"].size(0) == 4
    assert torch.equal(inputs["returns"], inputs["completion_ids"].float())


def test_trl_still_refuses_one_generation_and_we_do_not(tmp_path):
    with pytest.raises(ValueError, match="at least 2 generations"):
        trl.GRPOConfig(
            str(tmp_path), num_generations=1, per_device_train_batch_size=1, report_to=[], use_cpu=True, bf16=False
        )
    config = tiny.ppo_config(tmp_path, per_device_train_batch_size=1, steps_per_generation=3)
    assert config.num_generations == 1
    assert type(config.num_generations) is int


def test_the_norm_of_a_gradient_is_asked_for_between_backward_and_the_step(tmp_path):
    """Guards drop gradients there."""
    trainer, seen = tiny.ppo_trainer(tmp_path, max_steps=2), []
    trainer._get_grad_norm = lambda model, grad_norm=None: seen.append("norm") or grad_norm
    original = trainer.create_optimizer

    def create_optimizer(*args):
        optimizer = original(*args)
        optimizer.register_step_pre_hook(lambda *args: seen.append("step"))
        return optimizer

    trainer.create_optimizer = create_optimizer
    trainer.train()
    assert seen == ["norm", "step"] * 2
