"""FSDP2: the policy with its head, sharded by torch's `fully_shard` over two ranks.

accelerate runs DDP when FSDP is asked for on CPUs. So these tests shard the trainer's own model themselves.
"""

import copy

import pytest
import tiny
import torch
from processes import run_in_processes
from safetensors.torch import load_file
from tolerances import SPLIT, assert_close
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from rlhf_recipes.models.critic import VALUE_HEAD_FILE, save_value_head

pytestmark = pytest.mark.distributed


def _loss_and_gradients(rank, world_size, directory):
    trainer = tiny.ppo_trainer(f"{directory}/{rank}", vf_coef=0.5, data=tiny.prompts(count=16))
    torch.nn.init.constant_(trainer.model.value_head.output.weight, 0.1)
    torch.manual_seed(rank)  # each rank has its own half of the batch
    batch = tiny.rollout(trainer, rows=8)
    trainer.current_gradient_accumulation_steps = 1

    def run(model):
        trainer.model = model
        loss = trainer._compute_loss(model, batch)
        loss.backward()
        return loss.item()

    whole = copy.copy(trainer.model)
    expected_loss = run(whole)
    expected = {}
    for name, parameter in whole.named_parameters():
        torch.distributed.all_reduce(parameter.grad)
        expected[name] = parameter.grad / world_size
    whole.zero_grad()

    model = trainer.model
    mesh = init_device_mesh("cpu", (world_size,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert isinstance(model, FSDPModule)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert model.value_head.hidden.weight.to_local().size(0) == 16, "each rank holds half of the head"
    loss = run(model)
    gradients = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        states = model(input_ids=batch["prompt_ids"], backbone_only=True).last_hidden_state
    save_value_head(model, directory, should_save=rank == 0)
    head = {name: x.full_tensor() for name, x in model.value_head.state_dict().items()}
    return {"losses": (loss, expected_loss), "gradients": (gradients, expected), "head": head, "states": states}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Return the results of two ranks, and the directory in which rank 0 saved the head."""
    directory = tmp_path_factory.mktemp("fsdp2")
    return run_in_processes(_loss_and_gradients, 2, str(directory)), directory


def test_loss_and_gradients_are_those_of_the_whole_model(ranks):
    for rank in ranks[0]:
        assert_close(*rank["losses"], SPLIT)
        actual, expected = rank["gradients"]
        assert actual.keys() == expected.keys()
        for name, gradient in expected.items():
            assert_close(actual[name], gradient, SPLIT)
        assert expected["value_head.output.weight"].abs().sum() > 0
    assert ranks[0][0]["losses"][0] != ranks[0][1]["losses"][0], "the ranks must have different data"


def test_the_head_is_saved_whole(ranks):
    saved = load_file(ranks[1] / VALUE_HEAD_FILE)
    for name, tensor in ranks[0][0]["head"].items():
        assert_close(saved[name], tensor, SPLIT)
    assert saved["hidden.weight"].shape == (32, 32)


def test_the_backbone_is_reached_through_the_shards(ranks):
    assert ranks[0][0]["states"].shape[-1] == 32
