"""The memory of sampling, against sums by hand and the caches of transformers."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as tf

from rlhf_recipes.models import memory
from rlhf_recipes.models.memory import cache_bytes, free_memory, layer_width, rows_that_fit, sampling_bytes

CONFIG = tf.LlamaConfig(
    hidden_size=8, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=16,
    vocab_size=100,
)  # fmt: skip
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 50,
}  # fmt: skip
LAYERED = {**SIZES, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}


def test_one_row_by_hand():
    assert cache_bytes(CONFIG, 10, width=4) == 10 * 4 * 2 * 3 * 4
    assert layer_width(CONFIG) == 6 * 8 + 2 * 4 + 4 * 16
    assert sampling_bytes(CONFIG, 6, 4, width=4) == 960 + 6 * 4 * 120 + 20 * 100


def test_the_keys_and_values_of_an_8b_model():
    """They are a quarter of what the hidden size would give."""
    config = tf.LlamaConfig(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336
    )
    assert cache_bytes(config, 1, width=2) == 131_072


@pytest.mark.parametrize(
    "config",
    [
        tf.LlamaConfig(**SIZES),
        tf.MistralConfig(**SIZES, sliding_window=8),
        tf.Gemma3TextConfig(**SIZES, sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2),
        tf.Gemma3nTextConfig(**LAYERED, num_kv_shared_layers=0, vocab_size_per_layer_input=50),
        tf.Gemma4TextConfig(
            **LAYERED,
            num_kv_shared_layers=0,
            global_head_dim=32,
            num_global_key_value_heads=1,
            vocab_size_per_layer_input=50,
        ),
        tf.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"] * 2, pad_token_id=0),
        tf.MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, vocab_size=50),
    ],
    ids=lambda config: config.model_type,
)
def test_keys_and_values_are_those_of_a_cache(config):
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    cache = tf.DynamicCache(config=config)
    name = "cache_params" if config.model_type == "mamba" else "past_key_values"
    with torch.no_grad():
        model(torch.full((1, 20), 9), use_cache=True, **{name: cache})
    held = [x for layer in cache.layers for x in (vars(layer).get("keys"), vars(layer).get("values")) if x is not None]
    window = 2 * 2 * 16 * 4  # a sliding layer keeps its window less the token to come
    sliding = sum(layer.get_max_length() > 0 for layer in cache.layers)
    assert cache_bytes(config, 20, width=4) == sum(x.nbytes for x in held) + sliding * window


def test_layers_of_several_widths():
    config = tf.Gemma4TextConfig(**LAYERED, global_head_dim=32, num_global_key_value_heads=2)
    assert layer_width(config) == 6 * 32 + 2 * 2 * 32 + 4 * 48  # of a global layer
    config = tf.Gemma3nTextConfig(**{**LAYERED, "intermediate_size": [48, 64, 16, 48]})
    assert layer_width(config) == 6 * 32 + 2 * 2 * 16 + 4 * 64


def test_a_model_of_several_networks_counts_its_scores():
    assert sampling_bytes(tf.BltConfig(vocab_size=260), 6, 4, width=4) == 20 * 260


@pytest.mark.parametrize(
    ("rows", "free", "fit"),
    [(256, 256, 128), (256, 320, 256), (256, 60, 32), (9, 9, 5), (9, 4, 3), (9, 0, 1), (0, 0, 0)],
)
def test_rows_that_fit(rows, free, fit):
    assert rows_that_fit(rows, 10, free * 10) == fit


@pytest.mark.parametrize(("limit", "free"), [("max", 1_000), ("600", 500), ("5000", 1_000), ("50", 0), (None, 1_000)])
def test_a_container_has_less_than_its_machine(tmp_path, monkeypatch, limit, free):
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=1_000))
    monkeypatch.setattr(memory, "CONTAINER_LIMIT", str(tmp_path / "limit"))
    monkeypatch.setattr(memory, "CONTAINER_USE", str(tmp_path / "use"))
    if limit is not None:
        Path(tmp_path, "limit").write_text(limit + "\n")
        Path(tmp_path, "use").write_text("100\n")
    assert free_memory(torch.device("cpu")) == free
