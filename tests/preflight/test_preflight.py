"""The preflight of real trainers: its text is true, and it changes nothing."""

import pytest
import tiny
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig
from trl import ScriptArguments

from rlhf_recipes.data.loading import load_split, without_answers
from rlhf_recipes.options.recipes import PreflightArguments, TrackingArguments
from rlhf_recipes.preflight import preflight
from rlhf_recipes.preflight.policy import answers_of
from rlhf_recipes.preflight.report import Report
from rlhf_recipes.preflight.resources import (
    SMALL_FILES,
    checkpoint_bytes,
    number_of_parameters,
    parameter_bytes,
    training_sizes,
)
from rlhf_recipes.rewards.card import RewardModelCard, tokenizer_fingerprint

pytestmark = pytest.mark.tiny

NO_TRACKING = TrackingArguments(tracking=False)


def _say(trainer, capsys, data=None, evaluation=None, *, only=False, tracking=NO_TRACKING, answers=None):
    """Return the printed lines."""
    data = trainer.train_dataset if data is None else data
    capsys.readouterr()
    try:
        preflight.preflight(
            trainer, data, evaluation, PreflightArguments(preflight_only=only), tracking, with_answers=answers
        )
    finally:
        lines = capsys.readouterr().out.splitlines()
    return lines


def _found(lines):
    return [line for line in lines if line.startswith(("Warning", "Error"))]


def _with_card(directory, tok=None, **card):
    """Write a reward model with a card of these values, and return its path."""
    path = tiny.save(tiny.reward_model(tok or tiny.tokenizer()), directory)
    fingerprint = tokenizer_fingerprint(tiny.tokenizer())
    values = {"score_mean": 0.0, "score_std": 1.0, "eval_accuracy": 0.7, **card}
    RewardModelCard("base", False, "\n\n", fingerprint, None, **values).save(path)
    return path


@pytest.fixture
def rm(tmp_path):
    """Write a reward model with a healthy card."""
    return _with_card(tmp_path / "rm")


def test_a_healthy_run_is_a_short_block(tmp_path, capsys, rm):
    evaluation = Dataset.from_dict({"prompt": [f"who is {i}?" for i in range(30)]})
    trainer = tiny.ppo_trainer(
        tmp_path / "out", rewards=rm, eval_data=evaluation, eval_strategy="steps", eval_steps=4, max_steps=12,
        save_strategy="steps", save_steps=4, save_total_limit=2, steps_per_generation=4, gradient_accumulation_steps=2,
        num_generations=2,
    )  # fmt: skip
    lines = _say(trainer, capsys, tiny.prompts(), evaluation)
    assert lines[0] == "Preflight: 1 process on cpu, 12 optimiser steps"
    assert lines[1:9] == [
        "  rollout     16 completions (4 x 1 process x 4 steps), 2 per prompt",
        "  updates     2 epochs of 2 mini-batches of 8: 4 optimiser steps per rollout",
        "  run         3 rollouts, 48 completions, at most 480 tokens",
        "  data        8 prompts, 24 drawn (3.00 passes)",
        "  evaluation  4 times on 30 rows",
        "  checkpoints 3, the last 2 kept, and the final model",
        "  reward      rm, accuracy 0.70, score 0.00 ± 1.00",
        lines[8],
    ]
    assert lines[8].startswith("  disk        up to")
    assert lines[9].startswith("  memory      ")
    assert lines[10] == "  rate        learning rate 0.001 (usual: 1e-05 to 1e-03)"
    assert lines[11:] == ["  example 0   hello\\n\\n‖", "  example 1   the fox\\n\\n‖"]


