"""PPO raises a reward that can be checked. With advantages of zero it does not."""

import pytest
import tiny
import torch

pytestmark = pytest.mark.learning
WANTED = set(range(200, 260))


def share_of_wanted_tokens(completion_ids, **kwargs):
    """Return scores between 0 and 1. An untrained policy is near 60/320."""
    return [sum(token in WANTED for token in ids) / len(ids) for ids in completion_ids]


class WithoutAdvantages(tiny.PPOTrainer):
    """Train as usual, but with advantages of zero: the negative control."""

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        return batch | {"advantages": torch.zeros_like(batch["advantages"])}


def _logged(output_dir, name, **kwargs):
    """Train, and return the logged values of a figure."""
    trainer = tiny.ppo_trainer(
        output_dir,
        rewards=share_of_wanted_tokens,
        data=tiny.prompts(count=64),
        per_device_train_batch_size=16,
        lr_scheduler_type="constant",
        **kwargs,
    )
    trainer.train()
    return [*tiny.logged(trainer, name).values()]


def _scores(output_dir, learning_rate=3e-3, **kwargs):
    scores = _logged(
        output_dir, "objective/scores", max_steps=120, learning_rate=learning_rate, kl_coef=0.01, **kwargs
    )
    return sum(scores[:5]) / 5, sum(scores[-5:]) / 5


@pytest.mark.parametrize(("peft", "learning_rate"), [(None, 3e-3), (tiny.lora(), 1e-2)], ids=["full", "lora"])
def test_the_score_rises(tmp_path, peft, learning_rate):
    first, last = _scores(tmp_path, learning_rate=learning_rate, peft=peft)
    assert last > first + 0.2


def test_without_advantages_nothing_rises(tmp_path):
    first, last = _scores(tmp_path, trainer_class=WithoutAdvantages)
    assert last < first + 0.05


def test_the_controller_holds_the_kl(tmp_path):
    """Without the controller, this reward would drive the KL far beyond the target."""
    controller = {"kl_controller": "adaptive", "kl_coef": 0.1, "target_kl": 2.0, "kl_horizon": 80}
    kls = _logged(tmp_path, "objective/kl", max_steps=400, **controller)
    assert 1.5 < sum(kls[-10:]) / 10 < 2.5
