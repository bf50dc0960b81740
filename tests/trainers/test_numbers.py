"""The check of the numbers before the first step: it is quiet on a sound run, and names what is wrong with another."""

import pytest
import tiny
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tolerances import EXACT, MERGED, assert_close
from torch import nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM, PhimoeConfig, PhimoeForCausalLM

from rlhf_recipes.models import dropout, forward
from rlhf_recipes.options.recipes import PreflightArguments, TrackingArguments
from rlhf_recipes.preflight.preflight import preflight
from rlhf_recipes.trainers import setup

pytestmark = [pytest.mark.tiny, pytest.mark.portable]


def lora(**kwargs):
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **kwargs})


def trainer(tmp_path, model=None, tok=None, **kwargs):
    return tiny.ppo_trainer(
        tmp_path, model=model, tok=tok, **{"check_numerics": True, "max_steps": 1, "num_iterations": 1, **kwargs}
    )


def message(tmp_path, *args, **kwargs):
    """Return the message with which training ends before its first step."""
    started = trainer(tmp_path, *args, **kwargs)
    with pytest.raises(ValueError, match="switches this check off") as error:
        started.train()
    assert started.state.global_step == 0
    return str(error.value)


class NoisyLlama(LlamaForCausalLM):
    """Adds noise to the embeddings in training mode, in a way that nothing in its configuration shows."""

    def __init__(self, config):
        super().__init__(config)
        self.model.embed_tokens.register_forward_hook(
            lambda module, inputs, output: output + 0.01 * torch.randn_like(output) if module.training else output
        )


