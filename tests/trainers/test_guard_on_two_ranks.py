"""The guards on two ranks: both act if one rank finds something, and their weights stay the same."""

import pytest
import tiny
import torch
from faults import explode, poison, rates_of, snapshots_of, still_steps
from processes import run_in_processes
from tolerances import EXACT, assert_close
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from rlhf_recipes.trainers.guard import TrainingGuard

pytestmark = pytest.mark.distributed
OPTIONS = {
    "per_device_train_batch_size": 2,
    "steps_per_generation": 2,
    "save_strategy": "steps",
    "save_steps": 4,
    "max_steps": 12,
}


def _move_away(trainer, step):
    """Move this rank's policy far from the sampling policy, at one optimiser step."""
    get = trainer._get_per_token_logps_and_entropies

    def moved(model, *args, **kwargs):
        result = get(model, *args, **kwargs)
        if torch.is_grad_enabled() and trainer.state.global_step + 1 == step:
            model.per_token_logps = model.per_token_logps + 3
        return result

    trainer._get_per_token_logps_and_entropies = moved


def _train(rank, world_size, directory):
    """Return the actions of each guard on this rank, and the weights after them."""
    results = {}
    for case, options in (("skip", {}), ("rollback", {}), ("kl", {"max_kl": 20.0}), ("stop", {"max_update_kl": 0.5})):
        trainer = tiny.ppo_trainer(f"{directory}/{case}", **OPTIONS, **options)
        if rank == 1:  # rank 0 finds nothing by itself
            if case in ("skip", "rollback"):
                poison(trainer, {"skip": {6: 1}, "rollback": {9: 1, 10: 1, 11: 1}}[case])
            elif case == "kl":
                explode(trainer, 8, distance=50)
            else:
                _move_away(trainer, 6)
        rates, snapshots = rates_of(trainer), snapshots_of(trainer)
        trainer.train()
        result = {"steps": [step for step, *_ in rates], "still": still_steps(snapshots), "weights": snapshots[12]}
        results[case] = {**result, "metrics": trainer.guard.metrics()}
    return results


def _step_sharded(rank, world_size):
    """Return the effect on a sharded model of a step with a NaN gradient on one rank, and of one that goes too far."""
    mesh = init_device_mesh("cpu", (world_size,))
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    guard = TrainingGuard(tiny.ppo_config("unused", max_update_kl=0.1), is_main=rank == 0, fsdp=True)
    found = []
    for step, (factor, kl) in enumerate(((1.0, 0.0), (float("nan") if rank == 1 else 1.0, 0.0), (1.0, 0.2))):
        before = [p.full_tensor().detach().clone() for p in model.parameters()]
        (model(torch.ones(2, 4)) * torch.tensor([1.0, 1.0, 1.0, factor])).sum().backward()  # only in the second shard
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        guard.observe_update(1.0, {"policy/approx_kl": kl})
        guard.finish_step(model, norm, step)
        optimizer.step()
        optimizer.zero_grad()
        after = [p.full_tensor() for p in model.parameters()]
        is_moved = any(not torch.equal(x, y) for x, y in zip(before, after, strict=True))
        found.append((isinstance(norm, DTensor), is_moved))
    return found, guard.metrics()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Return the results of two ranks."""
    return run_in_processes(_train, 2, str(tmp_path_factory.mktemp("ranks")))


EXPECTED = {
    "skip": ([*range(1, 13)], [6], (1, 0, 0)),
    "rollback": ([*range(1, 11), *range(9, 13)], [], (3, 0, 1)),
    "kl": ([*range(1, 9), *range(5, 13)], [], (0, 0, 1)),
    "stop": ([*range(1, 13)], [6, 7, 8], (0, 3, 0)),
}


@pytest.mark.parametrize("case", EXPECTED)
def test_both_ranks_act_on_what_one_of_them_finds(ranks, case):
    steps, still, counts = EXPECTED[case]
    names = ("guard/skipped_steps", "guard/stopped_steps", "guard/rollbacks")
    for rank in ranks:
        assert rank[case]["steps"] == steps
        assert rank[case]["still"] == still
        assert rank[case]["metrics"] == dict(zip(names, counts, strict=True))
    for name, weights in ranks[0][case]["weights"].items():
        assert_close(ranks[1][case]["weights"][name], weights, EXACT)


def test_a_model_in_shards_is_not_moved_by_a_step_that_is_withheld():
    for found, metrics in run_in_processes(_step_sharded, 2):
        assert found == [(True, True), (True, False), (True, False)]
        assert metrics == {"guard/skipped_steps": 1, "guard/stopped_steps": 1, "guard/rollbacks": 0}
