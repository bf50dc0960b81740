"""The contents of a rollout, compared with the float64 definitions of `oracles.py`."""

import math
import statistics

import oracles
import pytest
import tiny
import torch
from tolerances import FP32, assert_close

from rlhf_recipes.rewards.protocol import FunctionScorer
from rlhf_recipes.trainers.rollout import Rollout
from rlhf_recipes.trainers.rollout_metrics import rollout_metrics

pytestmark = [pytest.mark.tiny, pytest.mark.portable]


def _expected(trainer, batch, scores, *, lam=None, bootstrap=None):
    args = trainer.args
    mask = batch["completion_mask"].tolist()
    kl = (batch["old_per_token_logps"] - batch["ref_per_token_logps"]).double().tolist()
    rewards = oracles.shaped_rewards(scores, kl, mask, trainer.kl_controller.kl_coef)
    assert len({sum(row) for row in mask}) > 1, "the completions must differ in length"
    estimate = {"gamma": args.gamma, "lam": args.lam if lam is None else lam, "bootstrap_values": bootstrap}
    values = batch["old_values"].double().tolist()
    return oracles.gae(rewards, values, mask, **estimate), oracles.lambda_returns(rewards, values, mask, **estimate)


def _drifted_trainer(tmp_path, **kwargs):
    """Return a trainer whose policy differs from the reference, and whose critic does not predict 0."""
    trainer = tiny.ppo_trainer(tmp_path, **kwargs)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "value_head.output" in name or "lm_head" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return trainer


def _normalized(trainer):
    scores = trainer.rollout.scores.double()
    normalizer = trainer.reward_normalizer
    return ((scores - normalizer.mean) / normalizer.std).clamp(-normalizer.clip, normalizer.clip)


@pytest.mark.parametrize(
    ("options", "value_lam"), [({"gamma": 0.9, "lam": 0.8}, 0.8), ({"lam": 0.5, "value_lam": 1.0}, 1.0)]
)
def test_advantages_and_returns_are_the_definition_each_with_its_lambda(tmp_path, options, value_lam):
    trainer = _drifted_trainer(tmp_path, whiten_advantages=False, **options)
    batch = tiny.rollout(trainer)
    scores = _normalized(trainer).tolist()
    assert_close(batch["advantages"], _expected(trainer, batch, scores)[0], FP32)
    assert_close(batch["returns"], _expected(trainer, batch, scores, lam=value_lam)[1], FP32)
    assert batch["old_values"].abs().max() > 0


def test_advantages_are_whitened_over_the_rollout(tmp_path):
    plain = _drifted_trainer(tmp_path, whiten_advantages=False)
    torch.manual_seed(7)
    expected = tiny.rollout(plain)
    white = _drifted_trainer(tmp_path)
    torch.manual_seed(7)
    batch = tiny.rollout(white)
    mask = batch["completion_mask"].tolist()
    assert_close(batch["advantages"], oracles.whiten(expected["advantages"].double().tolist(), mask), FP32)
    assert_close(batch["returns"], expected["returns"], FP32)


def test_the_controller_prices_the_kl_and_follows_it(tmp_path):
    """With 8 completions, a horizon of 80 and a KL far above its target, the price rises by 0.2 * 8 / 80."""
    options = {"kl_controller": "adaptive", "target_kl": 0.01, "kl_horizon": 80}
    trainer = _drifted_trainer(tmp_path, whiten_advantages=False, **options)
    trainer.kl_controller.load_state_dict({"kl_coef": 0.7})
    batch = tiny.rollout(trainer)
    assert trainer._metrics["train"]["objective/kl"][0] > 0.012
    assert trainer.kl_controller.kl_coef == pytest.approx(0.7 * 1.02)
    trainer.kl_controller.load_state_dict({"kl_coef": 0.7})
    assert_close(batch["advantages"], _expected(trainer, batch, _normalized(trainer).tolist())[0], FP32)


def test_scores_are_not_normalised_when_switched_off(tmp_path):
    trainer = _drifted_trainer(tmp_path, reward_norm=False, whiten_advantages=False)
    batch = tiny.rollout(trainer)
    advantages, _ = _expected(trainer, batch, trainer.rollout.scores.double().tolist())
    assert_close(batch["advantages"], advantages, FP32)


def _ends(trainer, batch):
    """Return for each completion whether its last token is an EOS."""
    lengths = batch["completion_mask"].sum(1)
    last = batch["completion_ids"][torch.arange(len(lengths)), (lengths - 1).clamp(min=0)]
    return torch.isin(last, torch.tensor(trainer.eos_token_ids, device=tiny.DEVICE))


