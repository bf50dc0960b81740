"""Rows that do not fit the model or `max_length` are counted, or refused before training."""

import pytest
import tiny
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel
from trl import SFTConfig

from rlhf_recipes.options.baselines import DPOConfig
from rlhf_recipes.options.recipes import PreflightArguments, TrackingArguments
from rlhf_recipes.preflight.preflight import preflight
from rlhf_recipes.trainers.baselines import DPOTrainer
from rlhf_recipes.trainers.sft import SFTTrainer
from rlhf_recipes.trainers.stock import Scoring

pytestmark = pytest.mark.tiny
LONG = "the fox is red " * 8


def _gpt2(model_class, tok, **kwargs):
    torch.manual_seed(0)
    ids = {"pad_token_id": tok.pad_token_id, "eos_token_id": tok.eos_token_id, "bos_token_id": None}
    config = GPT2Config(vocab_size=len(tok), n_embd=32, n_layer=2, n_head=4, n_positions=32, **ids, **kwargs)
    return model_class(config)


def _demonstrations(*long, count=4):
    rows = [{"prompt": LONG if i in long else "is it red? ", "completion": "yes"} for i in range(count)]
    return Dataset.from_list(rows)


def _pairs(*long, count=4):
    return Dataset.from_list(
        [{"prompt": LONG if i in long else "a", "chosen": "b", "rejected": "c"} for i in range(count)]
    )


def _sft(tmp_path, data, eval_data=None, model=None, tok=None, **options):
    tok = tok or tiny.tokenizer()
    args = SFTConfig(str(tmp_path / "out"), **{**tiny.QUIET, "max_steps": 1, "max_length": 20, **options})
    return SFTTrainer(
        model or tiny.policy(tok), args, train_dataset=data, eval_dataset=eval_data, processing_class=tok
    )


def _rm(tmp_path, data, eval_data=None, **options):
    return tiny.reward_trainer(tmp_path / "out", data=data, eval_data=eval_data, **{"max_length": 20, **options})


def _dpo(tmp_path, data, eval_data=None, **options):
    path = tiny.save(tiny.policy(tiny.tokenizer()), tmp_path / "base")
    args = DPOConfig(
        str(tmp_path / "out"), max_completion_length=8, **{**tiny.QUIET, "max_steps": 1, "max_length": 20, **options}
    )
    return DPOTrainer(path, args, Scoring([], ""), data, eval_data, processing_class=tiny.tokenizer())


ALL = (0, 1, 2, 3)


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
@pytest.mark.parametrize(
    ("build", "rows"), [(_sft, _demonstrations), (_rm, _pairs), (_dpo, _pairs)], ids=["sft", "reward model", "dpo"]
)
def test_a_dataset_of_which_nothing_is_left_is_refused(tmp_path, build, rows, name):
    data = {"data": rows(), "eval_data": rows()} | {"data" if name == "train_dataset" else "eval_data": rows(*ALL)}
    message = rf"4 of 4 (rows|pairs) are longer than `max_length` \(20\) tokens, so row 0 of `{name}`"
    with pytest.raises(ValueError, match=message):
        build(tmp_path, **data)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


@pytest.mark.parametrize(("build", "rows"), [(_sft, _demonstrations), (_rm, _pairs)], ids=["sft", "reward model"])
def test_a_stream_of_which_nothing_is_left_is_refused(tmp_path, build, rows):
    with pytest.raises(ValueError, match=r"All (rows|pairs) are longer than `max_length` \(20\) tokens, so row 0"):
        build(tmp_path, rows(*ALL).to_iterable_dataset())
    build(tmp_path, rows(0, 1).to_iterable_dataset()).train()


def test_evaluation_sets_by_name_are_checked_each(tmp_path):
    data = {"good": _demonstrations(), "bad": _demonstrations(*ALL)}
    with pytest.raises(ValueError, match=r"row 0 of `eval_dataset\['bad'\]`"):
        _sft(tmp_path, _demonstrations(), data)


