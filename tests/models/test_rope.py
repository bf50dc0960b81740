"""A rope with two sets of factors: after the choice, a row has the same numbers in every batch."""

import pytest
import tiny
import torch
from tolerances import FIRST_UPDATE, assert_close
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, Phi3Config, Phi3ForCausalLM

from rlhf_recipes.models.rope import short_limit, use_long_factors
from rlhf_recipes.rewards.scorer import RewardModelScorer

pytestmark = pytest.mark.tiny
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}


def test_a_reward_model_reads_no_batch_on_both_sides_of_the_limit():
    tok = tiny.tokenizer()
    torch.manual_seed(1)
    config = tiny._config(tok, num_labels=1, rope_parameters=ROPE | {"original_max_position_embeddings": 16})
    scorer = RewardModelScorer(LlamaForSequenceClassification(config), tok)
    rows = [list(range(60, 60 + length)) for length in (5, 12, 16, 17, 30)]
    alone = [scorer.score_token_ids([row])[0] for row in rows]
    assert_close(scorer.score_token_ids(rows), alone, FIRST_UPDATE)
    scorer.batch_size = 2
    assert_close(scorer.score_token_ids(rows[::-1]), alone[::-1], FIRST_UPDATE)


def phi3(limit=16):
    torch.manual_seed(0)
    rope = ROPE | {"original_max_position_embeddings": limit}
    places = {"max_position_embeddings": 128, "original_max_position_embeddings": limit}
    tokens = {"vocab_size": 99, "pad_token_id": 0, "eos_token_id": 1}
    model = Phi3ForCausalLM(Phi3Config(rope_parameters=rope, initializer_range=0.2, **places, **tokens, **SIZES))
    return model.eval()


def test_only_a_rope_with_two_sets_has_a_limit():
    assert short_limit(phi3(16)) == 16
    assert short_limit(LlamaForCausalLM(tiny._config(tiny.tokenizer()))) is None


@torch.no_grad()
def test_a_row_has_the_numbers_of_long_texts_in_every_batch():
    model, short, long = phi3(), torch.arange(1, 9)[None], torch.arange(1, 33)[None]
    alone, among = model(short).logits, model(torch.cat([long, long])).logits[:1, :8]
    assert not torch.allclose(alone, among)
    use_long_factors(model)
    assert_close(model(short).logits, among, FIRST_UPDATE)
    assert_close(model(torch.cat([long, long])).logits[:1, :8], among, FIRST_UPDATE)


@pytest.mark.parametrize(("length", "factors"), [(8, "short"), (30, "long")])
def test_a_run_takes_the_long_factors_only_if_its_rows_can_need_them(tmp_path, caplog, length, factors):
    tok = tiny.tokenizer()
    model = LlamaForCausalLM(tiny._config(tok, rope_parameters=ROPE | {"original_max_position_embeddings": 20}))
    trainer = tiny.ppo_trainer(tmp_path, model=model, tok=tok, max_completion_length=length)
    for network in (trainer.model, trainer.ref_model):
        rotary = network.model.rotary_emb
        assert torch.allclose(rotary.original_inv_freq[0], torch.tensor(1.0 if factors == "short" else 1 / 3))
    assert ("as in vLLM" in caplog.text) == (factors == "long")
