"""A reward model with few positions refuses long prompts before training, or reads their end."""

import logging

import pytest
import tiny
import torch
from datasets import Dataset
from tolerances import EXACT, FP32, assert_close
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPTJConfig,
    GPTJForSequenceClassification,
    OPTConfig,
    OPTForSequenceClassification,
)
from trl import RLOOConfig

from rlhf_recipes.options.baselines import DPOConfig
from rlhf_recipes.rewards.context import check_context
from rlhf_recipes.rewards.functions import as_scorer
from rlhf_recipes.rewards.scorer import RewardModelScorer, _say_cut
from rlhf_recipes.trainers.baselines import DPOTrainer, RLOOTrainer
from rlhf_recipes.trainers.stock import Scoring

pytestmark = pytest.mark.tiny

POSITIONS = 24
SHORT, LONG = "the fox", "is the hare in the cave? " * 3


def _gpt2(tok, positions=POSITIONS):
    torch.manual_seed(0)
    ids = {"bos_token_id": None, "eos_token_id": tok.eos_token_id, "pad_token_id": tok.pad_token_id}
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": positions, "initializer_range": 0.2}
    return GPT2ForSequenceClassification(GPT2Config(vocab_size=len(tok), num_labels=1, **sizes, **ids))


def _opt(tok):
    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    ids = {"word_embed_proj_dim": 32, "pad_token_id": tok.pad_token_id, "max_position_embeddings": POSITIONS}
    return OPTForSequenceClassification(OPTConfig(vocab_size=len(tok), num_labels=1, **sizes, **ids))


def _gptj(tok):
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4, "n_positions": POSITIONS}
    return GPTJForSequenceClassification(
        GPTJConfig(vocab_size=len(tok), num_labels=1, pad_token_id=tok.pad_token_id, **sizes)
    )


def _prompts(*texts, chat=False, **columns):
    rows = [[{"role": "user", "content": text}] for text in texts] if chat else list(texts)
    return Dataset.from_dict({"prompt": rows, **columns})


LATE = _prompts(*[SHORT] * 7, LONG)
REFUSED = (
    r"1 of 8 prompts of `train_dataset` \(row 7 has \d\d tokens\) do not fit with `max_completion_length` into the"
)


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
@pytest.mark.parametrize("model", [_gpt2, _opt, _gptj])
def test_a_long_prompt_is_refused_when_the_trainer_is_built(tmp_path, model, chat):
    tok = tiny.tokenizer()
    data = _prompts(*[SHORT] * 7, LONG, chat=chat)
    with pytest.raises(
        ValueError, match=rf"{REFUSED} 24 positions of the reward model reward_model. .*`reward_overflow"
    ):
        tiny.ppo_trainer(tmp_path, rewards=model(tok), reward_tok=tok, data=data)


def test_a_path_a_judge_and_evaluation_prompts_are_checked_too(tmp_path):
    tok = tiny.tokenizer()
    path = tiny.save(_gpt2(tok), tmp_path / "small")
    with pytest.raises(ValueError, match=f"{REFUSED} 24 positions of the reward model small"):
        tiny.ppo_trainer(tmp_path / "ppo", rewards=path, data=LATE)
    for given in ({"rewards": path}, {"judges": {"judge": as_scorer(path)}}):
        with pytest.raises(ValueError, match=r"1 of 8 prompts of `eval_dataset` \(row 7"):
            tiny.ppo_trainer(tmp_path / "ppo", eval_data=LATE, **given)
    judges = {"judge": as_scorer(path)}  # a judge reads no training prompt
    tiny.ppo_trainer(tmp_path / "ppo", judges=judges, data=LATE, eval_data=tiny.prompts())


@pytest.mark.parametrize("trainer", [RLOOTrainer, DPOTrainer])
def test_the_baselines_are_checked_too(tmp_path, trainer):
    tok = tiny.tokenizer()
    small = tiny.save(_gpt2(tok), tmp_path / "small")
    policy = tiny.save(tiny.policy(tok), tmp_path / "policy")
    kinds = {RLOOTrainer: (RLOOConfig, {"num_generations": 2}), DPOTrainer: (DPOConfig, {})}
    config, options = kinds[trainer]
    args = config(str(tmp_path / "out"), max_completion_length=8, eval_strategy="steps", **options, **tiny.QUIET)
    pairs = _prompts(*[SHORT] * 7, LONG, chosen=["a"] * 8, rejected=["b"] * 8)
    data = {"train_dataset": pairs, "eval_dataset": pairs, "processing_class": tok}
    name = "train_dataset" if trainer is RLOOTrainer else "eval_dataset"
    with pytest.raises(ValueError, match=rf"1 of \d prompts of `{name}` .* 24 positions of the reward model small"):
        trainer(policy, args, Scoring([small], "\n\n"), **data)