def _force_stops(trainer, monkeypatch, completions):
    """Let generation return the given completions."""
    monkeypatch.setattr(trainer, "_generate_single_turn", lambda *args, **kwargs: (completions, None))


COMPLETIONS = [[80, 81, 82, 1], [83, 84, 85, 86], [87, 1], [88, 89, 90, 91]] * 2
"""EOS on the last step of the width; cut at the same width; short; cut. The id of EOS is 1."""


def test_penalty_hits_the_cut_ones_only_and_width_is_no_evidence(tmp_path, monkeypatch):
    trainer = _drifted_trainer(tmp_path, missing_eos_penalty=2.0, whiten_advantages=False, max_completion_length=4)
    _force_stops(trainer, monkeypatch, COMPLETIONS)
    batch = tiny.rollout(trainer)
    ends = _ends(trainer, batch)
    assert ends.tolist() == [True, False, True, False] * 2
    scores = _normalized(trainer) - 2.0 * (~ends)
    assert_close(batch["advantages"], _expected(trainer, batch, scores.tolist())[0], FP32)


def test_bootstrap_adds_the_value_of_the_state_it_stopped_in(tmp_path, monkeypatch):
    trainer = _drifted_trainer(tmp_path, truncated_completions="bootstrap", whiten_advantages=False, lam=0.7)
    _force_stops(trainer, monkeypatch, COMPLETIONS)
    batch = tiny.rollout(trainer)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad():
        hidden = trainer.model.model(input_ids=ids, attention_mask=mask).last_hidden_state
        values = trainer.model.value_head(hidden)
    start = batch["prompt_ids"].size(1)
    after = [values[i, start + int(batch["completion_mask"][i].sum()) - 1].item() for i in range(len(ids))]
    bootstrap = [0.0 if end else value for end, value in zip(_ends(trainer, batch), after, strict=True)]
    assert any(bootstrap)
    expected = _expected(trainer, batch, _normalized(trainer).tolist(), bootstrap=bootstrap)
    assert_close(batch["advantages"], expected[0], FP32)
    assert_close(batch["returns"], expected[1], FP32)


def test_mask_leaves_cut_completions_out(tmp_path, monkeypatch):
    trainer = _drifted_trainer(tmp_path, truncated_completions="mask")
    _force_stops(trainer, monkeypatch, COMPLETIONS)
    batch = tiny.rollout(trainer)
    assert batch["completion_mask"].sum(1).tolist() == [4, 0, 2, 0] * 2
    assert batch["advantages"][1::2].abs().sum() == 0
    assert batch["num_items_in_batch"] == 12


def test_values_precede_their_token(tmp_path, monkeypatch):
    """The value of the first token depends on the prompt alone."""
    trainer = _drifted_trainer(tmp_path)
    _force_stops(trainer, monkeypatch, COMPLETIONS)
    first = tiny.rollout(trainer)["old_values"]
    _force_stops(trainer, monkeypatch, [[c[0] + 7, *c[1:]] for c in COMPLETIONS])
    second = tiny.rollout(trainer)["old_values"]
    assert_close(first[:, 0], second[:, 0], FP32)
    assert not torch.allclose(first[:, 1], second[:, 1])


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_an_unscorable_completion_is_left_out(tmp_path, bad):
    def reward(completions, **kwargs):
        return [bad if i == 2 else float(i) for i in range(len(completions))]

    scorer = FunctionScorer(reward)
    scorer.model = torch.nn.Identity()  # infinity from a model masks a completion; from a function it ends the run
    trainer = _drifted_trainer(tmp_path, rewards=scorer)
    batch = tiny.rollout(trainer)
    assert batch["completion_mask"][2].sum() == 0
    assert batch["completion_mask"][3].sum() > 0
    assert batch["advantages"][2].abs().sum() == 0
    assert trainer.reward_normalizer.mean == pytest.approx((0 + 1 + 3 + 4 + 5 + 6 + 7) / 7)
    assert trainer._metrics["train"]["objective/excluded"] == [1 / 8]
    assert batch["advantages"].isfinite().all()


def test_the_table_says_what_stopped_a_completion_that_does_not_train(tmp_path, monkeypatch):
    """The limit has cut the first two. The mask leaves them out, and the last one has no score."""

    def reward(completions, **kwargs):
        return [None if i == 7 else float(i) for i in range(len(completions))]

    trainer = _drifted_trainer(tmp_path, rewards=reward, truncated_completions="mask", max_completion_length=3)
    _force_stops(trainer, monkeypatch, [[80, 81, 82], [83, 84, 85], *[[86, 1]] * 5, [87, 1]])
    tiny.rollout(trainer)
    rollout = trainer.rollout
    assert [row["stop"] for row in rollout.samples()] == ["length"] * 2 + ["eos"] * 6
    assert rollout.completion_mask.any(dim=1).tolist() == [False] * 2 + [True] * 5 + [False]


