"""Process reward modelling: the loss over steps, the tokens at which they are judged, and the trained model in use."""

import json

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset, IterableDataset
from peft import get_peft_model
from safetensors.torch import load_file
from tiny_steps import STEPS, rows, step_model, trainer_of
from tolerances import FP32, assert_close

from rlhf_recipes.algorithm.steps import UNLABELLED, log_odds_of, step_loss
from rlhf_recipes.data.steps import StepRule, step_token_ids
from rlhf_recipes.models.process_reward_model import load_process_reward_model_base
from rlhf_recipes.options.changes import with_changes
from rlhf_recipes.rewards.functions import as_scorer
from rlhf_recipes.rewards.process import ProcessRewardModelCard, ProcessRewardModelScorer
from rlhf_recipes.trainers.process_reward_modeling import for_tokens

pytestmark = pytest.mark.tiny


@pytest.fixture
def base(tmp_path):
    """Write an SFT policy, and return its path."""
    return tiny.save(tiny.policy(tiny.tokenizer()), tmp_path / "base")


def weights_of(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


@pytest.mark.parametrize("chat", [False, True])
def test_a_step_is_judged_at_the_separator_after_it_in_training_and_in_ppo(tmp_path, chat):
    trainer = trainer_of(tmp_path, data=rows(chat=chat), eval_data=rows(chat=chat))
    tok, row = tiny.tokenizer(), trainer.train_dataset[2]
    ends = [i for i, label in enumerate(row["labels"]) if label != UNLABELLED]
    assert [row["labels"][end] for end in ends] == [0.0, 1.0, 0.0]
    assert [tok.decode(row["input_ids"][end]) for end in ends] == ["\n"] * 3
    opening = "<|user|>is the hare<|assistant|>" if chat else "is the hare\n\n"
    assert tok.decode(row["input_ids"]) == opening + "is the hare\nin the cave\nat night\n"
    prompt = rows(chat=chat)[2]["prompt"] if chat else "is the hare\n\n"
    assert step_token_ids(tok, prompt, STEPS[2], "\n") == (row["input_ids"], ends)


def test_the_loss_is_the_mean_over_all_steps_however_the_batch_is_cut(tmp_path):
    """The answers have one to three steps, so a mean of means over rows or micro-batches would be another number."""
    cuts = {"whole": (8, 1), "halves": (4, 2), "single rows": (1, 8)}
    trained = {}
    for name, (size, accumulated) in cuts.items():
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated, "max_steps": 1}
        trainer = trainer_of(tmp_path / name, **options, learning_rate=1e-2, optim="sgd")
        trainer.train()
        trained[name] = weights_of(trainer), tiny.logged(trainer, "loss")[1]
    for weights, loss in trained.values():
        assert_close(torch.tensor(loss), torch.tensor(trained["whole"][1]), FP32)
        for name, tensor in weights.items():
            assert_close(tensor, trained["whole"][0][name], FP32)
    tok, model = tiny.tokenizer(), step_model(tiny.tokenizer())
    total, count = 0.0, 0
    for row in rows():
        ids, ends = step_token_ids(tok, row["prompt"] + "\n\n", row["completions"], "\n")
        odds = model.eval()(input_ids=torch.tensor([ids])).logits[0, ends, 0].double()
        right = torch.tensor(row["labels"])
        total -= torch.where(right, odds, -odds).sigmoid().log().sum().item()
        count += len(ends)
    assert_close(torch.tensor(trained["whole"][1]), torch.tensor(total / count), FP32)


def test_two_outputs_have_the_loss_of_one():
    logits, labels = torch.randn(2, 5, 2), torch.tensor([[1.0, 0, -100, -100, 1], [-100, 0, -100, 1, -100]])
    expected = torch.nn.functional.cross_entropy(logits.view(-1, 2), labels.view(-1).long(), ignore_index=UNLABELLED)
    assert_close(step_loss(log_odds_of(logits), labels), expected, FP32)
    with pytest.raises(ValueError, match="gives 3 numbers per token"):
        log_odds_of(torch.zeros(1, 1, 3))


