"""The update: its loss, the averaging, the trained parameters, and the number of forwards."""

from collections import Counter

import oracles
import pytest
import tiny
import torch
from tolerances import EXACT, FP32, SPLIT, assert_close
from trl import GRPOTrainer

pytestmark = [pytest.mark.tiny, pytest.mark.portable]


def _loss(trainer, batch, accumulation=1):
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = accumulation
    return trainer._compute_loss(trainer.model, batch)


def _trained_rollout(tmp_path, **kwargs):
    """Return a trainer whose policy has moved since its rollout, and the rollout."""
    trainer = tiny.ppo_trainer(tmp_path, per_device_train_batch_size=8, steps_per_generation=1, **kwargs)
    batch = tiny.rollout(trainer)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            scale = 0.5 if "value_head.output" in name else 0.02
            parameter.add_(torch.randn_like(parameter) * scale)
    return trainer, batch


def test_policy_loss_is_the_clipped_surrogate(tmp_path):
    """Our formula is in the oracle, and this test compares TRL's with it."""
    trainer, batch = _trained_rollout(tmp_path, vf_coef=0.0, epsilon=0.05, epsilon_high=0.1)
    rows = [
        t.detach().double().tolist()
        for t in (tiny.logps(trainer, batch), batch["old_per_token_logps"], batch["advantages"])
    ]
    expected = oracles.clipped_surrogate(*rows, batch["completion_mask"].tolist(), epsilon_low=0.05, epsilon_high=0.1)
    assert_close(_loss(trainer, batch), expected, FP32)


@pytest.mark.parametrize("level", ["sequence", "prefix"])
def test_the_trust_region_stops_the_gradient_of_tokens_outside(tmp_path, level):
    """Inside, the gradient is that of the clipped surrogate. Outside there is none, except that of TRL's KL term."""
    options = {"epsilon": 0.1, "epsilon_high": 0.2, "beta": 0.3, "use_bias_correction_kl": False, "vf_coef": 0.0}
    trainer, batch = _trained_rollout(tmp_path, importance_sampling_level=level, **options)
    actual = _gradients(trainer, [_loss(trainer, batch)])
    logps, mask = tiny.logps(trainer, batch), batch["completion_mask"]
    log_ratio, advantages = logps - batch["old_per_token_logps"], batch["advantages"]
    rows = [x.detach().tolist() for x in (log_ratio, advantages, mask)]
    inside = torch.tensor(
        oracles.trust_region(*rows, level=level, epsilon_low=0.1, epsilon_high=0.2), device=tiny.DEVICE
    )
    assert 0.05 < inside.sum() / mask.sum() < 0.95
    ratio = log_ratio.exp()
    surrogate = torch.min(ratio * advantages, ratio.clamp(0.9, 1.2) * advantages)
    gap = batch["ref_per_token_logps"] - logps
    token_loss = (0.3 * (gap.exp() - gap - 1) - surrogate * inside) * mask
    expected = _gradients(trainer, [(token_loss.sum(dim=1) / mask.sum(dim=1)).mean()])
    for name, gradient in expected.items():
        assert_close(actual[name], gradient, SPLIT)
    stopped = 1 - inside.sum() / mask.sum()
    assert trainer._metrics["train"]["policy/clip_fraction"][-1] == pytest.approx(stopped.item())


def test_the_trust_region_compares_with_the_policy_of_the_rollout(tmp_path):
    """vLLM's own log-probabilities differ a little for each token, and this sums up over a completion."""
    trainer, batch = _trained_rollout(tmp_path, importance_sampling_level="sequence", epsilon=0.1)
    expected = _loss(trainer, batch)
    of_engine = batch["old_per_token_logps"] + 0.5
    assert_close(_loss(trainer, batch | {"sampling_per_token_logps": of_engine}), expected, EXACT)


def test_value_loss_is_the_definition(tmp_path):
    trainer, batch = _trained_rollout(tmp_path, vf_coef=0.7, cliprange_value=0.1)
    values = trainer._forward(trainer.model, batch).state_values[:, :-1]
    arguments = [t.detach().double().tolist() for t in (values, batch["old_values"], batch["returns"])]
    value_loss = oracles.clipped_value_loss(*arguments, batch["completion_mask"].tolist(), 0.1)
    trainer.args.vf_coef = 0.0
    policy_loss = _loss(trainer, batch)
    trainer.args.vf_coef = 0.7
    assert value_loss > 0
    assert_close(_loss(trainer, batch) - policy_loss, 0.7 * value_loss, FP32)


