"""Two processes train and evaluate a process reward model as one does, although one has more steps than the other."""

import pytest
import torch
from processes import run_in_processes
from tiny_steps import rows, trainer_of
from tolerances import FP32, assert_close

pytestmark = pytest.mark.distributed
KEPT = ("eval_accuracy", "eval_loss", "eval_score_mean", "eval_score_std", "eval_auc")


def _train(rank, world_size, directory):
    """Return the weights after a step on eight rows, and the figures of seven."""
    size = 8 // world_size
    options = {"per_device_train_batch_size": size // 2, "gradient_accumulation_steps": 2, "optim": "sgd"}
    trainer = trainer_of(directory, eval_data=rows(count=7), learning_rate=1e-2, max_steps=1, **options)
    trainer.train()
    metrics = trainer.evaluate()
    weights = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    return weights, {name: metrics[name] for name in KEPT} | {name: logged[name] for name in ("loss", "accuracy")}


def test_two_ranks_are_one(tmp_path):
    alone = _train(0, 1, tmp_path / "one")
    for weights, figures in run_in_processes(_train, 2, str(tmp_path / "two")):
        for name, tensor in weights.items():
            assert_close(tensor, alone[0][name], FP32)
        for name, value in figures.items():
            assert_close(torch.tensor(value), torch.tensor(alone[1][name]), FP32)