@pytest.mark.parametrize("names", [("same", "same"), ("score", "kl"), ("length", "prompt")])
def test_no_reward_loses_its_column_to_another_of_its_name(tmp_path, names):
    rewards = [lambda completions, value=value, **kwargs: [value] * len(completions) for value in (1.0, 3.0)]
    for reward, name in zip(rewards, names, strict=True):
        reward.__name__ = name
    trainer = _drifted_trainer(tmp_path, rewards=rewards)
    tiny.rollout(trainer)
    (row, *_) = trainer.rollout.samples()
    columns = {("same", "same"): ("same", "same_2")}.get(names, tuple(f"{name}_reward" for name in names))
    assert [row[column] for column in columns] == [1.0, 3.0]
    assert (row["score"], row["stop"] in ("eos", "length"), row["length"] > 0) == (4.0, True, True)
    logged = [name for name in trainer._metrics["train"] if name.startswith("rewards/") and name.endswith("/mean")]
    assert len(logged) == 2


def test_evaluation_does_not_move_the_normaliser_or_the_controller(tmp_path):
    trainer = tiny.ppo_trainer(tmp_path, kl_controller="adaptive")
    tiny.rollout(trainer)
    before = trainer.reward_normalizer.state_dict(), trainer.kl_controller.state_dict()
    trainer.model.eval()
    trainer._generate_and_score_completions([trainer.train_dataset[i] for i in range(8)])
    assert (trainer.reward_normalizer.state_dict(), trainer.kl_controller.state_dict()) == before


async def _slow_reward(completions, **kwargs):
    return [2.0] * len(completions)


def test_reward_models_and_functions_are_weighted_and_summed(tmp_path):
    tok = tiny.tokenizer()
    rewards = [tiny.reward_model(tok), tiny.length_reward, _slow_reward]
    trainer = tiny.ppo_trainer(
        tmp_path, rewards=rewards, reward_tok=[tok, None, None], reward_weights=[0.5, 2.0, -1.0]
    )
    seen = {}
    original = trainer._calculate_rewards

    def spy(*args):
        seen["per_func"] = original(*args)
        return seen["per_func"]

    trainer._calculate_rewards = spy
    tiny.rollout(trainer)
    columns = seen["per_func"].double()
    assert columns[:, 0].std() > 0
    assert_close(trainer.rollout.scores, 0.5 * columns[:, 0] + 2.0 * columns[:, 1] - columns[:, 2], FP32)


def test_several_generations_per_prompt(tmp_path):
    trainer = tiny.ppo_trainer(tmp_path, num_generations=4)
    trainer.train()
    assert trainer.state.global_step == 4


@pytest.mark.parametrize("unknown", [[], [1], [4, 5, 6]])
def test_the_share_that_a_prompt_explains_is_that_of_its_other_answers(tmp_path, unknown):
    trainer = tiny.ppo_trainer(tmp_path, num_generations=4)
    tiny.rollout(trainer)
    rollout = trainer.rollout
    rollout.scores[unknown] = torch.nan
    _, metrics = rollout_metrics(rollout, group_size=4)
    known = [[x for x in group if not math.isnan(x)] for group in rollout.scores.view(-1, 4).double().tolist()]
    groups = [group for group in known if len(group) > 1]
    scores = [x for group in groups for x in group]
    others = [(sum(group) - x) / (len(group) - 1) for group in groups for x in group]
    rest = statistics.pvariance([x - b for x, b in zip(scores, others, strict=True)])
    assert_close(metrics["val/explained_variance_prompt"], 1 - rest / statistics.pvariance(scores), FP32)


def test_one_answer_per_prompt_leaves_nothing_to_compare(tmp_path):
    trainer = tiny.ppo_trainer(tmp_path)
    tiny.rollout(trainer)
    assert "val/explained_variance_prompt" not in trainer._metrics["train"]


def test_completion_log_holds_the_advantages_of_ppo(tmp_path):
    trainer = _drifted_trainer(tmp_path)
    batch = tiny.rollout(trainer)
    mask = batch["completion_mask"]
    assert_close(list(trainer._logs["advantages"]), (batch["advantages"] * mask).sum(1) / mask.sum(1), FP32)