def test_a_run_trains_the_same_with_it(tmp_path, capsys, rm):
    weights = []
    for name in ("without", "with"):
        torch.manual_seed(0)
        trainer = tiny.ppo_trainer(tmp_path / name, rewards=rm)
        if name == "with":
            _say(trainer, capsys, tiny.prompts(), answers=tiny.preferences())
        trainer.train()
        weights.append([p.detach().clone() for p in trainer.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_a_reward_model_is_asked_for_sixteen_answers_at_most(tmp_path, capsys, rm):
    trainer = tiny.ppo_trainer(tmp_path / "out", rewards=[rm, tiny.length_reward], data=tiny.prompts(count=32))
    asked = []
    (scorer, _) = trainer.reward_funcs
    trainer.reward_funcs[0].model.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    lines = _say(trainer, capsys, tiny.prompts(count=32), answers=tiny.preferences(count=32))
    assert sum(asked) == 16
    assert any(line.endswith("score 0.00 ± 1.00; length_reward") for line in lines)
    assert scorer.model.training is False


@pytest.mark.parametrize("only_model", [False, True])
@pytest.mark.parametrize("peft", [None, tiny.lora()], ids=["full", "lora"])
def test_a_checkpoint_takes_what_was_said(tmp_path, peft, only_model):
    trainer = tiny.ppo_trainer(
        tmp_path, peft=peft, max_steps=4, save_strategy="steps", save_steps=4, save_only_model=only_model
    )
    said = checkpoint_bytes(training_sizes(trainer.model, trainer.args, adapter=bool(peft)), only_model=only_model)
    trainer.train()
    (folder,) = tmp_path.glob("checkpoint-*")
    tensors = [t for path in folder.glob("*.safetensors") for t in load_file(path).values()]
    if not only_model:
        states = torch.load(folder / "optimizer.pt", weights_only=True)["state"].values()
        tensors += [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
    assert sum(tensor.nbytes for tensor in tensors) == said - SMALL_FILES
    others = [path for path in folder.iterdir() if path.suffix != ".safetensors" and path.name != "optimizer.pt"]
    assert sum(path.stat().st_size for path in others) < SMALL_FILES


def test_a_checkpoint_of_a_quantised_policy(tmp_path):
    pytest.importorskip("bitsandbytes")
    base = tiny.save(tiny.policy(tiny.tokenizer()), tmp_path / "base")
    four_bits = BitsAndBytesConfig(load_in_4bit=True)
    trainer = tiny.ppo_trainer(tmp_path / "out", model=base, peft=tiny.lora(), quantization=four_bits)
    sizes = training_sizes(trainer.model, trainer.args, adapter=True)
    assert sizes.saved == parameter_bytes([trainer.model], trained=True) < parameter_bytes([trainer.model])
    weights = [*trainer.model.parameters()]
    packed = sum(weight.numel() for weight in weights if weight.dtype == torch.uint8)
    assert number_of_parameters(trainer.model) == sum(weight.numel() for weight in weights) + packed, "two in a byte"
    assert packed


@pytest.mark.parametrize(("free", "only"), [(100, False), (100, True), (25_000_000, True)])
def test_a_full_disk(tmp_path, capsys, monkeypatch, free, only):
    """It is an error before training. With `preflight_only` the error is printed, and the exit code is 1."""
    monkeypatch.setattr(preflight, "free_disk", lambda directory: free)
    trainer = tiny.ppo_trainer(tmp_path, save_strategy="steps", save_steps=4, max_steps=8)
    fits = free > SMALL_FILES
    with pytest.raises(SystemExit if only else ValueError) as error:
        _say(trainer, capsys, only=only)
    if only:
        assert error.value.code == (0 if fits else 1)
    else:
        assert "One checkpoint needs" in str(error.value)


def test_a_checkpoint_that_is_not_there_is_found_without_training(tmp_path, capsys):
    trainer = tiny.ppo_trainer(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    with pytest.raises(ValueError, match="`resume_from_checkpoint` .* does not exist"):
        _say(trainer, capsys, only=True)


def test_the_copy_in_a_store_here_counts(tmp_path, capsys):
    trainer = tiny.ppo_trainer(tmp_path)
    said = []
    for tracking in (
        NO_TRACKING,
        TrackingArguments(tracking_uri="sqlite:///x.db"),
        TrackingArguments(tracking_uri="http://x"),
    ):
        said.append(next(line for line in _say(trainer, capsys, tracking=tracking) if "disk" in line).split()[3])
    assert said == ["20", "40", "20"]


def test_too_little_memory_is_a_warning(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(preflight, "free_memory", lambda device: 1_000)
    (warning,) = _found(_say(tiny.ppo_trainer(tmp_path), capsys))
    assert warning.startswith("Warning: Training may need")


def test_chunks_need_less_memory(tmp_path, capsys):
    """The estimate counts the completions that are sampled together."""
    lines, needs = [], []
    for rows in (None, 128, 8):
        options = {"max_completion_length": 100, "per_device_train_batch_size": 1, "steps_per_generation": 128}
        trainer = tiny.ppo_trainer(
            tmp_path / str(rows), data=tiny.prompts(count=128), generation_batch_rows=rows, **options
        )
        said = _say(trainer, capsys)
        lines.append([line.split(maxsplit=1)[1] for line in said if line.split()[:1] == ["sampling"]])
        needs.append(float(next(line for line in said if "to come" in line).split("about ")[1].split()[0]))
    assert lines == [[], [], ["8 of 128 completions of a process at a time"]]
    assert needs[0] == needs[1] > needs[2]


def test_the_rows_without_gradient_of_a_gpu_are_counted(tmp_path, monkeypatch):
    """With checkpoints of activations, a forward of four times the rows holds more than a micro-batch that trains."""
    options = {"gradient_checkpointing": True, "generation_batch_rows": 1, "max_completion_length": 100}
    trainer, rollouts, rows = tiny.ppo_trainer(tmp_path, **options), [], []
    monkeypatch.setattr(
        preflight, "memory_to_come", lambda sizes, kept, rollout, **spread: rollouts.append(rollout) or 0
    )
    scoring = lambda config, tokens, args, critic, width: rows.append(tokens) or 10**12  # noqa: E731
    monkeypatch.setattr(preflight, "scoring_bytes", scoring)
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(preflight, "free_memory", lambda device: 10**15)
        monkeypatch.setattr(type(trainer.args), "device", torch.device(device))
        preflight._check_memory(Report(), trainer, trainer.train_dataset)
    assert rows[1] == 4 * rows[0]
    assert rollouts == [0, 10**12] * 2


def test_chunks_on_a_gpu_follow_from_the_memory_that_the_rest_leaves(tmp_path, monkeypatch):
    trainer, report = tiny.ppo_trainer(tmp_path), Report()
    monkeypatch.setattr(type(trainer.args), "device", torch.device("cuda", 0))
    assert preflight._sampled_at_once(report, trainer, row_bytes=10, free=1_000) == 8
    assert preflight._sampled_at_once(report, trainer, row_bytes=10, free=60) == 4
    assert report.lines["sampling"] == "about 4 of 8 completions of a process at a time"
    trainer.rows_at_once = 2
    trainer.train_dataset = trainer.train_dataset.add_column("image", [None] * 8)
    assert preflight._sampled_at_once(report, trainer, row_bytes=10, free=60) == 8, "images are not cut"


def test_what_a_model_suppresses_is_found_and_true(tmp_path, capsys):
    """TRL's sampler overrides the `repetition_penalty` of a model, but it silently keeps its `min_new_tokens`."""
    tok = tiny.tokenizer()
    model = tiny.policy(tok)
    model.generation_config.repetition_penalty, model.generation_config.min_new_tokens = 5.0, 10
    trainer = tiny.ppo_trainer(tmp_path, model=model, tok=tok)
    end, sampler = _found(_say(trainer, capsys))
    assert "kept away by `min_new_tokens` (10)" in end
    assert "`min_new_tokens: 10` (the policy's `generation_config.json`)" in sampler
    assert tiny.rollout(trainer)["completion_mask"].sum(dim=1).tolist() == [10] * 8
    assert trainer.generation_config.repetition_penalty == 1.0


@pytest.mark.parametrize("eos", [None, "outside"])
def test_an_answer_that_cannot_end(tmp_path, capsys, eos):
    tok = tiny.tokenizer()
    model = tiny.policy(tok)
    trainer = tiny.ppo_trainer(tmp_path, model=model, tok=tok)
    trainer.eos_token_ids = [None] if eos is None else [len(tok) + 5]  # as TRL has them from such a tokenizer
    with pytest.raises(ValueError, match="no answer can end|no EOS token"):
        _say(trainer, capsys)


def _scored(trainer, scores):
    trainer.reward_funcs[0]._forward = lambda token_ids: torch.tensor(scores(token_ids)).unsqueeze(1)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (lambda rows: [float("nan")] * len(rows), "Error: The reward model rm gives no finite score to 16 of 16"),
        (lambda rows: [0.25] * len(rows), "Warning: The reward model rm gives 0.25 to 16 different answers"),
    ],
)
def test_a_broken_reward_model(tmp_path, capsys, rm, scores, message):
    trainer = tiny.ppo_trainer(tmp_path / "out", rewards=rm)
    _scored(trainer, scores)
    with pytest.raises(SystemExit) as error:
        _say(trainer, capsys, only=True, answers=tiny.preferences())
    assert error.value.code == int(message.startswith("Error"))
    trainer = tiny.ppo_trainer(tmp_path / "again", rewards=rm)
    _scored(trainer, scores)
    if message.startswith("Warning"):
        assert _found(_say(trainer, capsys, answers=tiny.preferences()))[0].startswith(message)


def test_a_reward_model_that_likes_the_wrong_answer(tmp_path, capsys, rm):
    """The scorer sorts a batch by length, so the fake scores look at the text and not at the position."""
    data = Dataset.from_dict({"prompt": tiny.PROMPTS, "completion": tiny.PROMPTS})
    right = {tuple(tiny.tokenizer()(f"{p}\n\n{p}<eos>")["input_ids"]) for p in tiny.PROMPTS}
    for good, count in ((1.0, 0), (-1.0, 1)):
        trainer = tiny.ppo_trainer(tmp_path / str(count), rewards=rm)
        _scored(trainer, lambda rows, good=good: [good if tuple(row) in right else 0.0 for row in rows])
        found = _found(_say(trainer, capsys, answers=data))
        assert len(found) == count
    assert "in only 0 of 8 cases (mean -1.00 and 0.00)" in found[0]


def test_another_tokenizer_is_a_remark_and_no_warning(tmp_path, capsys):
    tok = tiny.tokenizer(vocab_size=280)
    path = _with_card(tmp_path / "rm", tok)
    tok.save_pretrained(path)
    card = RewardModelCard("base", False, "\n\n", tokenizer_fingerprint(tok), None, 0.0, 1.0, 0.7)
    card.save(path)
    lines = _say(tiny.ppo_trainer(tmp_path / "out", rewards=path), capsys)
    assert "  reward      rm, accuracy 0.70, score 0.00 ± 1.00, tokenizer of its own" in lines
    assert _found(lines) == []


@pytest.mark.parametrize("weight", [1.0, 4.0])
def test_the_weight_of_a_reward_model_counts(tmp_path, capsys, weight):
    path = _with_card(tmp_path / "rm", score_std=2.0)
    trainer = tiny.ppo_trainer(tmp_path / "out", rewards=path, reward_norm=False, reward_weights=[weight])
    assert ["deviation of 8" in line for line in _found(_say(trainer, capsys))] == ([True] if weight == 4.0 else [])


def test_a_reward_adapter_is_asked_on_the_policys_backbone(tmp_path, capsys):
    base = tiny.save(tiny.policy(tiny.tokenizer()), tmp_path / "base")
    tiny.save_lora_reward_model(base, tmp_path / "rm", max_steps=8, learning_rate=1e-2)
    adapter = {"rewards": None, "reward_adapter": str(tmp_path / "rm")}
    trainer = tiny.ppo_trainer(tmp_path / "out", model=base, peft=tiny.lora(), **adapter)
    trainer.model.train()
    lines = _say(trainer, capsys, tiny.prompts(), answers=tiny.preferences())
    assert any(line.startswith("  reward      rm, accuracy") for line in lines)
    assert trainer.model.active_adapter == "default"
    assert trainer.model.training


def test_preferences(tmp_path, capsys):
    pairs = tiny.preferences(count=200).map(lambda row, i: {"chosen": f"{row['chosen']} {i}"}, with_indices=True)
    trainer = tiny.reward_trainer(tmp_path, max_length=25, data=pairs)
    lines = _say(trainer, capsys, pairs)
    assert lines[0] == "Preflight: 1 process on cpu, 2 optimiser steps"
    assert lines[1] == "  updates     4 rows per optimiser step (4 x 1 process x 1 accumulated)"
    assert "the longer answer is chosen in 100%" in lines[2]
    length, dropped = _found(lines)
    assert length.startswith("Warning: The longer answer is chosen in 100% of the pairs")
    assert f"{200 - len(trainer.train_dataset)} of 200 pairs are longer than `max_length` (25) tokens" in dropped
    assert 0 < len(trainer.train_dataset) < 190


def test_pairs_that_are_all_too_long(tmp_path, capsys):
    with pytest.raises(ValueError, match="8 of 8 pairs are longer than `max_length`"):
        _say(tiny.reward_trainer(tmp_path, max_length=2), capsys, tiny.preferences())


def test_answers_are_kept_from_what_trains_and_found_by_the_preflight(tmp_path):
    tiny.preferences().to_json(tmp_path / "train.jsonl")
    answered = load_split(ScriptArguments(dataset_name=str(tmp_path)), "train")
    prompts = without_answers(answered)
    assert prompts.column_names == ["prompt"]
    assert prompts["prompt"] == answered["prompt"]
    assert answers_of(answered) == tiny.preferences()["chosen"][:8]
