"""Reward modelling: the same loss as TRL, and the additions to it."""

import json
import math
import multiprocessing
import os
import signal

import numpy as np
import pytest
import tiny
import torch
from datasets import IterableDataset
from peft import PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from tolerances import FP32, SAMPLED_STD, assert_close
from transformers import AutoModelForCausalLM
from trl import RewardConfig, RewardTrainer

from rlhf_recipes import RewardModelTrainer
from rlhf_recipes.models.dropout import dropouts
from rlhf_recipes.models.loading import load_policy
from rlhf_recipes.models.reward_model import load_reward_model, load_reward_model_base
from rlhf_recipes.options.changes import with_changes
from rlhf_recipes.rewards.card import RewardModelCard
from rlhf_recipes.rewards.scorer import RewardModelScorer

pytestmark = pytest.mark.tiny


@pytest.fixture
def base(tmp_path):
    """Write an SFT policy, and return its path."""
    return tiny.save(tiny.policy(tiny.tokenizer()), tmp_path / "base")


def _trainer(model, tmp_path, **kwargs):
    return tiny.reward_trainer(tmp_path / "rm", model, **kwargs)


@pytest.mark.parametrize("name", ["get_train_dataloader", "get_eval_dataloader"])
def test_a_signal_to_all_processes_of_a_job_ends_no_data_loader(base, tmp_path, name):
    """torch raises an error when a worker ends. There would then be no checkpoint."""
    options = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "dataloader_num_workers": 1}
    trainer = _trainer(base, tmp_path, **options)
    batches = iter(getattr(trainer, name)())
    next(batches)
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        os.kill(worker.pid, number)
    assert len(list(batches)) == len(trainer.train_dataset if "train" in name else trainer.eval_dataset) - 1


@pytest.mark.parametrize("margin", [False, True])
def test_losses_are_those_of_trl_without_the_l2_term(tmp_path, margin):
    def losses(cls, config_cls, **kwargs):
        tok = tiny.tokenizer()
        args = config_cls(
            str(tmp_path / cls.__name__),
            per_device_train_batch_size=4, max_steps=4, logging_steps=1, save_strategy="no", report_to=[],
            use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, weight_decay=0.0, **kwargs,
        )  # fmt: skip
        data = tiny.preferences(margin=margin)
        if cls is RewardTrainer:
            data = data.map(lambda row: {"prompt": row["prompt"] + "\n\n"})
        trainer = cls(tiny.reward_model(tok), args, train_dataset=data, processing_class=tok)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    ours = losses(RewardModelTrainer, tiny.RewardModelConfig)
    assert ours == losses(RewardTrainer, RewardConfig)
    with_l2 = losses(RewardModelTrainer, tiny.RewardModelConfig, l2_coefficient=0.5)
    assert with_l2[0] > ours[0]


def test_l2_term_is_the_mean_squared_score(tmp_path, base):
    trainer = _trainer(base, tmp_path, l2_coefficient=0.5)
    batch = next(iter(trainer.get_train_dataloader()))
    loss, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    trainer.args.l2_coefficient = 0.0
    plain = trainer.compute_loss(trainer.model, dict(batch))
    scores = outputs.logits.squeeze(-1).double().tolist()
    assert_close(loss - plain, 0.5 * sum(s * s for s in scores) / len(scores), FP32)


def test_a_new_head_has_the_initialisation_of_the_field(base):
    weights = []
    for seed in range(40):
        torch.manual_seed(seed)
        weights.append(load_reward_model_base(base).score.weight.detach())
    hidden = weights[0].numel()
    assert_close(torch.stack(weights).std(), 1 / math.sqrt(hidden + 1), SAMPLED_STD)
    assert load_reward_model_base(base).score.bias is None


def test_a_trained_head_is_kept(tmp_path, base):
    trainer = _trainer(base, tmp_path)
    trainer.train()
    trainer.save_model()
    again = load_reward_model_base(str(tmp_path / "rm"))
    assert_close(again.score.weight, trainer.model.score.weight, FP32)


def test_scores_are_float32_under_bfloat16(base):
    model = load_reward_model_base(base, dtype=torch.bfloat16)
    ids = torch.tensor([[5, 6, 7]])
    assert model(input_ids=ids).logits.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.float()(input_ids=ids).logits.dtype == torch.float32


