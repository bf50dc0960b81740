"""PPO with rewards of steps and tokens: where they go, and that their sum is the score."""

import oracles
import pytest
import tiny
import torch
from tolerances import FP32, assert_close

pytestmark = pytest.mark.tiny


def _by_token(completion_ids, **kwargs):
    """Return a reward for each token."""
    return [[float(token % 5) - 1 for token in ids] for ids in completion_ids]


def _by_character(completions, **kwargs):
    """Return a step for every second character, and what is left."""
    ends = [[*range(2, len(text), 2), len(text)] for text in completions]
    return [[(end, float(end % 3)) for end in row] for row in ends]


def _sums(function):
    def total(**kwargs):
        return [sum(x[1] if isinstance(x, tuple) else x for x in row) for row in function(**kwargs)]

    return total


def _drifted(tmp_path, rewards, **options):
    trainer = tiny.ppo_trainer(tmp_path, rewards=rewards, **options)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "value_head.output" in name or "lm_head" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    torch.manual_seed(5)
    return trainer, tiny.rollout(trainer)


@pytest.mark.parametrize("function", [_by_token, _by_character])
def test_dense_rewards_enter_gae_and_their_sum_is_the_score(tmp_path, function):
    options = {"whiten_advantages": False, "lam": 0.7, "gamma": 0.9, "reward_weights": [2.0]}
    trainer, batch = _drifted(tmp_path, function, **options)
    rollout, normalizer = trainer.rollout, trainer.reward_normalizer
    texts = {"completions": rollout.completions, "completion_ids": rollout.completion_id_lists}
    assert_close(rollout.scores, [2 * x for x in _sums(function)(**texts)], FP32)
    assert_close(rollout.parts.sum(dim=1), rollout.scores, FP32)
    assert_close((rollout.rewards + 0.05 * rollout.k1).sum(dim=1), rollout.normalized_scores, FP32)
    mask = batch["completion_mask"].tolist()
    kl = rollout.k1.double().tolist()
    parts = (rollout.parts.double() / normalizer.std).clamp(-5, 5).tolist()
    rewards = oracles.dense_rewards(rollout.normalized_scores.double().tolist(), parts, kl, mask, 0.05)
    assert_close(rollout.rewards, rewards, FP32)
    values = batch["old_values"].double().tolist()
    assert_close(batch["advantages"], oracles.gae(rewards, values, mask, gamma=0.9, lam=0.7), FP32)
    nothing = [[0.0] * len(row) for row in mask]
    assert_close(rollout.mc_returns, oracles.gae(rewards, nothing, mask, gamma=0.9, lam=1.0), FP32)
