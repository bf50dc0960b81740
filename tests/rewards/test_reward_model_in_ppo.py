"""A run gives a reward model the text that it was trained on, or refuses it with the reason."""

import json

import pytest
import tiny
import torch
from tokenizers.processors import TemplateProcessing
from tolerances import FP32, SCORES, assert_close

from rlhf_recipes.rewards.card import tokenizer_fingerprint
from rlhf_recipes.rewards.scorer import RewardModelScorer

pytestmark = [pytest.mark.tiny, pytest.mark.portable]


@pytest.fixture
def trained(tmp_path):
    """Return a function that trains a reward model of a given kind and returns its directory."""

    def train(*, chat=False, tok=None, **kwargs):
        tok = tok or tiny.tokenizer()
        tiny.policy(tok, seed=4).save_pretrained(tmp_path / "rm_base")
        trainer = tiny.reward_trainer(tmp_path / "rm", str(tmp_path / "rm_base"), chat=chat, tok=tok, **kwargs)
        trainer.train()
        trainer.evaluate()
        trainer.save_model()
        return str(tmp_path / "rm")

    return train


def _ppo(tmp_path, reward_model, **kwargs):
    return tiny.ppo_trainer(tmp_path / "ppo", rewards=reward_model, **kwargs)


@pytest.mark.parametrize("chat", [False, True])
def test_it_scores_the_rollout(tmp_path, trained, chat):
    path = trained(chat=chat)
    trainer = _ppo(tmp_path, path, chat=chat)
    batch = tiny.rollout(trainer)
    prompts = [row["prompt"] for row in trainer.train_dataset]
    texts = tiny.tokenizer().batch_decode(
        [ids[m.bool()] for ids, m in zip(batch["completion_ids"], batch["completion_mask"], strict=True)],
        skip_special_tokens=True,
    )
    completions = [[{"role": "assistant", "content": t}] for t in texts] if chat else texts
    ids = [i[m.bool()].tolist() for i, m in zip(batch["completion_ids"], batch["completion_mask"], strict=True)]
    scorer = RewardModelScorer.from_pretrained(path)
    scorer.policy_eos_token_ids = tiny.END_IDS
    assert_close(trainer.rollout.scores, scorer(prompts, completions, ids), FP32)


def test_a_cut_completion_gets_no_eos(trained):
    scorer = RewardModelScorer.from_pretrained(trained())
    scorer.policy_eos_token_ids = [1]
    assert scorer.__name__ == "rm"
    finished, cut = scorer(["the fox\n\n"] * 2, ["is red"] * 2, [[20, 1], [20, 21]])
    by_hand = [
        scorer._forward([scorer.tokenizer("the fox\n\nis red" + end)["input_ids"]]).item() for end in ("<eos>", "")
    ]
    assert_close([finished, cut], by_hand, FP32)
    assert finished != cut


def test_scores_do_not_depend_on_the_batch(trained):
    scorer = RewardModelScorer.from_pretrained(trained())
    scorer.batch_size = 2
    rows = (["is the hare in the cave?", "a", "the fox"], ["no", "b", "is red and the bear"])
    alone = [scorer([prompt], [completion])[0] for prompt, completion in zip(*rows, strict=True)]
    assert len(set(alone)) == len(alone)
    assert_close(scorer(*rows), alone, FP32)


def test_a_long_row_does_not_widen_short_ones():
    """Two forwards of 12 x 5 and 2 x 50 tokens; batches of 7 rows would compute 7 x 5 and 7 x 50."""
    tok = tiny.tokenizer()
    scorer = RewardModelScorer(tiny.reward_model(tok), tok)
    rows = [list(range(60, 60 + length)) for length in [5] * 6 + [50] + [5] * 6 + [50]]
    alone = [scorer.score_token_ids([row])[0] for row in rows]
    seen = []
    scorer.model.model.embed_tokens.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0].shape))
    scorer.batch_size = 7
    assert_close(scorer.score_token_ids(rows), alone, SCORES)
    assert seen == [(12, 5), (2, 50)]
    assert scorer.score_token_ids([]) == []


def test_scoring_stores_no_keys_and_values():
    tok = tiny.tokenizer()
    model, caches = tiny.reward_model(tok), []
    model.model.register_forward_hook(lambda module, inputs, output: caches.append(output.past_key_values))
    RewardModelScorer(model, tok).score_token_ids([[60, 61], [62]])
    assert caches == [None]


def test_the_normaliser_starts_at_the_cards_statistics(tmp_path, trained):
    path = trained()
    card = json.loads((tmp_path / "rm" / "reward_model_card.json").read_text())
    trainer = _ppo(tmp_path, path, reward_weights=[-2.0])
    assert trainer.reward_normalizer.mean == pytest.approx(-2.0 * card["score_mean"])
    assert trainer.reward_normalizer.std == pytest.approx(2.0 * card["score_std"])