def test_lora_trains_and_saves_the_head(tmp_path, base):
    trainer = _trainer(base, tmp_path, peft=tiny.lora())
    before = [p.clone() for n, p in trainer.model.named_parameters() if "score" in n and p.requires_grad]
    assert before
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    saved = load_file(tmp_path / "rm" / "adapter_model.safetensors")
    head = next(tensor for name, tensor in saved.items() if "score" in name)
    assert not torch.equal(head, before[0])
    text = {"prompts": ["the fox\n\n"], "completions": ["is red"]}
    live = RewardModelScorer(trainer.model, tiny.tokenizer())(**text)
    assert_close(RewardModelScorer.from_pretrained(str(tmp_path / "rm"))(**text), live, FP32)


@pytest.mark.parametrize("chat", [False, True])
def test_the_card_says_how_the_model_was_trained(tmp_path, base, chat):
    trainer = _trainer(base, tmp_path, chat=chat, response_separator=" -> ")
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    card = RewardModelCard.load(tmp_path / "rm")
    assert card.base_model == base
    assert card.conversational is chat
    assert card.response_separator == (None if chat else " -> ")
    assert (card.chat_template_fingerprint is not None) is chat
    assert card.score_mean == metrics["eval_score_mean"]
    assert card.score_std == metrics["eval_score_std"]
    assert card.eval_accuracy == metrics["eval_accuracy"]
    json.loads((tmp_path / "rm" / "reward_model_card.json").read_text())


def test_metrics_are_over_pairs_and_not_over_batches(tmp_path, base):
    """Six pairs come in batches of four. A mean of batch means would give the last two pairs double weight."""
    trainer = _trainer(base, tmp_path, per_device_eval_batch_size=4)
    metrics = trainer.evaluate()
    scorer = RewardModelScorer(trainer.model, tiny.tokenizer())
    data = tiny.preferences(count=6)
    prompts = [p + "\n\n" for p in data["prompt"]]
    chosen, rejected = (np.array(scorer(prompts, list(data[side]))) for side in ("chosen", "rejected"))
    assert_close(metrics["eval_accuracy"], (chosen > rejected).mean(), FP32)
    assert_close(metrics["eval_chosen_score_mean"], chosen.mean(), FP32)
    assert_close(metrics["eval_rejected_score_std"], rejected.std(), FP32)
    assert_close(metrics["eval_score_std"], np.concatenate([chosen, rejected]).std(), FP32)
    assert {"eval_calibration_error", "eval_length_correlation", "eval_accuracy_margin_q1"} <= metrics.keys()


@pytest.mark.parametrize("chat", [False, True])
def test_ppo_shows_the_reward_model_the_tokens_it_was_trained_on(tmp_path, base, chat):
    trainer = _trainer(base, tmp_path, chat=chat)
    row = trainer.train_dataset[0]
    raw = tiny.preferences(chat=chat)[0]
    card = trainer.card
    scorer = RewardModelScorer(trainer.model, tiny.tokenizer(), card)
    prompt = raw["prompt"] if chat else raw["prompt"] + "\n\n"
    assert scorer.token_ids([prompt], [raw["chosen"]], [True]) == [row["chosen_ids"]]


def test_a_reward_model_learns_a_clear_preference(tmp_path, base):
    trainer = _trainer(base, tmp_path, max_steps=30, learning_rate=1e-3)
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] == 1.0


def test_two_labels_are_refused(tmp_path):
    tok = tiny.tokenizer()
    path = tiny.save(tiny.reward_model(tok, num_labels=2), tmp_path / "two")
    for load in (load_reward_model, lambda path: _trainer(path, tmp_path)):
        with pytest.raises(ValueError, match="has 2 labels"):
            load(path)


