"""The disk and memory of a run, against sums by hand and the figures of a machine."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from accelerate.utils import DistributedType
from torch import nn
from transformers import LlamaConfig

from rlhf_recipes.preflight import resources
from rlhf_recipes.preflight.resources import (
    SMALL_FILES,
    activation_bytes,
    checkpoint_bytes,
    disk_findings,
    free_disk,
    gigabytes,
    layer_bytes,
    memory_findings,
    memory_to_come,
    parameter_bytes,
    planned_bytes,
    scoring_bytes,
    training_sizes,
)


def _model():
    """Return a model with 100 frozen bytes and 40 trained ones."""
    model = nn.ModuleDict({"frozen": nn.Linear(5, 5, bias=False), "trained": nn.Linear(5, 2, bias=False)})
    model["frozen"].requires_grad_(False)
    return model


def _args(optim="adamw_torch", kind=DistributedType.NO):
    return SimpleNamespace(optim=optim, distributed_state=SimpleNamespace(distributed_type=kind))


@pytest.mark.parametrize(
    ("args", "optimizer"),
    [
        (_args(), 80),
        (_args("paged_adamw_8bit"), 20),
        (_args("sgd"), 0),
        (_args("lion_32bit"), 40),
        (_args(kind=DistributedType.DEEPSPEED), 120),
    ],
)
def test_what_is_trained(args, optimizer):
    sizes = training_sizes(_model(), args, adapter=True)
    assert (sizes.saved, sizes.gradients, sizes.optimizer) == (40, 40, optimizer)
    assert training_sizes(_model(), args, adapter=False).saved == 140


def test_a_critic_that_is_fitted_has_an_optimizer_and_states_of_its_own():
    critic = SimpleNamespace(weights=[nn.Parameter(torch.zeros(5))], bytes_per_token=12)
    sizes = training_sizes(_model(), _args("sgd"), adapter=True, critic=critic)
    assert (sizes.saved, sizes.gradients, sizes.optimizer, sizes.critic) == (60, 40, 0, 20)
    assert checkpoint_bytes(sizes, only_model=False) - SMALL_FILES == 60 + 40
    assert memory_to_come(sizes, 0, 0, processes=1, sharded=False) == 60 + 40
    assert memory_to_come(sizes, 0, 0, processes=4, sharded=True) == 40 // 4 + 20 + 40, "each process has it whole"
    args = SimpleNamespace(per_device_train_batch_size=2, steps_per_generation=3, max_completion_length=9)
    layer = layer_bytes(LlamaConfig(), 7, width=2)
    assert scoring_bytes(LlamaConfig(), 7, args, None, width=2) == layer
    assert scoring_bytes(LlamaConfig(), 7, args, critic, width=2) == layer + 2 * 3 * 10 * 12


def test_a_parameter_counts_once_and_in_its_precision():
    model, half = _model(), nn.Linear(5, 5, bias=False, dtype=torch.bfloat16)
    assert parameter_bytes([model, model["trained"], half]) == 140 + 50


def test_a_parameter_that_zero_3_has_cut_counts_whole():
    model = _model()
    model["trained"].weight.data = torch.empty(0)
    model["trained"].weight.ds_numel = 10
    assert parameter_bytes([model], trained=True) == 40


def test_a_checkpoint():
    sizes = training_sizes(_model(), _args(), adapter=False)
    assert checkpoint_bytes(sizes, only_model=False) == 140 + 80 + SMALL_FILES
    assert checkpoint_bytes(sizes, only_model=True) == 140 + SMALL_FILES


@pytest.mark.parametrize(
    ("checkpoints", "limit", "copies", "total"), [(0, None, 1, 3), (4, None, 2, 46), (4, 2, 1, 33), (2, 5, 1, 23)]
)
def test_the_most_that_lies_there(checkpoints, limit, copies, total):
    assert planned_bytes(10, 3, checkpoints, limit, copies) == total


@pytest.mark.parametrize(
    ("one", "planned", "level"), [(10, 10, None), (10, 11, "warning"), (11, 11, "error"), (11, 50, "error")]
)
def test_an_error_if_one_does_not_fit_a_warning_if_all_do_not(one, planned, level):
    found = disk_findings("out", 10, one, planned)
    assert [finding.level for finding in found] == ([level] if level else [])
    assert all("save_only_model: true" in finding.message for finding in found)


def test_free_disk_of_a_directory_that_is_yet_to_be_made(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda path: asked.append(path) or SimpleNamespace(free=7))
    assert free_disk(tmp_path / "a" / "b") == 7
    assert asked == [tmp_path]


CONFIG = LlamaConfig(
    hidden_size=8, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=16
)


def test_activations():
    layer = 6 * 8 + 2 * 4 + 4 * 16
    assert activation_bytes(CONFIG, 10, width=2, checkpointing=False) == 10 * 2 * 3 * layer
    assert activation_bytes(CONFIG, 10, width=2, checkpointing=True) == 10 * 2 * (3 * 8 + layer)


def test_a_forward_without_gradient_keeps_one_layer():
    assert layer_bytes(CONFIG, 10, width=2) == 10 * 2 * (6 * 8 + 2 * 4 + 4 * 16)


def test_activations_are_about_what_autograd_keeps():
    """The estimate must be right within a factor of two."""
    model = tiny.policy(tiny.tokenizer()).train()
    model.model.set_attn_implementation("sdpa")
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model(torch.full((4, 32), 60)).last_hidden_state.sum()
    estimate = activation_bytes(model.config, 4 * 32, width=4, checkpointing=False)
    assert 0.5 < estimate / sum(kept.values()) < 2


def test_what_is_still_to_come():
    sizes = training_sizes(_model(), _args(), adapter=False)
    assert memory_to_come(sizes, 7, 5, processes=4, sharded=False) == 40 + 80 + 7
    assert memory_to_come(sizes, 7, 9, processes=4, sharded=True) == (40 + 80) // 4 + 9


def test_memory_is_a_warning_and_never_more():
    assert memory_findings(10, 10, "cpu") == []
    (finding,) = memory_findings(2_000_000_000, 1_500_000_000, "cuda:0")
    assert finding.level == "warning"
    assert "2.0 GB more on cuda:0, which has 1.5 GB free (estimate)" in finding.message


@pytest.mark.parametrize(("count", "text"), [(8_400_000, "8 MB"), (1_250_000_000, "1.2 GB"), (2.5e12, "2,500.0 GB")])
def test_numbers_for_reading(count, text):
    assert gigabytes(count) == text