def test_what_is_masked_does_not_move_the_normaliser(tmp_path, monkeypatch):
    """Cut completions score 100, the others 1."""

    def reward(completion_ids, **kwargs):
        return [1.0 if ids[-1] == 1 else 100.0 for ids in completion_ids]

    trainer = _drifted_trainer(tmp_path, truncated_completions="mask", rewards=reward)
    _force_stops(trainer, monkeypatch, COMPLETIONS)
    tiny.rollout(trainer)
    assert trainer.reward_normalizer.mean == 1.0
    assert trainer._metrics["train"]["objective/scores"] == [1.0]
    assert trainer._metrics["train"]["objective/excluded"] == [0.5]


def test_what_does_not_train_has_no_log_probabilities(tmp_path):
    """The update finds 0 there. With another number in the rollout, the ratio could overflow."""

    def reward(completions, **kwargs):
        return [None if i == 2 else float(i) for i in range(len(completions))]

    batch = tiny.rollout(_drifted_trainer(tmp_path, rewards=reward))
    for name in ("old_per_token_logps", "ref_per_token_logps"):
        assert (batch[name][batch["completion_mask"] == 0] == 0).all()
        assert (batch[name][3, 0] != 0).all()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_penalty_that_is_logged_is_the_one_that_was_paid(tmp_path, estimator):
    trainer = _drifted_trainer(tmp_path, kl_estimator=estimator, whiten_advantages=False)
    batch = tiny.rollout(trainer)
    metrics = trainer._metrics["train"]
    mask = batch["completion_mask"]
    log_ratio = ((batch["old_per_token_logps"] - batch["ref_per_token_logps"]) * mask).double()
    paid = {"k1": log_ratio, "k2": log_ratio**2 / 2, "k3": (-log_ratio).exp() - 1 + log_ratio}[estimator]
    assert_close(metrics["objective/kl"][0], log_ratio.sum(1).mean(), FP32)
    assert_close(metrics["objective/non_score_reward"][0], -trainer.args.kl_coef * paid.sum(1).mean(), FP32)
    expected = _normalized(trainer).mean() + metrics["objective/non_score_reward"][0]
    assert_close(metrics["objective/rlhf_reward"][0], expected, FP32)


@pytest.mark.parametrize("peft", [None, tiny.lora()], ids=["full", "lora"])
def test_generation_sees_a_plain_policy(tmp_path, monkeypatch, peft):
    """vLLM's weight synchronisation finds no value head."""
    seen = []
    original = tiny.PPOTrainer.__mro__[1]._generate_single_turn

    def spy(self, *args, **kwargs):
        seen.extend(name for name, _ in self.model.named_parameters())
        return original(self, *args, **kwargs)

    monkeypatch.setattr(tiny.PPOTrainer.__mro__[1], "_generate_single_turn", spy)
    trainer = tiny.ppo_trainer(tmp_path, peft=peft)
    tiny.rollout(trainer)
    assert seen
    assert not [name for name in seen if "value_head" in name]
    assert [name for name, _ in trainer.model.named_parameters() if "value_head" in name]


@pytest.mark.parametrize("size", [2, 8])
def test_an_evaluation_batch_may_have_another_size_than_a_rollout(tmp_path, size):
    trainer = tiny.ppo_trainer(tmp_path, steps_per_generation=1, per_device_eval_batch_size=size)
    trainer.model.eval()
    trainer._generate_and_score_completions([trainer.train_dataset[i] for i in range(size)])
    assert len(trainer._logs["advantages"]) == len(trainer._logs["prompt"]) > 0
    trainer.eval_dataset = trainer.train_dataset
    metrics = trainer.evaluate()
    assert metrics["eval_objective/kl"] == 0
    assert math.isfinite(metrics["eval_loss"])


@pytest.mark.parametrize("chat", [False, True])
def test_plain_prompts_end_with_the_separator(tmp_path, chat):
    trainer = tiny.ppo_trainer(tmp_path, chat=chat, eval_data=tiny.prompts(chat=chat), response_separator=" ->")
    for dataset in (trainer.train_dataset, trainer.eval_dataset):
        prompt = dataset[0]["prompt"]
        assert prompt == ([{"role": "user", "content": "hello"}] if chat else "hello ->")


def test_a_field_of_the_record_is_filled_once():
    rollout = Rollout([{"prompt": "hello"}])
    assert not rollout.has("scores")
    with pytest.raises(AttributeError):
        rollout.scores  # noqa: B018
    rollout.scores = torch.zeros(1)
    with pytest.raises(AttributeError, match="`scores` of this rollout is filled already"):
        rollout.scores = torch.ones(1)
