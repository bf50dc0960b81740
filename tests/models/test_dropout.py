"""No dropout is left in a model, wherever its architecture keeps the probability."""

import pytest
import torch
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PersimmonConfig,
    PersimmonForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

from rlhf_recipes.models.dropout import disable_dropout, dropouts

GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
DECODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
FALCON = {"attention_dropout": 0.3, "hidden_dropout": 0.3}
BIGCODE = {"attn_pdrop": 0.3, "resid_pdrop": 0.3}
MODELS = {
    "falcon": lambda: FalconForCausalLM(FalconConfig(vocab_size=99, **FALCON, **DECODER)),
    "gptj": lambda: GPTJForCausalLM(GPTJConfig(vocab_size=99, rotary_dim=4, attn_pdrop=0.3, resid_pdrop=0.3, **GPT)),
    "gpt_neo": lambda: GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=99,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            attention_dropout=0.3,
            embed_dropout=0.3,
            resid_dropout=0.3,
        )
    ),
    "persimmon": lambda: PersimmonForCausalLM(
        PersimmonConfig(vocab_size=99, intermediate_size=48, attention_dropout=0.3, hidden_dropout=0.3, **DECODER)
    ),
    "gpt_bigcode": lambda: GPTBigCodeForCausalLM(GPTBigCodeConfig(vocab_size=99, **BIGCODE, **GPT)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(vocab_size=99, ffn_dim=48, word_embed_proj_dim=32, dropout=0.3, layerdrop=0.3, **DECODER)
    ),
    "starcoder2": lambda: Starcoder2ForCausalLM(
        Starcoder2Config(
            vocab_size=99,
            intermediate_size=48,
            num_key_value_heads=2,
            residual_dropout=0.3,
            embedding_dropout=0.3,
            attention_dropout=0.3,
            **DECODER,
        )
    ),
}


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_two_forwards_in_training_mode_are_equal(build):
    torch.manual_seed(0)
    model = build().train()
    ids = torch.randint(0, 99, (2, 9))
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    before = model.config.to_dict()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # TRL's share
    assert dropouts(model)
    disable_dropout(model)
    assert not dropouts(model)
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    assert model.config.to_dict() == before
