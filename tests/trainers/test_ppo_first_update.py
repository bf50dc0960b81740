"""Before the first step nothing has moved: ratio 1, approximate KL 0, KL to the reference 0."""

import itertools

import pytest
import tiny
import torch
from peft import PeftModel
from tolerances import EXACT, FIRST_UPDATE, FP32, NO_KL, assert_close
from transformers import AutoModelForCausalLM

from rlhf_recipes.models.critic import trained_value_head

pytestmark = [pytest.mark.tiny, pytest.mark.portable]

CASES = list(itertools.product(("full", "lora"), ("plain", "chat"), (False, True)))


def _first_rollout(tmp_path, peft, chat, pad_is_eos, repetition_penalty=None, **kwargs):
    tok = tiny.tokenizer(pad_is_eos=pad_is_eos)
    model = tiny.policy(tok)
    if repetition_penalty:
        model.generation_config.update(
            repetition_penalty=repetition_penalty, no_repeat_ngram_size=2, top_k=5, suppress_tokens=[20, 21]
        )
    trainer = tiny.ppo_trainer(
        tmp_path, model=model, tok=tok, chat=chat, peft=tiny.lora() if peft == "lora" else None, **kwargs
    )
    return trainer, tiny.rollout(trainer)


def _log_ratio(trainer, batch):
    trainer.current_gradient_accumulation_steps = 1
    trainer._compute_loss(trainer.model, batch)
    return (tiny.logps(trainer, batch) - batch["old_per_token_logps"]) * batch["completion_mask"]


@pytest.mark.parametrize(("peft", "chat", "pad_is_eos"), CASES)
def test_ratio_is_one_and_kl_is_zero(tmp_path, peft, chat, pad_is_eos):
    trainer, batch = _first_rollout(tmp_path, peft, chat == "chat", pad_is_eos)
    assert_close(_log_ratio(trainer, batch), torch.zeros_like(batch["old_per_token_logps"]), FIRST_UPDATE)
    kl = (batch["old_per_token_logps"] - batch["ref_per_token_logps"]) * batch["completion_mask"]
    assert_close(kl, torch.zeros_like(kl), NO_KL)
    metrics = trainer._metrics["train"]
    assert abs(metrics["objective/kl"][0]) < NO_KL["atol"]
    assert abs(metrics["policy/approx_kl"][0]) < NO_KL["atol"]


def test_kl_is_zero_with_a_head_in_float32(tmp_path):
    """TRL casts the policy's head, and not the reference's."""
    tok = tiny.tokenizer()
    model = tiny.policy(tok).bfloat16()
    batch = tiny.rollout(tiny.ppo_trainer(tmp_path, model=model, tok=tok, cast_lm_head_to_fp32=True))
    kl = (batch["old_per_token_logps"] - batch["ref_per_token_logps"]) * batch["completion_mask"]
    assert_close(kl, torch.zeros_like(kl), EXACT)


def test_the_reference_of_an_instance_in_training_mode_drops_nothing(tmp_path):
    tok = tiny.tokenizer()
    model = tiny.policy(tok).train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    trainer = tiny.ppo_trainer(tmp_path, model=model, tok=tok)
    trainer.model.eval()  # this test is not about the policy's own dropout
    batch = trainer._generate_and_score_completions([trainer.train_dataset[i] for i in range(8)])
    kl = (batch["old_per_token_logps"] - batch["ref_per_token_logps"]) * batch["completion_mask"]
    assert_close(kl, torch.zeros_like(kl), NO_KL)


@pytest.mark.parametrize("peft", ["full", "lora"])
def test_processors_of_the_generation_config_do_not_reach_the_log_probabilities(tmp_path, peft):
    trainer, batch = _first_rollout(tmp_path, peft, chat=False, pad_is_eos=False, repetition_penalty=5.0)
    assert_close(_log_ratio(trainer, batch), torch.zeros_like(batch["old_per_token_logps"]), FIRST_UPDATE)
    kl = (batch["old_per_token_logps"] - batch["ref_per_token_logps"]) * batch["completion_mask"]
    assert_close(kl, torch.zeros_like(kl), NO_KL)


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_log_probabilities_are_those_of_the_sampling_temperature(tmp_path, temperature):
    trainer, batch = _first_rollout(tmp_path, "full", chat=False, pad_is_eos=False, temperature=temperature)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    length = batch["completion_ids"].size(1)
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = trainer.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    logits = logits[:, -length - 1 : -1] / temperature
    expected = logits.log_softmax(-1).gather(-1, batch["completion_ids"][..., None]).squeeze(-1)
    keep = batch["completion_mask"]
    assert_close(batch["old_per_token_logps"] * keep, expected * keep, FP32)
    assert_close(batch["ref_per_token_logps"] * keep, expected * keep, FP32)


