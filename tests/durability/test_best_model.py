"""The best model is in a checkpoint, whenever it was found, and a full disk at the end is said in one line."""

import errno

import pytest
import tiny
import torch
from safetensors import SafetensorError
from transformers import Trainer

pytestmark = pytest.mark.tiny
STEPS = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "max_steps": 6, "learning_rate": 1e-2}


@pytest.mark.parametrize(("save_steps", "limit"), [(4, None), (4, 1), (1, 1)])
@pytest.mark.parametrize("best", [3, 4, 5])
def test_the_best_model_is_loaded_also_if_no_checkpoint_was_planned_at_its_step(tmp_path, best, save_steps, limit):
    options = {"save_steps": save_steps, "save_total_limit": limit, "metric_for_best_model": "loss"}
    trainer = tiny.reward_trainer(tmp_path, load_best_model_at_end=True, **STEPS, **options)
    evaluate, weights = trainer.evaluate, {}

    def judged(*args, **kwargs):
        step = trainer.state.global_step
        weights[step] = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        return evaluate(*args, **kwargs) | {"eval_loss": float(abs(step - best))}

    trainer.evaluate = judged
    trainer.train()
    assert trainer.state.best_global_step == best
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, weights[best][name]), name
    trainer.save_model()
    card = (tmp_path / "README.md").read_text()
    assert f"| weights of step | {best}, with the best evaluation |" in card
    assert f"after step {best}." in card


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), SafetensorError("No space left")], ids=repr)
@pytest.mark.parametrize("method", ["save_model", "save_state"])
def test_a_full_disk_at_the_end_names_the_whole_checkpoint(tmp_path, monkeypatch, error, method):
    trainer = tiny.reward_trainer(tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()

    def full(self, *args, **kwargs):
        raise error

    monkeypatch.setattr(Trainer, method, full)
    with pytest.raises(OSError, match="could not be written: .*No space left.*last good checkpoint is .*checkpoint-2"):
        getattr(trainer, method)()


def test_a_push_that_fails_is_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    trainer = tiny.reward_trainer(tmp_path)

    def refused(self, *args, **kwargs):
        raise OSError("401 Unauthorized")

    monkeypatch.setattr(Trainer, "save_model", refused)
    with pytest.raises(OSError, match="^401 Unauthorized$"):
        trainer.save_model()