def test_a_prompt_that_fits_exactly_is_not_refused(tmp_path):
    tok = tiny.tokenizer()
    scorer = as_scorer(_gpt2(tok), tok)
    longest = len(tok(LONG)["input_ids"])
    for chat, around in ((False, 0), (True, 3)):  # <|user|>, <|assistant|> and <eos>
        data = {"train_dataset": _prompts(SHORT, LONG, chat=chat)}
        assert scorer.prompt_lengths(data["train_dataset"]["prompt"])[1] == longest + around
        scorer.position_limit = longest + around + 6
        check_context([scorer], data, 6, "raise")
        with pytest.raises(ValueError, match="1 of 2 prompts"):
            check_context([scorer], data, 7, "raise")


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_a_run_may_cut_long_prompts_and_says_so(tmp_path, caplog, chat):
    tok = tiny.tokenizer()
    data = _prompts(*[SHORT, LONG] * 4, chat=chat)
    trainer = tiny.ppo_trainer(tmp_path, rewards=_gpt2(tok), reward_tok=tok, data=data, reward_overflow="cut")
    assert "4 of 8 prompts of `train_dataset`" in caplog.text
    assert "reads only the last tokens of prompt and completion (`reward_overflow: cut`)" in caplog.text
    trainer.train()
    assert trainer.rollout.scores.isfinite().all()


def test_a_cut_row_is_scored_by_its_last_tokens(caplog):
    _say_cut.cache_clear()
    tok = tiny.tokenizer()
    model = _gpt2(tok)
    scorer = as_scorer(model, tok)
    scores = scorer([SHORT, LONG, LONG], [" is red", " is red", LONG])
    texts = [SHORT + " is red<eos>", LONG + " is red<eos>", LONG + LONG + "<eos>"]
    rows = [tok(text)["input_ids"][-POSITIONS:] for text in texts]
    assert [len(row) for row in rows][1:] == [POSITIONS] * 2
    with torch.no_grad():
        expected = [model(input_ids=torch.tensor([row])).logits.item() for row in rows]
    assert_close(scores, expected, FP32)
    scorer([LONG], ["x"])
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "more tokens than the 24 that the reward model reward_model can read" in said


def test_a_critic_reads_the_states_of_the_tokens_that_are_left():
    tok = tiny.tokenizer()
    scorer = as_scorer(_gpt2(tok), tok)
    prompts, answer = [LONG, SHORT], " is red and the hare"
    sampled = [tok(answer)["input_ids"]] * 2
    taken = []
    scorer.take_states = taken.extend
    scorer(prompts, [answer] * 2, sampled)
    row = tok(LONG + answer + "<eos>")["input_ids"][-POSITIONS:]
    with torch.no_grad():
        states = scorer.model.transformer(input_ids=torch.tensor([row])).last_hidden_state[0]
    last = len(row) - 2  # the last token of the answer; EOS is after it
    assert_close(taken[0], states[last - len(sampled[0]) : last + 1], FP32)
    assert len(taken[1]) == len(sampled[1]) + 1
    _, of_pairs = scorer.score_with_states([LONG], [answer])
    assert_close(of_pairs[0], states[last - len(sampled[0]) :], FP32)


def test_an_answer_that_alone_is_too_long_keeps_its_state_at_the_front():
    tok = tiny.tokenizer()
    scorer = as_scorer(_gpt2(tok), tok)
    taken = []
    scorer.take_states = taken.extend
    sampled = tok(LONG + LONG)["input_ids"]
    scorer([SHORT], [LONG + LONG], [sampled])
    assert len(taken[0]) == len(sampled) + 1
    assert_close(taken[0][0], taken[0][1], EXACT)


def test_rotary_positions_refuse_nothing(tmp_path):
    tok = tiny.tokenizer()
    model = tiny.reward_model(tok)
    model.config.max_position_embeddings = POSITIONS
    tiny.ppo_trainer(tmp_path, rewards=model, reward_tok=tok, data=LATE)


def test_the_option_is_checked(tmp_path):
    with pytest.raises(ValueError, match="`reward_overflow` must be one of raise, cut, got 'left'"):
        tiny.ppo_config(tmp_path, reward_overflow="left")


def test_a_scorer_without_a_model_has_no_limit():
    check_context([tiny.length_reward], {"train_dataset": LATE}, 1_000, "raise")
    assert RewardModelScorer.position_limit is None