class ScaledLlama(LlamaForCausalLM):
    """Scales its logits by an entry of its configuration that TRL's fused head does not know."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * self.config.final_logit_multiplier
        return output


class BatchedLlama(LlamaForCausalLM):
    """Lets the rows of a batch see each other."""

    def __init__(self, config):
        super().__init__(config)
        self.model.embed_tokens.register_forward_hook(
            lambda module, inputs, output: output + 0.1 * output.mean(dim=(0, 1), keepdim=True)
        )


class IdleLlama(LlamaForCausalLM):
    """Has a layer that its forward does not use."""

    def __init__(self, config):
        super().__init__(config)
        self.idle_proj = nn.Linear(config.hidden_size, config.hidden_size)


class MasklessLlama(LlamaForCausalLM):
    """Attends to its padding."""

    def __init__(self, config):
        super().__init__(config)
        self.model.register_forward_pre_hook(
            lambda module, args, kwargs: (
                args,
                kwargs | {"attention_mask": torch.ones_like(kwargs["attention_mask"])},
            ),
            with_kwargs=True,
        )


def llama(cls=LlamaForCausalLM, tok=None, **changes):
    tok = tok or tiny.tokenizer()
    torch.manual_seed(0)
    model = cls(tiny._config(tok, **changes))
    model.generation_config.eos_token_id = tiny.END_IDS
    return model


@pytest.mark.parametrize("peft", [None, lora(), lora(init_lora_weights="gaussian"), "sft"])
def test_a_sound_run_prints_one_line(tmp_path, capsys, peft):
    model = tiny.sft_adapter(tiny.policy(tiny.tokenizer())) if peft == "sft" else None
    trainer(tmp_path, model, peft=None if peft == "sft" else peft).train()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("Numbers", "Error"))]
    assert len(lines) == 1
    assert lines[0].startswith("Numbers: ")


def test_the_check_changes_nothing(tmp_path):
    weights = []
    for check in (True, False):
        run = trainer(tmp_path / str(check), tiny.sft_adapter(tiny.policy(tiny.tokenizer())), check_numerics=check)
        run.train()
        weights.append({name: x.detach() for name, x in run.model.named_parameters()})
        assert all(x.grad is None or not x.grad.any() for x in run.model.parameters())
    for name, weight in weights[0].items():
        assert_close(weight, weights[1][name], EXACT)


PROMPT_TUNING = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
BROKEN = {
    "dropout that the user asked for": (
        {"attention_dropout": 0.3},
        {"disable_dropout": False},
        "`attention_dropout` is 0.3",
    ),
    "dropout of an adapter": ({}, {"peft": lora(lora_dropout=0.1), "disable_dropout": False}, "`dropout` is 0.1"),
    "noise on the embeddings": ({}, {"neftune_noise_alpha": 5.0}, "`neftune_noise_alpha`"),
    "noise that is new": ({"cls": NoisyLlama}, {}, "None of the usual causes"),
    "scaled logits": ({"cls": ScaledLlama, "final_logit_multiplier": 0.5}, {}, "`final_logit_multiplier: 0.5`"),
    "rows that see each other": ({"cls": BatchedLlama}, {}, "the padding of its batch"),
    "padding that is read": ({"cls": MasklessLlama}, {}, "the padding of its batch"),
    "PiSSA": ({}, {"peft": lora(init_lora_weights="pissa")}, "`init_lora_weights: pissa`"),
    "OLoRA": ({}, {"peft": lora(init_lora_weights="olora")}, "`init_lora_weights: olora`"),
    "an adapter that starts anywhere": ({}, {"peft": lora(init_lora_weights=False)}, "`init_lora_weights: False`"),
    "prompt tuning": ({}, {"peft": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")}, "PROMPT_TUNING"),
    "an adapter where nothing flows": (
        {"cls": IdleLlama},
        {"peft": lora(target_modules=["q_proj", "idle_proj"])},
        "idle_proj",
    ),
}


@pytest.mark.parametrize(("model", "options", "named"), BROKEN.values(), ids=BROKEN)
def test_what_is_broken_is_named(tmp_path, model, options, named):
    found = message(tmp_path, llama(**model), **options)
    assert named in found
    assert found.count("nats per token apart") <= 2


def test_logits_that_overflow_are_named(tmp_path):
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e38)
    assert "log-probabilities are not finite" in message(tmp_path, model)


def test_layers_that_an_adapter_repeats_are_taken(tmp_path):
    trainer(tmp_path, llama(), peft=lora(layer_replication=[[0, 2], [1, 2]])).train()


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_eight_bits_are_named(tmp_path):
    directory = tiny.save(llama(), tmp_path / "base")
    options = {"peft": lora(), "quantization": BitsAndBytesConfig(load_in_8bit=True)}
    assert "use `load_in_4bit`" in message(tmp_path / "out", directory, **options)


def test_dropout_by_module_is_named(tmp_path):
    model = llama()
    model.model.norm = nn.Sequential(model.model.norm, nn.Dropout(0.2))
    assert "`dropout` is 0.2" in message(tmp_path, model, disable_dropout=False)


def test_a_policy_that_is_not_the_given_model_is_named(tmp_path, monkeypatch):
    def spoil(policy, parts, args):
        setup.add_networks(policy, parts, args)
        with torch.no_grad():
            policy.get_base_model().model.embed_tokens.weight.mul_(1.1)

    monkeypatch.setattr("rlhf_recipes.trainers.ppo.add_networks", spoil)
    assert "does not start from the model that was given" in message(tmp_path, llama(), peft=lora())


def test_a_rope_that_changes_inside_a_batch_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf_recipes.models.rope.use_long_factors", lambda model: None)
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope["original_max_position_embeddings"] = 12
    data = tiny.Dataset.from_dict({"prompt": [f"{'the fox is red ' * i}{i}" for i in range(8)]})
    assert "rope changes at 12 tokens" in message(tmp_path, llama(rope_parameters=rope), data=data)


def test_a_head_of_the_rollout_that_errs_is_named(tmp_path, monkeypatch):
    """Policy and reference share it, so their KL of 0 does not show it."""

    def without_temperature(*args, **kwargs):
        return own_head(*args, **kwargs | {"temperature": 1.0})

    own_head = forward._own_head
    monkeypatch.setattr(forward, "is_triton_available", lambda: False)
    monkeypatch.setattr(forward, "_own_head", without_temperature)
    assert "A rollout gives other log-probabilities than the model" in message(tmp_path, llama(), temperature=0.5)


def test_a_value_loss_that_reaches_the_policy_is_named(tmp_path, monkeypatch):
    add_forward = setup.add_completion_forward
    monkeypatch.setattr(
        setup,
        "add_completion_forward",
        lambda model, **kwargs: add_forward(model, **kwargs | {"value_gradient_to_backbone": True}),
    )
    assert "The value loss would train" in message(tmp_path, llama(), max_steps=1)
    trainer(tmp_path / "asked", llama(), value_gradient_to_backbone=True).train()


@pytest.mark.parametrize("bias", ["all", "lora_only", None])
def test_weights_of_the_base_that_learn_beside_an_adapter_are_named(tmp_path, bias):
    if bias is not None:
        model = llama(attention_bias=True)
        assert "set `bias: none`" in message(tmp_path, model, peft=lora(bias=bias))
        return
    model = tiny.sft_adapter(llama())
    model.get_base_model().model.norm.weight.requires_grad_(True)
    assert "`base_model.model.model.norm.weight`" in message(tmp_path, model)


def test_a_reference_that_moves_ends_the_run_after_the_first_step(tmp_path):
    run = trainer(tmp_path, llama(), learning_rate=0.1, max_steps=3)
    run.ref_model.model.norm = run.model.model.norm
    with pytest.raises(ValueError, match="The reference has moved in the first optimiser step"):
        run.train()
    assert run.state.global_step == 1


def test_a_second_call_of_train_and_a_resume_do_not_expect_the_start(tmp_path):
    run = trainer(tmp_path, llama(), max_steps=2, save_strategy="steps", save_steps=1)
    run.train()
    run.train()
    again = trainer(tmp_path, llama(), max_steps=2, save_strategy="steps", save_steps=1)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_an_adapter_of_pissa_gets_a_copy_that_changes_no_base(tmp_path):
    model = get_peft_model(llama(), lora(init_lora_weights="pissa"))
    base = {name: x.detach().clone() for name, x in model.named_parameters() if "base_layer" in name}
    run = trainer(tmp_path, model)
    run.train()
    for name, weight in run.model.named_parameters():
        if name in base:
            assert_close(weight, base[name], EXACT)


def test_tokens_that_are_trained_alone_work_with_a_tied_head(tmp_path):
    tok = tiny.tokenizer()
    ends = {tok.eos_token_id, *tok("the fox")["input_ids"]}
    model = llama(tok=tok, tie_word_embeddings=True)
    run = trainer(tmp_path, model, tok, peft=lora(trainable_token_indices=sorted(ends)), learning_rate=0.1)
    base = run.model.get_base_model().get_input_embeddings().weight.detach().clone()
    run.train()
    changed = (run.model.get_base_model().get_input_embeddings().weight - base).abs().sum(dim=1).nonzero()[:, 0]
    assert {*changed.tolist()} <= ends
    assert changed.numel()


def test_noise_of_a_router_is_named(tmp_path):
    """It cannot be switched off: PhiMoE's router reads the same number in evaluation mode."""
    tok = tiny.tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = PhimoeConfig(
        vocab_size=len(tok), num_key_value_heads=2, num_local_experts=4, max_position_embeddings=128,
        router_jitter_noise=0.3, eos_token_id=tok.eos_token_id, **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    assert "`router_jitter_noise` is 0.3" in message(tmp_path, PhimoeForCausalLM(config))


def test_the_saved_configuration_keeps_its_dropout(tmp_path):
    run = trainer(tmp_path, llama(attention_dropout=0.2))
    assert not dropout.dropouts(run.model)
    run.save_model()
    assert LlamaForCausalLM.from_pretrained(tmp_path).config.attention_dropout == 0.2


def test_the_preflight_alone_checks_the_numbers_too(tmp_path, capsys):
    options = PreflightArguments(preflight_only=True), TrackingArguments(tracking=False)
    data = tiny.prompts()
    with pytest.raises(SystemExit) as ended:
        preflight(trainer(tmp_path / "sound"), data, None, *options)
    assert ended.value.code == 0
    assert "Numbers: " in capsys.readouterr().out
    with pytest.raises(ValueError, match="None of the usual causes"):
        preflight(trainer(tmp_path / "noisy", llama(cls=NoisyLlama)), data, None, *options)


def test_the_option_switches_the_check_off(tmp_path, capsys):
    trainer(tmp_path, llama(cls=NoisyLlama), check_numerics=False).train()
    assert "Numbers" not in capsys.readouterr().out


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", ["path", "instance", "adapter", "shared", "4 bit"])
def test_a_reward_model_in_the_run_scores_as_it_does_alone(tmp_path, monkeypatch, kind, bf16):
    tok = tiny.tokenizer()
    base = tiny.save(tiny.policy(tok), tmp_path / "base")
    if kind in ("adapter", "shared", "4 bit"):
        bits = BitsAndBytesConfig(load_in_4bit=True) if kind == "4 bit" else None
        tiny.save_lora_reward_model(base, tmp_path / "reward", max_steps=2, learning_rate=0.1, quantization=bits)
        rewards, options = str(tmp_path / "reward"), {"peft": lora(), "response_separator": "\n\n"}
        if kind == "shared":
            rewards, options = None, options | {"reward_adapter": rewards}
    else:
        model, options = tiny.reward_model(tok), {}
        rewards = tiny.save(model, tmp_path / "reward") if kind == "path" else model
    if kind == "instance":
        options["reward_tok"] = tok
    run = trainer(tmp_path / "out", base, tok, rewards=rewards, bf16=bf16, **options)
    (scorer,), compared = run.scorers, []
    alone = scorer.scores_alone
    monkeypatch.setattr(scorer, "scores_alone", lambda *rows: compared.append(alone(*rows)) or compared[0])
    run.train()
    ((scores, by_itself),) = compared
    assert len(scores) == len(set(scores)) == 3
    if not bf16 and kind != "4 bit":  # then the two differ by the rounding of the run, which the check allows
        assert_close(scores, by_itself, MERGED)


def test_a_reward_model_that_scores_otherwise_in_the_run_is_named(tmp_path):
    tok = tiny.tokenizer()
    directory = tiny.save(tiny.reward_model(tok), tmp_path / "reward")
    started = trainer(tmp_path / "out", tok=tok, rewards=directory)
    with torch.no_grad():
        started.scorers[0].model.score.weight.mul_(1.1)
    with pytest.raises(ValueError, match="The reward model reward gives other scores in the run"):
        started.train()