@pytest.mark.parametrize("kind", ["causal LM", "two labels"])
def test_what_training_starts_from(tmp_path, base, kind):
    tok = tiny.tokenizer()
    if kind == "two labels":  # as TRL's former trainer has saved
        base = tiny.save(step_model(tok, num_labels=2), tmp_path / "two")
    model = load_process_reward_model_base(base)
    assert model.config.num_labels == 1
    assert model.score.out_features == 1
    ids = torch.tensor([[5, 6, 7, 8]])
    if kind == "two labels":
        scorer = as_scorer(base, tok)
        expected = log_odds_of(scorer.model(input_ids=ids).logits)
        assert_close(model.eval()(input_ids=ids).logits[..., 0], expected, FP32)
    trainer = trainer_of(tmp_path / "prm", base)
    trainer.train()
    trainer.save_model()
    assert json.loads((tmp_path / "prm" / "config.json").read_text())["architectures"] == [
        "LlamaForTokenClassification"
    ]
    assert as_scorer(str(tmp_path / "prm")).model.score.out_features == 1


def test_it_learns_which_steps_are_right(tmp_path, base):
    trainer = trainer_of(tmp_path / "prm", base, max_steps=30, learning_rate=1e-2, per_device_train_batch_size=8)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] == metrics["eval_first_error_f1"] == metrics["eval_auc"] == 1.0
    assert tiny.logged(trainer, "accuracy")[30] == 1.0
    trainer.save_model()
    card = ProcessRewardModelCard.load(tmp_path / "prm")
    assert (card.eval_accuracy, card.first_error_f1) == (1.0, 1.0)
    assert card.score_mean == metrics["eval_score_mean"]
    assert "AutoModelForTokenClassification" in (tmp_path / "prm" / "README.md").read_text()


def test_metrics_are_over_steps_and_not_over_batches(tmp_path):
    trainer = trainer_of(tmp_path, per_device_eval_batch_size=4)
    metrics = trainer.evaluate()
    scorer = ProcessRewardModelScorer(trainer.model, tiny.tokenizer(), trainer.card)
    data = rows(count=6)
    odds = scorer.log_odds([prompt + "\n\n" for prompt in data["prompt"]], list(data["completions"]))
    labels = np.concatenate(list(data["labels"]))
    all_odds = torch.cat(odds).double().numpy()
    assert_close(metrics["eval_accuracy"], ((all_odds > 0) == labels).mean(), FP32)
    assert_close(metrics["eval_loss"], np.logaddexp(0, np.where(labels, -all_odds, all_odds)).mean(), FP32)
    sums = np.array([torch.tanh(row / 2).sum().item() for row in odds])
    assert_close(metrics["eval_score_mean"], sums.mean(), FP32)
    assert_close(metrics["eval_score_std"], sums.std(), FP32)


def test_only_the_last_step_is_trained_if_it_is_said(tmp_path):
    trainer = trainer_of(tmp_path, train_on_last_step_only=True)
    labelled = [sum(label != UNLABELLED for label in row["labels"]) for row in trainer.train_dataset]
    assert labelled == [1] * 8
    assert sum(label != UNLABELLED for label in trainer.eval_dataset[2]["labels"]) == 3


def test_lora_trains_and_saves_the_head(tmp_path, base):
    trainer = trainer_of(tmp_path / "prm", base, peft=tiny.lora(), learning_rate=1e-2)
    before = [p.clone() for n, p in trainer.model.named_parameters() if "score" in n and p.requires_grad]
    trainer.train()
    trainer.save_model()
    saved = load_file(tmp_path / "prm" / "adapter_model.safetensors")
    heads = {name: tensor for name, tensor in saved.items() if "score" in name}
    assert len(heads) == len(before) == 2, "weight and bias"
    assert not any(torch.equal(head, old) for head in heads.values() for old in before)
    text = {"prompts": ["the fox\n\n"], "completions": ["is red\nat night"]}
    live = ProcessRewardModelScorer(trainer.model, tiny.tokenizer())(**text)
    loaded = ProcessRewardModelScorer.from_pretrained(str(tmp_path / "prm"))(**text)
    assert [end for end, _ in loaded[0]] == [end for end, _ in live[0]] == [6, 15]
    assert_close(torch.tensor([r for _, r in loaded[0]]), torch.tensor([r for _, r in live[0]]), FP32)