def _gradients(trainer, losses):
    trainer.model.zero_grad()
    sum(losses).backward()
    return {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_loss_does_not_depend_on_the_micro_batches(tmp_path, loss_type, size):
    trainer, batch = _trained_rollout(tmp_path, loss_type=loss_type, vf_coef=0.5)
    whole = _loss(trainer, batch)
    expected = _gradients(trainer, [whole])
    chunks = 8 // size
    trainer.args.steps_per_generation = chunks
    parts = [{k: v[i * size : (i + 1) * size] if v.ndim else v for k, v in batch.items()} for i in range(chunks)]
    losses = [_loss(trainer, part, accumulation=chunks) for part in parts]
    assert_close(sum(losses), whole, SPLIT)
    actual = _gradients(trainer, losses)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(actual[name], gradient, SPLIT)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_value_loss_is_averaged_like_the_policy_loss(tmp_path, loss_type):
    """With ratio 1 and advantage -1 everywhere, TRL's policy loss is an average of ones. Ours must be the same."""
    trainer = tiny.ppo_trainer(tmp_path, loss_type=loss_type, vf_coef=0.0, gradient_accumulation_steps=2)
    batch = tiny.rollout(trainer)
    batch["advantages"] = -torch.ones_like(batch["advantages"])
    half = {k: v[:4] if v.ndim else v for k, v in batch.items()}
    policy_loss = _loss(trainer, half, accumulation=2)
    mask = half["completion_mask"]
    ours = trainer._average_like_policy_loss(torch.ones_like(half["returns"]), mask, half["num_items_in_batch"])
    assert len(set(mask.sum(1).tolist())) > 1, "the completions must differ in length"
    assert_close(ours, policy_loss, FP32)


def test_value_loss_trains_the_head_only(tmp_path):
    trainer, batch = _trained_rollout(tmp_path)
    batch["advantages"] = torch.zeros_like(batch["advantages"])
    gradients = _gradients(trainer, [_loss(trainer, batch)])
    assert gradients["value_head.output.weight"].abs().sum() > 0
    assert gradients["value_head.hidden.weight"].abs().sum() > 0
    assert all(g.abs().sum() == 0 for n, g in gradients.items() if "value_head" not in n)


def test_value_loss_trains_the_backbone_when_asked_to(tmp_path):
    trainer, batch = _trained_rollout(tmp_path, value_gradient_to_backbone=True)
    batch["advantages"] = torch.zeros_like(batch["advantages"])
    gradients = _gradients(trainer, [_loss(trainer, batch)])
    assert gradients["model.layers.0.mlp.down_proj.weight"].abs().sum() > 0


def test_policy_loss_does_not_train_the_head(tmp_path):
    trainer, batch = _trained_rollout(tmp_path, vf_coef=0.0)
    gradients = _gradients(trainer, [_loss(trainer, batch)])
    assert gradients["model.layers.0.mlp.down_proj.weight"].abs().sum() > 0
    assert gradients["value_head.output.weight"].abs().sum() == 0


def test_kl_is_paid_once(tmp_path):
    """TRL's k3 term is not in the loss unless the user asks for it too."""
    trainer, batch = _trained_rollout(tmp_path, vf_coef=0.0)
    assert trainer.beta == 0.0
    without = _loss(trainer, batch)
    batch["ref_per_token_logps"] = batch["ref_per_token_logps"] - 1.0
    assert_close(_loss(trainer, batch), without, FP32)
    trainer.beta = 0.1
    assert abs(_loss(trainer, batch) - without) > 1e-3


def test_padding_reaches_neither_loss_nor_gradient(tmp_path):
    trainer, batch = _trained_rollout(tmp_path)
    expected = _loss(trainer, batch)
    gradients = _gradients(trainer, [expected])
    for name in ("returns", "old_values"):
        batch[name] = batch[name].masked_fill(batch["completion_mask"] == 0, torch.nan)
    assert (batch["completion_mask"] == 0).any()
    assert_close(_loss(trainer, batch), expected, FP32)
    for name, gradient in _gradients(trainer, [_loss(trainer, batch)]).items():
        assert_close(gradient, gradients[name], FP32)


@pytest.mark.parametrize("peft", [None, tiny.lora()], ids=["full", "lora"])
@pytest.mark.parametrize("num_iterations", [1, 2])
def test_one_reference_serves_both_kl_terms(tmp_path, peft, num_iterations):
    """With `beta`, TRL runs the reference itself: with LoRA on the same network, and before the policy if aligned."""
    options = {"num_iterations": num_iterations, "gradient_accumulation_steps": 2}
    trainer = tiny.ppo_trainer(tmp_path, peft=peft, beta=0.1, **options)
    assert trainer.beta == trainer.args.beta == 0.1
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad and "value_head" not in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    batch = tiny.rollout(trainer)
    reference = {name: x for name, x in batch.items() if name != "ref_per_token_logps"}
    keep = batch["completion_mask"]
    for name, expected in (
        ("old_per_token_logps", trainer._forward(trainer.model, batch).per_token_logps),
        ("ref_per_token_logps", trainer._reference_logps(reference)),
    ):
        assert_close(batch[name] * keep, expected * keep, FP32)
    assert (batch["old_per_token_logps"] - batch["ref_per_token_logps"]).abs().max() > 1e-3


@pytest.mark.parametrize("peft", [None, tiny.lora()], ids=["full", "lora"])
@pytest.mark.parametrize("num_iterations", [1, 2])
def test_a_rollout_costs_one_policy_and_one_reference_forward(tmp_path, monkeypatch, peft, num_iterations):
    """The counts are per micro-batch, without generation. TRL makes the policy's forward only with several epochs."""
    monkeypatch.setattr("rlhf_recipes.models.forward.ROWS_WITHOUT_GRADIENT", 1)
    trainer = tiny.ppo_trainer(tmp_path, peft=peft, num_iterations=num_iterations, gradient_accumulation_steps=2)
    calls = Counter()

    def count(model, name):
        forward = model.forward

        def counted(*args, **kwargs):
            if kwargs.get("fused_lm_head"):
                active = (
                    name if peft is None or not model.model.layers[0].mlp.up_proj.disable_adapters else "reference"
                )
                calls[active, torch.is_grad_enabled()] += 1
            return forward(*args, **kwargs)

        model.forward = counted

    count(trainer.model.get_base_model() if peft else trainer.model, "policy")
    if trainer.ref_model is not None:
        count(trainer.ref_model, "reference")
    trainer.args.max_steps = num_iterations
    trainer.train()
    micro_batches = 2
    assert calls["policy", False] == micro_batches
    assert calls["reference", False] == micro_batches
    assert calls["policy", True] == micro_batches * num_iterations
    assert calls["reference", True] == 0


@pytest.mark.parametrize("peft", [None, tiny.lora()], ids=["full", "lora"])
def test_critic_warmup_moves_the_head_alone(tmp_path, peft):
    trainer = tiny.ppo_trainer(
        tmp_path, peft=peft, critic_warmup_steps=4, max_steps=4, weight_decay=0.1, kl_controller="adaptive"
    )
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(before[n], p)}
    assert moved
    assert all("value_head" in name for name in moved)
    assert trainer.kl_controller.kl_coef == trainer.args.kl_coef


