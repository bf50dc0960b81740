"""Switches for memory and speed, together with all additions of PPO."""

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tolerances import MERGED, SPLIT, assert_close
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.tiny


@pytest.fixture
def base(tmp_path):
    """Write a policy and a reward model, for switches that change the loading."""
    tok = tiny.tokenizer()
    for name, model in (("base", tiny.policy(tok)), ("rm", tiny.reward_model(tok))):
        tiny.save(model, tmp_path / name)
    return tmp_path


def _loss_and_gradients(directory, *, peft=None, **options):
    models = {"model": str(directory / "base"), "rewards": str(directory / "rm"), "peft": peft}
    trainer = tiny.ppo_trainer(directory / "out", **models, vf_coef=0.5, **options)
    batch = tiny.rollout(trainer)
    if options.get("gradient_checkpointing"):  # `train` does this at its start
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
        assert trainer.model.is_gradient_checkpointing
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    return trainer, loss, gradients


@pytest.mark.parametrize("peft", [None, tiny.lora()], ids=["full", "lora"])
@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"model_init_kwargs": {"attn_implementation": "eager"}},
        {"pad_to_multiple_of": 8},
        {"cast_lm_head_to_fp32": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_a_switch_changes_no_number(base, options, peft):
    _, loss, gradients = _loss_and_gradients(base, peft=peft)
    _, switched_loss, switched = _loss_and_gradients(base, peft=peft, **options)
    assert_close(switched_loss, loss, SPLIT)
    assert switched.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert_close(switched[name], gradient, SPLIT)


def test_the_attention_is_the_one_asked_for_in_every_model(base):
    trainer, _, _ = _loss_and_gradients(base, model_init_kwargs={"attn_implementation": "eager"})
    models = [trainer.model, trainer.ref_model, trainer.reward_funcs[0].model]
    assert {model.config._attn_implementation for model in models} == {"eager"}


def test_a_bfloat16_policy_keeps_float32_heads(base):
    trainer, loss, gradients = _loss_and_gradients(base, model_init_kwargs={"dtype": "bfloat16"})
    assert trainer.model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert trainer.model.value_head.output.weight.dtype == torch.float32
    assert trainer.reward_funcs[0].model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert trainer.reward_funcs[0].model.score.weight.dtype == torch.float32
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.filterwarnings("ignore:.*page")
def test_the_optimiser_may_hold_8_bit_states(base):
    pytest.importorskip("bitsandbytes")
    trainer, _, _ = _loss_and_gradients(base, optim="paged_adamw_8bit", max_steps=4)
    trainer.train()
    assert torch.uint8 in {state["state1"].dtype for state in trainer.optimizer.state.values()}
    start = AutoModelForCausalLM.from_pretrained(base / "base")
    assert not torch.equal(trainer.model.lm_head.weight, start.lm_head.weight)


@pytest.mark.slow(reason="compiles for a quarter of a minute, and little here is code of the package")
def test_a_compiled_policy_trains_the_same_weights(tmp_path, monkeypatch):
    for name in ("BACKEND", "MODE"):  # transformers passes its choice to accelerate in these
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", "")
        monkeypatch.delenv(f"ACCELERATE_DYNAMO_{name}")
    runs = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):  # captured, not generated
        policy = tiny.policy(tiny.tokenizer())
        del policy.model.layers[1:]  # one layer: to capture each takes seconds
        policy.config.num_hidden_layers = 1
        trainer = tiny.ppo_trainer(tmp_path, model=policy, max_steps=4, learning_rate=1e-3, vf_coef=0.5, **options)
        trainer.train()
        runs.append(trainer)
    plain, compiled = runs
    assert type(compiled.model_wrapped).__name__ == "OptimizedModule"
    assert type(plain.model_wrapped).__name__ != "OptimizedModule"
    # The policy of the rollout is not compiled either. Otherwise the two would round in other ways.
    assert type(compiled.ref_model).__name__ != "OptimizedModule"
    expected = dict(plain.model.named_parameters())
    for name, parameter in compiled.model.named_parameters():
        assert_close(parameter, expected[name], MERGED)
    compiled.save_model(tmp_path / "saved")
    assert "lm_head.weight" in load_file(tmp_path / "saved" / "model.safetensors")
