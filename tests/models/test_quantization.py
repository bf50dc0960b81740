"""Real 4-bit bases: bitsandbytes runs NF4 on the CPU."""

import oracles
import pytest
import tiny
import torch
from peft import PeftModel
from tiny_steps import trainer_of
from tolerances import BF16, EXACT, FP32, MERGED, SCORES, assert_close
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, pipeline

from rlhf_recipes.models.adapters import adapter_weights
from rlhf_recipes.models.loading import load_policy
from rlhf_recipes.models.quantization import QUANTIZATION_FILE, keep_unpacked, saved_quantization
from rlhf_recipes.models.reward_model import load_reward_model
from rlhf_recipes.rewards.adapter import REWARD_ADAPTER
from rlhf_recipes.rewards.process import ProcessRewardModelScorer
from rlhf_recipes.rewards.scorer import RewardModelScorer

pytestmark = [pytest.mark.tiny, pytest.mark.portable]

bitsandbytes = pytest.importorskip("bitsandbytes")

NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,  # for machines without bfloat16, which a GPU would use
)
SCORERS = {"prm": ProcessRewardModelScorer, "rm": RewardModelScorer}
IDS = torch.tensor([[60, 61, 62, 63, 64]])


@pytest.fixture
def base(tmp_path):
    """Write an SFT policy, and return its path."""
    return tiny.save(tiny.policy(tiny.tokenizer()), tmp_path / "base")


def _trainer(model, output_dir, **kwargs):
    return tiny.ppo_trainer(output_dir, model=model, quantization=NF4, **kwargs)


def _logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS.to(model.device)).logits.cpu()


def _linears(model):
    return [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]


def test_only_adapter_and_value_head_learn(tmp_path, base):
    trainer = _trainer(base, tmp_path / "out", peft=tiny.lora(), max_steps=8, vf_coef=1.0)
    linears = _linears(trainer.model)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    assert len(linears) == 14, "every projection of both layers is in 4 bit"
    assert all(p.dtype == torch.float32 for n, p in trainer.model.named_parameters() if "value_head.modules" in n)
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(before[n], p)}
    assert any("lora" in name for name in moved)
    assert any("value_head" in name for name in moved)
    assert all("lora" in name or "value_head" in name for name in moved)


@pytest.mark.parametrize("start", ["new adapter", "sft adapter"])
def test_the_first_rollout_has_no_kl(tmp_path, base, start):
    if start == "sft adapter":
        tiny.sft_adapter(AutoModelForCausalLM.from_pretrained(base)).save_pretrained(tmp_path / "sft")
        trainer = _trainer(str(tmp_path / "sft"), tmp_path / "out")
    else:
        trainer = _trainer(base, tmp_path / "out", peft=tiny.lora())
    assert _linears(trainer.model)
    batch = tiny.rollout(trainer)
    kl = (batch["old_per_token_logps"] - batch["ref_per_token_logps"]) * batch["completion_mask"]
    assert_close(kl, torch.zeros_like(kl), EXACT)
    trainer.train()
    batch = tiny.rollout(trainer)
    kl = (batch["old_per_token_logps"] - batch["ref_per_token_logps"]) * batch["completion_mask"]
    assert kl.abs().max() > 0, "the reference must stay where it was"


def test_gradients_after_a_rollout_are_those_of_the_dequantised_model(tmp_path, base):
    """With AVX512-BF16, bitsandbytes would repack weights in a forward without gradient. Elsewhere it does not."""
    trainer = _trainer(base, tmp_path / "out", peft=tiny.lora())
    assert all(linear.support_avx512bf16_for_cpu is False for linear in _linears(trainer.model))
    batch = tiny.rollout(trainer)
    trainer.current_gradient_accumulation_steps = 1

    def gradients():
        trainer.model.zero_grad()
        trainer._compute_loss(trainer.model, batch).backward()
        return {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}

    quantized = gradients()
    for name, module in list(trainer.model.named_modules()):
        if name.endswith("base_layer"):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain = torch.nn.Linear(module.in_features, module.out_features, bias=False)
            plain.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
            trainer.model.get_submodule(name.rpartition(".")[0]).base_layer = plain
    assert not _linears(trainer.model)
    for name, gradient in gradients().items():
        assert_close(quantized[name].float(), gradient.float(), MERGED)