def test_the_cards_statistics_are_not_those_of_a_sum(tmp_path, trained):
    trainer = _ppo(tmp_path, [trained(), tiny.length_reward])
    assert trainer.reward_normalizer.state_dict()["weight"] == 0


def test_another_tokenizer_works_because_text_is_tokenised_again(tmp_path, trained):
    foreign = tiny.tokenizer(vocab_size=280)
    path = trained(tok=foreign)
    policy_tokenizer = tiny.tokenizer()
    assert len(foreign) != len(policy_tokenizer)
    trainer = _ppo(tmp_path, path, tok=policy_tokenizer)
    trainer.train()
    assert torch.isfinite(trainer.rollout.scores).all()


def test_another_separator_is_refused(tmp_path, trained):
    path = trained(response_separator="\n###\n")
    with pytest.raises(ValueError, match=r"Set `response_separator: \"\\n###\\n\"`"):
        _ppo(tmp_path, path)
    _ppo(tmp_path, path, response_separator="\n###\n")


def test_another_kind_of_text_is_refused(tmp_path, trained):
    with pytest.raises(ValueError, match="trained on chat messages, but the prompts are plain text"):
        _ppo(tmp_path, trained(chat=True))


def test_a_tokenizer_that_is_not_the_reward_models_is_refused(tmp_path, trained):
    path = trained(tok=tiny.tokenizer(vocab_size=280))
    tiny.tokenizer().save_pretrained(path)
    with pytest.raises(ValueError, match="Use the tokenizer saved beside the reward model"):
        _ppo(tmp_path, path)


def test_another_chat_template_is_refused(tmp_path, trained):
    path = trained(chat=True)
    tok = tiny.tokenizer()
    tok.chat_template = tok.chat_template.replace("<|assistant|>", "<|user|>")
    tok.save_pretrained(path)
    with pytest.raises(ValueError, match="chat template has fingerprint"):
        _ppo(tmp_path, path, chat=True)


def test_a_reward_model_without_a_card_is_reported_and_taken_as_it_is(tmp_path, trained, caplog):
    path = trained()
    (tmp_path / "rm" / "reward_model_card.json").unlink()
    _ppo(tmp_path, path, response_separator="anything").train()
    assert "has no reward_model_card.json" in caplog.text


def test_two_labels_are_refused(tmp_path):
    tok = tiny.tokenizer()
    with pytest.raises(ValueError, match="has 2 labels"):
        _ppo(tmp_path, tiny.reward_model(tok, num_labels=2), reward_tok=tok)


def test_a_causal_lm_is_not_a_reward_model(tmp_path):
    tok = tiny.tokenizer()
    path = tiny.save(tiny.policy(tok), tmp_path / "lm")
    with pytest.raises(ValueError, match="is not a reward model"):
        _ppo(tmp_path, path)


def test_chat_gets_the_special_tokens_of_the_template_only():
    """A tokenizer that adds its own opening token would add a second one."""
    tok = tiny.tokenizer()
    opener = [("<pad>", tok.pad_token_id)]
    tok._tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=opener)
    tok.chat_template = "<pad>" + tok.chat_template
    scorer = RewardModelScorer(tiny.reward_model(tok), tok)
    user, assistant = ([{"role": role, "content": "the fox"}] for role in ("user", "assistant"))
    assert scorer.token_ids([user], [assistant], [True])[0].count(tok.pad_token_id) == 1
    assert scorer.token_ids(["the fox"], [" is red"], [True])[0].count(tok.pad_token_id) == 1


def test_an_instance_scores_in_float32_under_autocast(tmp_path):
    tok = tiny.tokenizer()
    model = tiny.reward_model(tok)
    with pytest.raises(ValueError, match="pass its tokenizer in `reward_processing_classes`"):
        _ppo(tmp_path, model)
    _ppo(tmp_path, model, reward_tok=tok)
    with torch.autocast(tiny.DEVICE, dtype=torch.bfloat16):
        assert model(input_ids=torch.tensor([[5, 6, 7]], device=tiny.DEVICE)).logits.dtype == torch.float32


def test_a_reward_model_with_an_adapter_may_be_given_as_it_is(tmp_path):
    tok = tiny.tokenizer()
    ppo = _ppo(tmp_path, tiny.reward_trainer(tmp_path / "rm", peft=tiny.lora()).model, reward_tok=tok)
    ppo.train()
    assert ppo.rollout.scores.isfinite().all()


def test_roles_of_special_tokens_are_part_of_the_fingerprint():
    tok = tiny.tokenizer()
    before = tokenizer_fingerprint(tok)
    tok.pad_token, tok.eos_token = tok.eos_token, tok.pad_token
    assert tokenizer_fingerprint(tok) != before
