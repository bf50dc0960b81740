"""What is relied on inside TRL 1.16. A TRL upgrade that moves it fails here, in one readable place."""

import functools
import inspect

import pytest
import tiny
import torch
import trl
from transformers import Trainer
from trl import GRPOTrainer, RewardTrainer
from trl.trainer.utils import (
    FusedCausalLMOutput,
    add_fused_lm_head,
    get_callable_name,
    is_async_callable,
    start_event_loop_in_daemon,
)

pytestmark = pytest.mark.tiny

SIGNATURES = {
    (GRPOTrainer, "_compute_loss"): ["self", "model", "inputs"],
    (GRPOTrainer, "_calculate_rewards"): ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    (GRPOTrainer, "_generate_and_score_completions"): ["self", "inputs"],
    (GRPOTrainer, "_prepare_inputs"): ["self", "generation_batch"],
    (GRPOTrainer, "training_step"): ["self", "model", "inputs", "num_items_in_batch"],
    (GRPOTrainer, "_get_grad_norm"): ["self", "model", "grad_norm"],
    (GRPOTrainer, "_generate"): ["self", "prompts"],
    (GRPOTrainer, "_save_checkpoint"): ["self", "model", "trial"],
    (GRPOTrainer, "_load_optimizer_and_scheduler"): ["self", "checkpoint"],
    (GRPOTrainer, "_get_train_sampler"): ["self", "dataset"],
    (RewardTrainer, "compute_loss"): ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
    (RewardTrainer, "_prepare_dataset"): ["self", "dataset", "processing_class", "args", "dataset_name"],
    (RewardTrainer, "_save"): ["self", "output_dir", "state_dict"],
    (Trainer, "_get_dataloader"): [
        "self", "dataset", "description", "batch_size", "sampler_fn", "is_training", "dataloader_key",
    ],
    (Trainer, "_get_output_dir"): ["self", "trial"],
    (Trainer, "_save_checkpoint"): ["self", "model", "trial"],
    (Trainer, "_evaluate"): ["self", "trial", "ignore_keys_for_eval", "skip_scheduler"],
    (Trainer, "_determine_best_metric"): ["self", "metrics", "trial"],
    (Trainer, "_init_training_state"): [
        "self", "max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint", "trial",
    ],
    (Trainer, "_run_epoch"): [
        "self", "model", "epoch", "train_dataloader", "steps_in_epoch", "num_update_steps_per_epoch", "trial",
        "ignore_keys_for_eval", "start_time", "resume_from_checkpoint", "epochs_trained",
        "steps_trained_in_current_epoch",
    ],
}  # fmt: skip


def test_version():
    assert trl.__version__.startswith("1.16.")


@pytest.mark.parametrize(("cls", "name"), SIGNATURES, ids=lambda x: getattr(x, "__name__", x))
def test_signature(cls, name):
    assert list(inspect.signature(getattr(cls, name)).parameters) == SIGNATURES[cls, name]


def test_log_prob_method_takes_what_we_pass_and_returns_three_things():
    signature = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies)
    assert list(signature.parameters)[:6] == [
        "self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size",
    ]  # fmt: skip
    images = set(list(signature.parameters)[6:]) - {"compute_entropy", "compute_aux_loss"}
    assert images == {
        "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles",
        "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
    }  # fmt: skip


def test_fused_output_has_the_fields_we_extend():
    fields = FusedCausalLMOutput.__dataclass_fields__
    assert {"loss", "log_probs", "entropy"} <= fields.keys()
    assert "state_values" not in fields
    assert list(inspect.signature(add_fused_lm_head).parameters)[:3] == [
        "model",
        "temperature",
        "cast_lm_head_to_fp32",
    ]


def test_rollout_has_the_keys_we_read(tmp_path):
    trainer = tiny.ppo_trainer(tmp_path)
    batch = tiny.rollout(trainer)
    assert {
        "prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "num_items_in_batch",
        "old_per_token_logps", "ref_per_token_logps",
    } <= batch.keys()  # fmt: skip
    for name in (
        "eos_token_ids",
        "temperature",
        "loss_type",
        "reward_weights",
        "reward_funcs",
        "_metrics",
        "_logs",
        "_step",
        "_buffered_inputs",
        "_is_vlm",
        "pad_to_multiple_of",
        "top_entropy_quantile",
        "aux_loss_enabled",
        "_entropy_bonus_enabled",
    ):
        assert hasattr(trainer, name)


def test_how_reward_functions_are_told_apart():
    async def judge(**kwargs):
        return []

    assert is_async_callable(functools.partial(judge))
    assert not is_async_callable(tiny.length_reward)
    assert get_callable_name(functools.partial(judge)) == "judge"
    assert list(inspect.signature(start_event_loop_in_daemon).parameters) == ["name"]


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
