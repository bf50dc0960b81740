"""Two rollouts on 41 configurations: exact at the start, and saved as plain transformers loads them.

Every trainer also runs its own check of the numbers, which must raise no false alarm. Greedy answers are the same
with rows that leave the batch.
"""

import pytest
import tiny
import torch
import transformers as tf
from peft import LoraConfig
from tolerances import FIRST_UPDATE, MERGED, NO_KL, assert_close

from rlhf_recipes.models.forward import keeps_logits, sampling_inputs
from rlhf_recipes.models.loading import load_policy
from rlhf_recipes.models.rope import use_long_factors
from rlhf_recipes.models.sampling import sample_without_ended

pytestmark = pytest.mark.tiny

FAST = {"llama", "llama tied", "qwen2", "qwen3", "gemma3", "mistral", "phi3 longrope", "gpt2", "falcon", "qwen3 moe"}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
PLACES = {"max_position_embeddings": 128, "initializer_range": 0.2}
GROUPED = {**SIZES, **PLACES, "num_key_value_heads": 2}
GEMMA = {**GROUPED, "head_dim": 8}
SLIDING = {"query_pre_attn_scalar": 8, "sliding_window": 8}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.2}
MOE = {**GROUPED, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 16}
LLAMA3 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
DEEPSEEK = {
    **GROUPED, "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip


def rope(kind, **parameters):
    return {"rope_type": kind, "rope_theta": 1e4, **parameters}


CONFIGS = {
    "llama": lambda: tf.LlamaConfig(**GROUPED),
    "llama tied": lambda: tf.LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "llama linear rope": lambda: tf.LlamaConfig(**GROUPED, rope_parameters=rope("linear", factor=2.0)),
    "llama dynamic rope": lambda: tf.LlamaConfig(**GROUPED, rope_parameters=rope("dynamic", factor=2.0)),
    "llama yarn": lambda: tf.LlamaConfig(**GROUPED, rope_parameters=rope("yarn", factor=2.0)),
    "llama llama3 rope": lambda: tf.LlamaConfig(**GROUPED, rope_parameters=rope("llama3", **LLAMA3)),
    "llama longrope": lambda: tf.LlamaConfig(**GROUPED, rope_parameters=rope("longrope", **FACTORS)),
    "qwen2": lambda: tf.Qwen2Config(**GROUPED),
    "qwen2 tied": lambda: tf.Qwen2Config(**GROUPED, tie_word_embeddings=True),
    "qwen2 moe": lambda: tf.Qwen2MoeConfig(**MOE, shared_expert_intermediate_size=16),
    "qwen3": lambda: tf.Qwen3Config(**GROUPED, head_dim=8),
    "qwen3 moe": lambda: tf.Qwen3MoeConfig(**MOE, head_dim=8, output_router_logits=True),
    "gemma": lambda: tf.GemmaConfig(**GEMMA),
    "gemma2": lambda: tf.Gemma2Config(**GEMMA, **SLIDING),
    "gemma3": lambda: tf.Gemma3TextConfig(**GEMMA, **SLIDING),
    "mistral": lambda: tf.MistralConfig(**GROUPED, sliding_window=8),
    "mixtral": lambda: tf.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "phi": lambda: tf.PhiConfig(**SIZES, **PLACES),
    "phi3": lambda: tf.Phi3Config(**GROUPED),
    "phi3 longrope": lambda: tf.Phi3Config(
        **GROUPED, rope_parameters=rope("longrope", **FACTORS), original_max_position_embeddings=16
    ),
    "gpt2": lambda: tf.GPT2Config(**GPT),
    "gptj": lambda: tf.GPTJConfig(**GPT, rotary_dim=4),
    "gpt_neo": lambda: tf.GPTNeoConfig(
        hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=8, **PLACES
    ),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**SIZES, **PLACES),
    "gpt_bigcode": lambda: tf.GPTBigCodeConfig(**GPT),
    "starcoder2": lambda: tf.Starcoder2Config(**GROUPED),
    "opt": lambda: tf.OPTConfig(
        hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32, init_std=0.2,
        max_position_embeddings=128,
    ),
    "bloom": lambda: tf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2),
    "falcon": lambda: tf.FalconConfig(**SIZES, **PLACES),
    "falcon alibi": lambda: tf.FalconConfig(**SIZES, **PLACES, alibi=True, new_decoder_architecture=False),
    "mpt": lambda: tf.MptConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=128, initializer_range=0.2),
    "cohere": lambda: tf.CohereConfig(**GROUPED),
    "cohere2": lambda: tf.Cohere2Config(**GROUPED, sliding_window=8),
    "granite": lambda: tf.GraniteConfig(**GROUPED, logits_scaling=4.0, residual_multiplier=0.5),
    "olmo2": lambda: tf.Olmo2Config(**GROUPED),
    "smollm3": lambda: tf.SmolLM3Config(**GROUPED),
    "stablelm": lambda: tf.StableLmConfig(**GROUPED),
    "nemotron": lambda: tf.NemotronConfig(**GROUPED),
    "deepseek v3": lambda: tf.DeepseekV3Config(**DEEPSEEK),
    "gpt_oss": lambda: tf.GptOssConfig(
        **GEMMA, num_local_experts=4, num_experts_per_tok=2, sliding_window=8, rope_parameters=rope("default")
    ),
    "mamba": lambda: tf.MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.2),
}  # fmt: skip
SLOW = pytest.mark.slow  # all of them take 90 s
CASES = [pytest.param(name, marks=() if name in FAST else SLOW) for name in CONFIGS]