def test_a_trained_head_stays_float32_in_a_quantised_model(tmp_path, base, monkeypatch):
    """TRL casts trained weights beside quantised weights, which it recognises by the attribute."""
    model = load_reward_model_base(base)
    model.is_loaded_in_4bit = True
    trainer = _trainer(model, tmp_path, peft=tiny.lora())
    dtypes = {name: p.dtype for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {dtype for name, dtype in dtypes.items() if "lora" in name} == {torch.bfloat16}, "TRL no longer casts"
    assert {dtype for name, dtype in dtypes.items() if "score" in name} == {torch.float32}


def test_a_stream_gets_its_separator(tmp_path, base):
    data = IterableDataset.from_generator(lambda: iter(tiny.preferences()))
    assert data.column_names is None
    trainer = _trainer(base, tmp_path, data=data)
    text = tiny.tokenizer().decode(next(iter(trainer.train_dataset))["chosen_ids"])
    assert "\n\n" in text
    trainer.train()


def test_plain_text_without_a_prompt_is_refused(tmp_path, base):
    with pytest.raises(ValueError, match="without a column 'prompt'"):
        _trainer(base, tmp_path, data=tiny.preferences().remove_columns("prompt"))


def test_only_an_evaluation_of_its_own_is_written_to_the_card(tmp_path, base):
    trainer = _trainer(base, tmp_path)
    own = trainer.evaluate()
    other = trainer._prepare_dataset(tiny.preferences(count=3), trainer.processing_class, trainer.args, "other")
    trainer.predict(other)
    metrics = trainer.evaluate(other)
    assert metrics["eval_score_mean"] != own["eval_score_mean"]
    assert trainer.card.score_mean == own["eval_score_mean"]
    trainer.predict(other)
    assert trainer.evaluate()["eval_score_mean"] == own["eval_score_mean"]


@pytest.mark.parametrize("first", ["adapter", "whole"])
def test_weights_of_two_kinds_do_not_share_a_directory(tmp_path, base, first):
    peft = {"adapter": tiny.lora(), "whole": None}
    trainer = _trainer(base, tmp_path, peft=peft.pop(first))
    trainer.save_model()
    with pytest.raises(ValueError, match="Choose another `output_dir`"):
        _trainer(base, tmp_path, peft=next(iter(peft.values())))


def test_an_adapter_is_no_start_for_a_reward_model(tmp_path, base):
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), tiny.lora()).save_pretrained(tmp_path / "sft")
    with pytest.raises(ValueError, match="Merge it into its base first"):
        _trainer(str(tmp_path / "sft"), tmp_path)


@pytest.mark.parametrize("how", ["argument", "options"])
def test_quantisation_reaches_the_model(tmp_path, base, monkeypatch, how):
    """The recipe passes it in `model_init_kwargs`. A user of the library may do the same, or pass an argument."""
    seen = {}

    def load(path, **kwargs):
        seen.update(kwargs)
        raise InterruptedError

    monkeypatch.setattr("rlhf_recipes.trainers.reward_modeling.load_reward_model_base", load)
    wish = {"quantization": "four bits"}
    if how == "options":
        wish = {"model_init_kwargs": {"quantization_config": "four bits"}}
    with pytest.raises(InterruptedError):
        _trainer(base, tmp_path, **wish)
    assert seen["quantization_config"] == "four bits"


def test_the_head_depends_on_the_runs_seed_alone(tmp_path, base):
    heads = []
    for global_seed, seed in ((0, 42), (1, 42), (0, 43)):
        torch.manual_seed(global_seed)
        heads.append(_trainer(base, tmp_path, seed=seed).model.score.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_the_training_log_after_an_evaluation_is_of_training_alone(tmp_path, base):
    trainer = _trainer(base, tmp_path, max_steps=3)
    trainer.evaluate()
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 3
    assert not [name for entry in entries for name in entry if name.startswith("eval_")]


def test_reward_models_train_without_any_dropout(tmp_path):
    model = tiny.reward_model(tiny.tokenizer())
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    assert not dropouts(tiny.reward_trainer(tmp_path, model).model)
    kept = tiny.reward_model(tiny.tokenizer())
    kept.model.layers[0].self_attn.attention_dropout = 0.3
    assert dropouts(tiny.reward_trainer(tmp_path, kept, disable_dropout=False).model)


def test_an_adapter_that_cannot_be_merged_is_refused(tmp_path):
    peft = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
    with pytest.raises(ValueError, match="`peft_config` is an adapter of the type PROMPT_TUNING"):
        tiny.reward_trainer(tmp_path / "rm", peft=peft)
    get_peft_model(tiny.policy(tiny.tokenizer()), with_changes(peft, task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="of the type PROMPT_TUNING, which cannot be merged"):
        load_policy(str(tmp_path))