@pytest.mark.parametrize(
    ("build", "rows", "what"),
    [(_sft, _demonstrations, "prompts"), (_rm, _pairs, "pairs")],
    ids=["sft", "reward model"],
)
def test_rows_that_are_left_out_are_counted_for_training_and_evaluation(tmp_path, capsys, build, rows, what):
    data, evaluation = rows(1), rows(0, 2)
    trainer = build(tmp_path, data, evaluation)
    preflight(trainer, data, evaluation, PreflightArguments(), TrackingArguments(tracking=False))
    said = capsys.readouterr().out
    assert f"Warning: 1 of 4 {what} are longer than `max_length` (20) tokens and left out" in said
    assert f"Warning: 2 of 4 {what} for evaluation are longer than `max_length` (20) tokens and left out" in said


def test_packed_rows_are_not_counted_as_left_out(tmp_path, capsys):
    data = _demonstrations()
    trainer = _sft(tmp_path, data, packing=True, packing_strategy="wrapped")
    preflight(trainer, data, None, PreflightArguments(), TrackingArguments(tracking=False))
    assert "left out" not in capsys.readouterr().out


@pytest.mark.parametrize("build", [_sft, _rm], ids=["sft", "reward model"])
def test_a_row_beyond_the_table_of_positions_is_refused(tmp_path, build):
    """GPT-2 has one vector for each position, and an index beyond the last is an error in the forward."""
    tok = tiny.tokenizer()
    if build is _sft:
        model, rows = _gpt2(GPT2LMHeadModel, tok), _demonstrations
    else:
        model, rows = _gpt2(GPT2ForSequenceClassification, tok, num_labels=1), _pairs
    with pytest.raises(ValueError, match=r"`train_dataset` has \d+ tokens in row 2, and the model has 32 positions"):
        build(tmp_path, rows(2), model=model, max_length=None)
    build(tmp_path, rows(2), model=model, max_length=32).train()


def test_rotary_positions_have_no_end(tmp_path):
    trainer = _sft(tmp_path, Dataset.from_list([{"prompt": "a", "completion": LONG * 5}] * 4), max_length=None)
    assert max(map(len, trainer.train_dataset["input_ids"])) > trainer.model.config.max_position_embeddings
    trainer.train()


@pytest.mark.parametrize(("build", "rows"), [(_sft, _demonstrations), (_rm, _pairs)], ids=["sft", "reward model"])
def test_a_token_outside_the_vocabulary_is_refused_by_name(tmp_path, build, rows):
    tok = tiny.tokenizer()
    model = tiny.policy(tok) if build is _sft else tiny.reward_model(tok)
    tok.add_tokens([f"<x{i}>" for i in range(20)])
    build(tmp_path, rows(), model=model, tok=tok)  # which never uses them
    data = rows().map(lambda row, i: {"prompt": row["prompt"] + "<x19>" * (i == 3)}, with_indices=True)
    with pytest.raises(ValueError, match=r"the token '<x19>' \(id 326\) in row 3, but .* vocabulary has 307 tokens"):
        build(tmp_path, data, model=model, tok=tok)


def test_columns_of_the_user_are_no_tokens(tmp_path):
    data = tiny.preferences().add_column("doc_ids", [[10_000, 2]] * 8).add_column("other_ids", ["a"] * 8)
    tiny.reward_trainer(tmp_path, data=data)


def test_a_text_of_sft_that_is_missing_is_named_by_row(tmp_path):
    data = Dataset.from_dict({"text": ["the fox is red", None]})
    with pytest.raises(ValueError, match="`train_dataset` has an empty 'text' in row 1"):
        SFTTrainer(tiny.policy(tiny.tokenizer()), SFTConfig(str(tmp_path), **tiny.QUIET), train_dataset=data,
                   processing_class=tiny.tokenizer())  # fmt: skip


def test_a_policy_without_a_weight_to_train_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no weight to train: call `model.requires_grad_\(True\)`"):
        tiny.ppo_trainer(tmp_path, model=tiny.policy(tiny.tokenizer()).requires_grad_(False))


def test_other_columns_of_sft_are_named(tmp_path):
    data = Dataset.from_dict({"instruction": ["a"], "output": ["b"]})
    with pytest.raises(ValueError, match="nor 'text'; it has 'instruction', 'output'"):
        SFTTrainer(tiny.policy(tiny.tokenizer()), SFTConfig(str(tmp_path), **tiny.QUIET), train_dataset=data,
                   processing_class=tiny.tokenizer())  # fmt: skip