def test_an_sft_adapter_is_its_own_reference(tmp_path):
    """The reference of a policy that starts from an adapter is that adapter, not the bare base."""
    tok = tiny.tokenizer()
    model = tiny.sft_adapter(tiny.policy(tok))
    trainer = tiny.ppo_trainer(tmp_path, model=model, tok=tok)
    batch = tiny.rollout(trainer)
    kl = (batch["old_per_token_logps"] - batch["ref_per_token_logps"]) * batch["completion_mask"]
    assert_close(kl, torch.zeros_like(kl), NO_KL)
    with model.disable_adapter():
        base = tiny.logps(trainer, batch)
    assert ((base - batch["ref_per_token_logps"]) * batch["completion_mask"]).abs().max() > 1e-3
    trainer.train()
    heads = {n: p for n, p in trainer.model.named_parameters() if "value_head" in n and p.requires_grad}
    assert any(p.abs().sum() > 0 for n, p in heads.items() if "output.weight" in n), "the head did not learn"


def test_the_reference_stays_where_it_was(tmp_path):
    trainer = tiny.ppo_trainer(tmp_path, max_steps=8, learning_rate=1e-2)
    before = [p.clone() for p in trainer.ref_model.parameters()]
    start = [p.clone() for p in trainer.model.model.parameters()]
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.ref_model.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(start, trainer.model.model.parameters(), strict=True))
    kls = [*tiny.logged(trainer, "objective/kl").values()]
    assert kls[0] == 0
    assert kls[1] != 0


def _saved_adapter(tmp_path):
    """Write an SFT adapter with its tokenizer, like `recipes/sft.py`."""
    tiny.policy(tiny.tokenizer()).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    return tiny.save(tiny.sft_adapter(base), tmp_path / "sft")


def test_the_path_of_an_adapter_is_a_policy(tmp_path):
    trainer = tiny.PPOTrainer(
        _saved_adapter(tmp_path), tiny.length_reward, tiny.ppo_config(tmp_path / "ppo"), train_dataset=tiny.prompts()
    )
    batch = tiny.rollout(trainer)
    kl = (batch["old_per_token_logps"] - batch["ref_per_token_logps"]) * batch["completion_mask"]
    assert_close(kl, torch.zeros_like(kl), NO_KL)
    before = {n: p.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert any("lora_A" in name for name in before)
    trainer.train()
    assert any(
        not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if n in before and "lora" in n
    )
    trainer.save_model()

    again = tiny.PPOTrainer(
        str(tmp_path / "ppo"), tiny.length_reward, tiny.ppo_config(tmp_path / "two"), train_dataset=tiny.prompts()
    )
    head, saved = trained_value_head(again.model), trained_value_head(trainer.model)
    assert saved.output.weight.abs().sum() > 0
    assert torch.equal(head.output.weight, saved.output.weight)


def test_a_frozen_adapter_is_refused(tmp_path):
    path = _saved_adapter(tmp_path)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), path)
    with pytest.raises(ValueError, match="is_trainable=True"):
        tiny.ppo_trainer(tmp_path, model=model)


def test_an_adapter_on_an_adapter_is_refused(tmp_path):
    with pytest.raises(ValueError, match="already has an adapter"):
        tiny.ppo_trainer(tmp_path, model=_saved_adapter(tmp_path), peft=tiny.lora())


def test_the_users_peft_config_stays_the_users(tmp_path):
    peft = tiny.lora()
    tiny.ppo_trainer(tmp_path, peft=peft)
    assert not peft.modules_to_save