def lora(name):
    targets = ["in_proj", "x_proj"] if name == "mamba" else "all-linear"
    return LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")  # experts take no dropout


def policy(name, tok):
    torch.manual_seed(0)
    config = CONFIGS[name]()
    config.vocab_size = len(tok)
    for token in ("pad", "eos", "bos"):
        setattr(config, f"{token}_token_id", getattr(tok, f"{token}_token_id"))
    model = tf.AutoModelForCausalLM.from_config(config).float()
    model.generation_config.eos_token_id = tiny.END_IDS
    return model


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", CASES)
def test_two_rollouts_of_an_architecture(tmp_path, name, adapter):
    tok = tiny.tokenizer()
    model = policy(name, tok)
    directory = tiny.save(model, tmp_path / "base")
    trainer = tiny.ppo_trainer(
        tmp_path / "out", model=directory, tok=tok, peft=lora(name) if adapter else None, check_numerics=True,
        num_iterations=1, max_steps=4, gradient_accumulation_steps=1,
    )  # fmt: skip
    trainer.train()
    first = trainer.state.log_history[0]
    assert_close(first["objective/kl"], 0.0, NO_KL)
    assert_close(first["policy/approx_kl"], 0.0, NO_KL)
    trainer.save_model()

    saved = load_policy(str(tmp_path / "out")).eval()
    trained = trainer.model.eval()
    ids = torch.tensor([tok("the fox is red and the bear eats")["input_ids"]])
    with torch.no_grad():
        ours, plain = trained(input_ids=ids).logits, saved(input_ids=ids).logits
    assert_close(ours, plain, MERGED if adapter else FIRST_UPDATE)
    assert trainer.state.global_step == 4


@pytest.mark.parametrize("name", CASES)
def test_the_models_own_head_gives_the_numbers_of_trls(tmp_path, monkeypatch, name):
    """Log-probabilities, entropies and gradients, at another temperature than 1 and with values beside them."""
    generator, found = torch.Generator().manual_seed(3), []
    ids = torch.randint(60, 200, (3, 9), generator=generator)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1, 0]])
    weights = torch.rand(3, 5, generator=generator) * mask[:, -5:]
    for kept in (0, 2**26):
        monkeypatch.setattr("rlhf_recipes.models.forward.KEPT_LOGITS", kept)
        tok = tiny.tokenizer()
        trainer = tiny.ppo_trainer(tmp_path, model=policy(name, tok), tok=tok, temperature=0.7)
        assert keeps_logits(trainer.model, ids) == (kept > 0 and name != "opt")
        forward = trainer._completion_forward(trainer.model, 5)
        logps, entropies, _ = trainer._get_per_token_logps_and_entropies(forward, ids, mask, 5, compute_entropy=True)
        ((logps + 0.1 * entropies + forward.state_values[:, :-1]) * weights).sum().backward()
        gradients = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
        found.append(({"logps": logps * weights, "entropies": entropies * weights}, gradients))
    (fused, expected), (own, actual) = found
    assert actual.keys() == expected.keys()
    for part, numbers in fused.items():
        assert_close(own[part], numbers, FIRST_UPDATE)
    for part, gradient in expected.items():
        assert_close(actual[part], gradient, MERGED)


# Mamba's cache has no keys and values to select from. MPT samples without a cache.
KEEP_ROWS = {"mamba", "mpt"}


@pytest.mark.parametrize("name", CASES)
def test_greedy_answers_without_the_rows_that_have_ended(name):
    tok = tiny.tokenizer()
    model = policy(name, tok).eval()
    use_long_factors(model)  # else the longest row of a batch chooses the rope
    encoded = tok(tiny.PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    inputs = {key: encoded[key] for key in ("input_ids", "attention_mask")} | sampling_inputs(model)
    width = inputs["input_ids"].size(1)
    settings = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": tok.pad_token_id}
    model.generation_config.eos_token_id = None
    endless = model.generate(**inputs, **settings)[:, width:]
    ends = [int(endless[row, 4 * row]) for row in range(5)]  # they end different rows at different steps
    plain = model.generate(**inputs, **settings, eos_token_id=ends)
    rows = []
    model.register_forward_pre_hook(lambda *call: rows.append(len(call[2]["input_ids"])), with_kwargs=True)
    answers = model.generate(**inputs, **settings, eos_token_id=ends, custom_generate=sample_without_ended)
    assert torch.equal(plain, answers)
    assert len(rows) == plain.size(1) - width
    assert (min(rows) == 8) is (name in KEEP_ROWS)