def test_a_trained_head_stays_float32_in_a_quantised_model(tmp_path, base):
    """TRL casts trained weights beside quantised weights, which it recognises by the attribute."""
    model = load_process_reward_model_base(base)
    model.is_loaded_in_4bit = True
    trainer = trainer_of(tmp_path / "prm", model, peft=tiny.lora())
    heads = {n: p.dtype for n, p in trainer.model.named_parameters() if p.requires_grad and "score" in n}
    assert set(heads.values()) == {torch.float32}


@pytest.mark.parametrize("others", [None, ["q_proj"], ".*q_proj"])
def test_no_adapter_is_added_to_the_head(others):
    config = for_tokens(with_changes(tiny.lora(), exclude_modules=others))
    model = get_peft_model(step_model(tiny.tokenizer()), config)
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    assert len(adapted) == (14 if others is None else 12)
    assert not any("score" in name for name in adapted)


@pytest.mark.parametrize("peft", [None, tiny.lora()], ids=["full", "lora"])
def test_a_resumed_run_has_the_weights_of_an_uninterrupted_one(tmp_path, base, peft):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}
    whole = trainer_of(tmp_path / "whole", base, peft=peft, **options)
    whole.train()
    torch.manual_seed(7)
    resumed = trainer_of(tmp_path / "resumed", base, peft=peft, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for name, tensor in weights_of(whole).items():
        assert torch.equal(tensor, weights_of(resumed)[name]), name
    other = trainer_of(tmp_path / "other", base, peft=peft, step_separator=";", **options)
    with pytest.raises(ValueError, match="`step_separator` was \n, is ;"):
        other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))


def test_a_stream_trains(tmp_path):
    stream = IterableDataset.from_generator(lambda: iter(rows()))
    trainer_of(tmp_path, data=stream).train()


def test_tokenised_rows_train(tmp_path):
    given = trainer_of(tmp_path / "text")
    trainer = trainer_of(tmp_path / "tokens", data=given.train_dataset, eval_data=given.eval_dataset)
    assert trainer.train_dataset[2] == given.train_dataset[2]
    trainer.train()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [[1, 0], [1], [0, 1]]}, "3 steps and 2 labels in row 2 of `train_dataset`"),
        ({"labels": [[1, -1], [1], [0, 1, 0]]}, "label of step 1 in row 0 of `train_dataset` is -1"),
        ({"completions": [["a", " "], ["b"], ["c", "d", "e"]]}, "Step 1 in row 0 of `train_dataset` is ' '"),
        ({"completions": ["a", "b", "c"]}, "'completions' in row 0 of `train_dataset` must be a list"),
    ],
)
def test_rows_that_cannot_be_trained_are_refused_by_their_number(tmp_path, change, message):
    columns = {"prompt": tiny.PROMPTS[:3], "completions": STEPS, "labels": [[1, 0], [1], [0, 1, 0]]}
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, data=Dataset.from_dict(columns | change))


def test_other_refusals_name_column_and_option(tmp_path, base):
    with pytest.raises(ValueError, match="`train_dataset` has no column 'completions', 'labels'"):
        trainer_of(tmp_path, data=tiny.prompts())
    with pytest.raises(ValueError, match="`step_separator` is empty"):
        trainer_of(tmp_path, step_separator="")
    with pytest.raises(ValueError, match="`center_rewards_coefficient` is about scores of pairs"):
        trainer_of(tmp_path, center_rewards_coefficient=0.1)
    with pytest.raises(ValueError, match="has no linear layer `score` that judges each token"):
        trainer_of(tmp_path, tiny.reward_model(tiny.tokenizer()))
    with pytest.raises(ValueError, match="has 3 labels; a step has one output, or two"):
        trainer_of(tmp_path, step_model(tiny.tokenizer(), num_labels=3))
    with pytest.raises(ValueError, match="2 pairs|8 of 8 rows are longer than `max_length`"):
        trainer_of(tmp_path, max_length=3)


def test_steps_that_ppo_would_split_otherwise_are_said_once(tmp_path, caplog):
    data = Dataset.from_dict({"prompt": ["a"] * 4, "completions": [["b\nc"], ["d"]] * 2, "labels": [[1], [0]] * 2})
    trainer_of(tmp_path, data=data)
    assert "the steps of 2 of 4 rows, for example row 0, would be others" in caplog.text
    assert StepRule().splits(["d"])