def test_policy_moves_after_the_warmup_as_if_it_were_new(tmp_path):
    """Adam has not counted the warm-up steps of the policy. So the first step is not longer than the learning rate."""
    trainer = tiny.ppo_trainer(tmp_path, critic_warmup_steps=4, max_steps=5, lr_scheduler_type="constant")
    before = trainer.model.lm_head.weight.clone()
    trainer.train()
    step = (trainer.model.lm_head.weight - before).abs().max()
    assert 0 < step <= trainer.args.learning_rate * 1.01


def test_adam_divides_by_no_less_than_the_default_of_ppo(tmp_path):
    trainer = tiny.ppo_trainer(tmp_path)
    trainer.create_optimizer()
    assert trainer.optimizer.defaults["eps"] == 1e-5


@pytest.mark.parametrize("peft", [None, tiny.lora()], ids=["full", "lora"])
@pytest.mark.parametrize(("option", "rate"), [({}, 1e-2), ({"value_head_learning_rate": 3e-4}, 3e-4)])
def test_the_value_head_learns_at_its_own_rate(tmp_path, peft, option, rate):
    trainer = tiny.ppo_trainer(tmp_path, peft=peft, learning_rate=1e-3, weight_decay=0.1, **option)
    stock = tiny.ppo_trainer(tmp_path, peft=peft, learning_rate=1e-3, weight_decay=0.1)
    expected = GRPOTrainer.create_optimizer(stock)
    decays = {id(p): g["weight_decay"] for g in expected.param_groups for p in g["params"]}
    decays = {name: decays[id(p)] for name, p in stock.model.named_parameters() if p.requires_grad}
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    groups = trainer.create_optimizer().param_groups
    assert all(group["params"] for group in groups), "DeepSpeed takes no empty group"
    found = {names[id(p)]: group for group in groups for p in group["params"]}
    assert found.keys() == decays.keys()
    for name, group in found.items():
        assert group["lr"] == (rate if "value_head" in name else 1e-3)
        assert group["weight_decay"] == decays[name]
    assert trainer.create_optimizer() is trainer.optimizer
    assert groups[0]["lr"] == 1e-3, "the rate that is logged is the policy's"


def test_an_optimizer_of_the_users_own_is_left_alone(tmp_path):
    trainer = tiny.ppo_trainer(tmp_path)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.5)
    assert [group["lr"] for group in trainer.create_optimizer().param_groups] == [0.5]


def test_gradient_checkpointing_changes_no_number(tmp_path):
    losses = []
    for checkpointing in (False, True):
        trainer, batch = _trained_rollout(tmp_path, gradient_checkpointing=checkpointing)
        if checkpointing:  # `train` does this at its start
            trainer.model.gradient_checkpointing_enable()
            assert trainer.model.is_gradient_checkpointing
        losses.append(_loss(trainer, batch))
    assert_close(losses[0], losses[1], FP32)
