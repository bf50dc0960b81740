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


def _scores(cls, output_dir, peft=None, **kwargs):
    tok = tiny.tokenizer()
    options = {
        "per_device_train_batch_size": 16,
        "steps_per_generation": 2,
        "max_steps": 120,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "kl_coef": 0.01,
        **kwargs,
    }
    trainer = cls(
        tiny.policy(tok),
        share_of_wanted_tokens,
        tiny.ppo_config(output_dir, **options),
        train_dataset=tiny.prompts(count=64),
        processing_class=tok,
        peft_config=peft,
    )
    trainer.train()
    scores = [entry["objective/scores"] for entry in trainer.state.log_history if "objective/scores" in entry]
    return sum(scores[:5]) / 5, sum(scores[-5:]) / 5


@pytest.mark.parametrize("peft", [None, tiny.lora()], ids=["full", "lora"])
def test_the_score_rises(tmp_path, peft):
    first, last = _scores(tiny.PPOTrainer, tmp_path, peft)
    assert last > first + 0.2


def test_without_advantages_nothing_rises(tmp_path):
    first, last = _scores(WithoutAdvantages, tmp_path)
    assert last < first + 0.05


def test_the_controller_holds_the_kl(tmp_path):
    """Without the controller, this reward would drive the KL far beyond the target."""
    tok = tiny.tokenizer()
    trainer = tiny.ppo_trainer(
        tmp_path,
        model=tiny.policy(tok),
        tok=tok,
        rewards=share_of_wanted_tokens,
        data=tiny.prompts(count=64),
        per_device_train_batch_size=16,
        max_steps=400,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        kl_controller="adaptive",
        kl_coef=0.1,
        target_kl=2.0,
        kl_horizon=80,
    )
    trainer.train()
    kls = [entry["objective/kl"] for entry in trainer.state.log_history if "objective/kl" in entry]
    assert 1.5 < sum(kls[-10:]) / 10 < 2.5