def test_the_guard_finds_every_packed_layer(monkeypatch):
    """bitsandbytes is told that this processor has AVX512-BF16."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    model = torch.nn.Sequential(bitsandbytes.nn.Linear4bit(64, 64), torch.nn.Linear(64, 64))
    assert model[0].support_avx512bf16_for_cpu
    assert not keep_unpacked(model)[0].support_avx512bf16_for_cpu


def test_adapter_and_head_reload_and_continue(tmp_path, base):
    trainer = _trainer(base, tmp_path / "out", peft=tiny.lora(), max_steps=8, learning_rate=1e-2, vf_coef=1.0)
    trainer.train()
    trainer.save_model()
    expected = _logits(trainer.model)
    loaded = load_policy(str(tmp_path / "out"), quantization_config=NF4)
    assert isinstance(loaded, PeftModel)
    assert_close(_logits(loaded), expected, FP32)

    again = _trainer(str(tmp_path / "out"), tmp_path / "again", vf_coef=1.0)
    head, saved = (
        again.model.value_head.modules_to_save["default"],
        trainer.model.value_head.modules_to_save["default"],
    )
    assert saved.output.weight.abs().sum() > 0
    assert_close(head.output.weight, saved.output.weight, EXACT)
    assert_close(_logits(again.model), expected, FP32)
    again.train()
    remembered = tiny.ppo_trainer(tmp_path / "remembered", model=str(tmp_path / "out"))
    assert len(_linears(remembered.model)) == 14, "in 4 bit without being told"


def test_a_resumed_run_keeps_the_precision_of_its_adapter(tmp_path, base):
    """PEFT would widen it. The logits of the resumed model would then differ from those before the stop."""
    options = {"learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 4, "max_steps": 4}
    first = _trainer(base, tmp_path / "out", peft=tiny.lora(), **options)
    first.train()
    resumed = _trainer(base, tmp_path / "again", peft=tiny.lora(), **options)
    resumed._load_from_checkpoint(str(tmp_path / "out" / "checkpoint-4"))
    expected = {name: p for name, p in first.model.named_parameters() if p.requires_grad}
    restored = dict(resumed.model.named_parameters())
    assert {p.dtype for p in expected.values()} == {torch.bfloat16, torch.float32}, "adapter and value head"
    for name, parameter in expected.items():
        assert restored[name].dtype == parameter.dtype
        assert_close(restored[name], parameter, EXACT)
    resumed.args.max_steps = 8
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert resumed.state.global_step == 8
    assert all(restored[name].dtype == parameter.dtype for name, parameter in expected.items())


def test_an_export_is_merged_into_what_the_adapter_was_trained_on(tmp_path, base):
    trainer = _trainer(base, tmp_path / "out", peft=tiny.lora(), max_steps=8, learning_rate=1e-2)
    trainer.train()
    trainer.save_model()
    expected = _logits(trainer.model)
    merged = load_policy(str(tmp_path / "out"))
    assert not _linears(merged)
    assert_close(_logits(merged), expected, BF16)  # the adapter's precision in training
    original = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    error = (_logits(original) - expected).abs().max()
    assert error > 0.1, "the rounding to 4 bits must be visible, or this proves nothing"


def test_the_start_of_a_4bit_policy_is_its_rounded_base(tmp_path, base):
    """With a base in full precision, an evaluation would count the rounding as progress."""
    trainer = _trainer(base, tmp_path / "out", peft=tiny.lora())
    trainer.save_model()
    policy = _logits(load_policy(str(tmp_path / "out")))
    start = _logits(load_policy(base, base_quantization=saved_quantization(tmp_path / "out")))
    assert_close(policy, start, FP32)
    assert (_logits(load_policy(base)) - start).abs().max() > 0.01


def test_a_later_run_in_full_precision_forgets_the_quantisation(tmp_path, base):
    trainer = _trainer(base, tmp_path / "out", peft=tiny.lora())
    trainer.save_model()
    assert (tmp_path / "out" / QUANTIZATION_FILE).is_file()
    tiny.ppo_trainer(tmp_path / "out", peft=tiny.lora()).save_model()
    assert not (tmp_path / "out" / QUANTIZATION_FILE).exists()


def test_a_reward_model_scores_as_it_was_trained(tmp_path, base):
    options = {"max_steps": 8, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 8}
    trainer = tiny.reward_trainer(tmp_path / "rm", base, peft=tiny.lora(), quantization=NF4, **options)
    assert len(_linears(trainer.model)) == 14
    trainer.train()
    dtypes = {name: p.dtype for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer._load_from_checkpoint(str(tmp_path / "rm" / "checkpoint-8"))
    assert {name: p.dtype for name, p in trainer.model.named_parameters() if p.requires_grad} == dtypes
    trainer.save_model()
    text = {"prompts": ["the fox\n\n"] * 2, "completions": ["is red", "berries"]}
    live = RewardModelScorer(trainer.model.eval(), tiny.tokenizer())(**text)
    loaded = load_reward_model(str(tmp_path / "rm"))
    assert len(_linears(loaded)) == 14, "in 4 bit without being told"
    assert_close(RewardModelScorer(loaded, tiny.tokenizer())(**text), live, FP32)
    ppo = tiny.ppo_trainer(tmp_path / "ppo", rewards=str(tmp_path / "rm"), peft=tiny.lora())
    ppo.train()

    # Policy, reference, reward model and critic on one base.
    for critic in ("reward", "adapter"):
        adapter = {"rewards": None, "reward_adapter": str(tmp_path / "rm"), "critic": critic, "max_steps": 8}
        shared = _trainer(base, tmp_path / critic, peft=tiny.lora(), **adapter)
        assert len(_linears(shared.model)) == 14
        assert_close(shared.reward_funcs[0](**text), live, FP32)
        before = {name: weight.clone() for name, weight in shared.critic.adapter.items()}
        shared.train()
        assert shared.rollout.state_values.std() > 0
        assert_close(shared.reward_funcs[0](**text), live, FP32)
        for name, weight in shared.critic.adapter.items():
            assert weight.dtype == torch.float32
            assert not torch.equal(weight, before[name])
    reward = adapter_weights(shared.model, REWARD_ADAPTER)
    assert before, "the last run's critic has an adapter"
    for name, weight in before.items():
        assert_close(weight, reward[name], EXACT)


def test_several_score_heads_on_one_quantised_backbone(tmp_path, base):
    options = {"score_heads": 3, "max_steps": 4, "learning_rate": 1e-2}
    trainer = tiny.reward_trainer(tmp_path / "rm", base, peft=tiny.lora(), quantization=NF4, **options)
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    scorer = RewardModelScorer.from_pretrained(str(tmp_path / "rm"))
    assert len(_linears(scorer.model)) == 14
    rows = scorer.token_ids(["the fox\n\n"] * 2, ["is red", "berries"], [True, True])
    live = RewardModelScorer(trainer.model.eval(), tiny.tokenizer(), trainer.card).head_scores(rows)
    assert live.std(dim=1).min() > 0
    assert_close(scorer.head_scores(rows), live, FP32)
    rules = {"reward_heads": "pessimistic", "reward_adapter": str(tmp_path / "rm"), "critic": "reward", "max_steps": 8}
    ppo = _trainer(base, tmp_path / "ppo", peft=tiny.lora(), rewards=None, **rules)
    ppo.train()
    assert_close(ppo.scorers[0].head_scores(rows), live, FP32)
    assert ppo.rollout.state_values.std() > 0


def test_a_process_reward_model_judges_as_it_was_trained(tmp_path, base):
    trainer = trainer_of(tmp_path / "prm", base, peft=tiny.lora(), quantization=NF4, learning_rate=1e-2)
    assert len(_linears(trainer.model)) == 14, "every projection of both layers is in 4 bit, and the head is not"
    trainer.train()
    trainer.save_model()
    assert saved_quantization(tmp_path / "prm") is not None
    text = {"prompts": ["hello\n\n"], "completions": ["the fox is red\nthe bear"]}
    live = ProcessRewardModelScorer(trainer.model, tiny.tokenizer())(**text)
    loaded = ProcessRewardModelScorer.from_pretrained(str(tmp_path / "prm"))(**text)
    assert_close(torch.tensor([r for _, r in loaded[0]]), torch.tensor([r for _, r in live[0]]), FP32)


def _by_token(completion_ids, **kwargs):
    """Return a reward for each token."""
    return [[float(token % 5) - 1 for token in ids] for ids in completion_ids]


def test_dense_rewards_and_the_full_kl_on_one_quantised_backbone(tmp_path, base):
    """A function and a process reward model reward tokens. All other roles share the policy's backbone."""
    tiny.save_lora_reward_model(base, tmp_path / "rm", max_steps=2, learning_rate=1e-2, quantization=NF4)
    judge = trainer_of(tmp_path / "prm", base, peft=tiny.lora(), quantization=NF4, learning_rate=1e-2)
    judge.train()
    judge.save_model()
    rewards = {"rewards": [_by_token, str(tmp_path / "prm")], "reward_adapter": str(tmp_path / "rm")}
    options = {"kl_estimator": "full", "reward_norm": False, "learning_rate": 1e-2, "max_steps": 8}
    judge, alone = (kind.from_pretrained(str(tmp_path / name)) for name, kind in SCORERS.items())
    alone.policy_eos_token_ids = tiny.END_IDS
    start = keep_unpacked(AutoModelForCausalLM.from_pretrained(base, quantization_config=NF4))
    for critic in ("reward", "adapter"):
        trainer = _trainer(base, tmp_path / critic, peft=tiny.lora(), critic=critic, **rewards, **options)
        trainer.train()
        first, second = tiny.logged(trainer, "objective/kl_full").values()
        assert first == 0.0 < second
        batch, rollout = tiny.rollout(trainer), trainer.rollout
        assert (rollout.parts != 0).sum(dim=1).max() > 1
        assert rollout.state_values.std() > 0
        assert_close((rollout.rewards + 0.05 * rollout.full_kl).sum(dim=1), rollout.scores, FP32)
        steps = judge(rollout.prompts, rollout.completions)
        by_token = zip(_by_token(rollout.completion_id_lists), steps, strict=True)
        dense = torch.tensor([sum(tokens) + sum(reward for _, reward in of_row) for tokens, of_row in by_token])
        assert_close(rollout.parts.sum(dim=1), dense, FP32)
        answers = alone(rollout.prompts, rollout.completions, rollout.completion_id_lists)
        assert_close(rollout.scores, dense + torch.tensor(answers), FP32)
        ours, theirs = (tiny.log_probs(model.eval(), batch).tolist() for model in (trainer.model, start))
        for row, width in enumerate(batch["completion_mask"].sum(1).tolist()):
            expected = [oracles.exact_kl(ours[row][t], theirs[row][t]) for t in range(width)]
            assert_close(rollout.full_kl[row, :width], expected, SCORES)


def test_quantised_weights_are_not_trained(tmp_path, base):
    with pytest.raises(ValueError, match="set `use_peft: true` beside `load_in_4bit`"):
        _trainer(base, tmp_path / "out")


def test_a_pipeline_continues_as_the_policy_would(tmp_path, base):
    trainer = _trainer(base, tmp_path / "out", peft=tiny.lora(), max_steps=8, learning_rate=1e-2)
    trainer.train()
    trainer.save_model()
    load_policy(str(tmp_path / "out")).save_pretrained(tmp_path / "export")
    tiny.tokenizer().save_pretrained(tmp_path / "export")
    generate = pipeline("text-generation", model=str(tmp_path / "export"))
    text = generate("the fox", max_new_tokens=8, do_sample=False, return_full_text=False)[0]["generated_text"]
    prompt = tiny.tokenizer()("the fox", return_tensors="pt").to(tiny.DEVICE)
    live = trainer.model.eval().generate(**prompt, max_new_tokens=8, do_sample=False)
    assert text == tiny.tokenizer().decode(live[0, prompt["input_ids"].size(1) :], skip_special_tokens=True)
