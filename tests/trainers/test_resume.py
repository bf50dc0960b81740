"""A resumed run equals an uninterrupted one in every weight and every figure, bit for bit."""

import logging
import pickle
import random
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from faults import SignalAt
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, TrainerCallback
from transformers.trainer_callback import ExportableState

from rlhf_recipes.durability.checkpoints import checkpoints_by_age, publish
from rlhf_recipes.durability.preemption import PreemptionCallback
from rlhf_recipes.options.relevance import defaults_of, options_that_count
from rlhf_recipes.trainers.run_identity import LATER_FACTS, RunIdentity, facts_of_run

pytestmark = [pytest.mark.tiny, pytest.mark.portable]

TIMES = ("step_time", "runtime", "per_second")
SEVERAL_EPOCHS = {"max_steps": 20, "logging_steps": 3, "save_strategy": "steps"}
"""Twenty prompts are two rollouts of four steps each, and a rest that is dropped; logs lie across rollouts."""


def _reward(completions, **kwargs):
    """Score with every random generator that a user's function might use."""
    noise = random.random() + float(np.random.rand()) + torch.rand(()).item()
    return [len(text) + noise for text in completions]


def _dense_reward(completions, completion_ids, **kwargs):
    """Score each token."""
    return [[score / len(ids)] * len(ids) for score, ids in zip(_reward(completions), completion_ids, strict=True)]


_BY_KIND = {"dense": _dense_reward, "4-bit backbone": _dense_reward}


def _on_one_backbone(directory):
    """Return the arguments of a run with dense rewards whose other roles share one 4-bit base."""
    pytest.importorskip("bitsandbytes")
    config = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    options = {"quantization": BitsAndBytesConfig(**config)}
    base = tiny.save(tiny.policy(tiny.tokenizer()), directory / "base")
    tiny.save_lora_reward_model(base, directory / "rm", max_steps=2, learning_rate=1e-2, **options)
    shared = {"model": base, "reward_adapter": str(directory / "rm"), "critic": "adapter", "kl_estimator": "full"}
    return options | shared | {"max_steps": 12}


def _trainer(directory, kind="full", **kwargs):
    peft, tok = kind in ("lora", "adapter critic", "4-bit backbone"), tiny.tokenizer()
    if kind == "dense":
        kwargs = {"kl_estimator": "full", **kwargs}
    if kind.endswith("critic"):
        kwargs = {"critic": kind.split()[0], **kwargs}
    return tiny.ppo_trainer(
        directory,
        tok=tok,
        rewards=[tiny.reward_model(tok), _reward] if kind == "reward critic" else _BY_KIND.get(kind, _reward),
        reward_tok=[tok, None] if kind == "reward critic" else None,
        data=tiny.prompts(count=20).map(lambda row, i: {"prompt": f"{row['prompt']} {i}"}, with_indices=True),
        peft=kwargs.pop("peft", tiny.lora() if peft else None),
        **{**SEVERAL_EPOCHS, "kl_controller": "adaptive", "kl_horizon": 64, "lr_scheduler_type": "linear", **kwargs},
    )


def _history(trainer):
    entries = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
    return [{k: v for k, v in entry.items() if not k.endswith(TIMES)} for entry in entries]


def _everything(trainer):
    return {
        "weights": {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()},
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "state": {name: part.state_dict() for name, part in trainer._stateful.items()},
        "history": _history(trainer),
        "critic": trainer.critic and trainer.critic.state_dict(),
        "tokens": trainer.state.num_input_tokens_seen,
        "flos": trainer.state.total_flos,
    }


def _assert_same(left, right, path=""):
    if isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for name in left:
            _assert_same(left[name], right[name], f"{path}/{name}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), path
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            _assert_same(a, b, f"{path}/{index}")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left.cpu(), right.cpu()), path
    else:
        assert left == right, path


MOMENTS = (1, 4, 6, 8, 11, 19)  # in a rollout, at its end, at an epoch's end, between two logs


@pytest.mark.parametrize(
    ("kind", "moments"),
    # Other weights, not other moments.
    [
        ("full", MOMENTS),
        ("lora", (1, 11)),
        ("reward critic", (4, 11, 19)),
        ("adapter critic", (4, 11)),
        ("dense", (6,)),
        ("4-bit backbone", (6,)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, kind, moments):
    options = _on_one_backbone(tmp_path) if kind == "4-bit backbone" else {}
    whole = _trainer(tmp_path / "whole", kind, save_steps=1, **options)
    whole.train()
    expected = _everything(whole)
    for step in moments:
        resumed = _trainer(tmp_path / "resumed", kind, save_strategy="no", **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        _assert_same(expected, _everything(resumed), f"step {step}")


def test_a_resume_never_reads_the_pickle_of_the_options(tmp_path):
    """Old checkpoints hold a pickle of classes whose modules have moved since."""
    _trainer(tmp_path, save_steps=4).train()
    checkpoint, staged = tmp_path / "checkpoint-4", tmp_path / "staged" / "checkpoint-4"
    staged.parent.mkdir()
    checkpoint.rename(staged)
    (staged / "training_args.bin").write_bytes(b"crlhf_recipes.configs\nPPOConfig\n.")
    publish(staged, checkpoint)  # with a manifest that knows the new file
    with pytest.raises(ModuleNotFoundError, match="rlhf_recipes.configs"):
        pickle.loads((checkpoint / "training_args.bin").read_bytes())
    resumed = _trainer(tmp_path / "resumed", save_strategy="no")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == SEVERAL_EPOCHS["max_steps"]


def test_a_resume_warns_of_weights_that_are_missing_but_not_of_tied_ones(tmp_path, monkeypatch):
    """The output layer is tied to the embedding, so a checkpoint holds the embedding alone."""
    said = []
    monkeypatch.setattr("transformers.trainer.logger.warning", said.append)
    first, resumed = (
        _trainer(tmp_path, model=tiny.policy(tiny.tokenizer(), tie_word_embeddings=True), max_steps=2, save_steps=2)
        for _ in range(2)
    )
    first.train()
    resumed.train(resume_from_checkpoint=True)
    assert not [line for line in said if "missing keys" in line]
    weights = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    for lost, named in (("model.norm.weight", 1), ("model.embed_tokens.weight", 3)):
        del weights[lost]
        save_file(weights, tmp_path / "checkpoint-2" / "model.safetensors")
        resumed._load_from_checkpoint(str(tmp_path / "checkpoint-2"))
        assert (said[-1].count(".weight'"), lost in said[-1]) == (named, True), "without the embedding, both are lost"


SHORT = {"max_steps": 4, "save_steps": 4, "logging_steps": 1}
CHANGES = {
    "option": ({"learning_rate": 5e-4}, "`learning_rate` was 0.001, is 0.0005"),
    "length under a schedule": ({"max_steps": 8}, "`max_steps` was 4, is 8"),
    "batch": ({"steps_per_generation": 4}, "`generation_batch_size` was 8, is 16"),
    "policy": ({"model": 3}, "the policy to start from was [0-9a-f]{16}, is [0-9a-f]{16}"),
    "reward model": ({"rewards": 5}, "the rewards was .'[0-9a-f]{16}'., is .'[0-9a-f]{16}'."),
    "data": ({"data": tiny.prompts(count=21)}, "the training data was"),
}


def _short(directory, model=0, rewards=4, **kwargs):
    tok = tiny.tokenizer()
    models = {"model": tiny.policy(tok, seed=model), "rewards": tiny.reward_model(tok, seed=rewards)}
    models["rewards"].config._name_or_path = tiny.save(models["rewards"], f"{directory}-reward")
    return tiny.ppo_trainer(
        directory, **{**models, "data": tiny.prompts(count=20), "save_strategy": "steps", **SHORT, **kwargs}
    )


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_a_resume_of_another_run_is_refused_with_the_difference(tmp_path, caplog, change, message):
    _short(tmp_path / "first").train()
    checkpoint = str(tmp_path / "first" / "checkpoint-4")
    with pytest.raises(ValueError, match=f"The checkpoint is of another run: .*{message}"):
        _short(tmp_path / "second", **change).train(checkpoint)
    resumed = _short(tmp_path / "second", allow_changes_on_resume=True, **change)
    with caplog.at_level(logging.WARNING):
        resumed.train(checkpoint)
    assert re.search(f"The checkpoint is of another run: .*{message}.*The run resumes anyway", caplog.text)


def test_another_number_of_processes_is_another_run(tmp_path, monkeypatch):
    args = tiny.ppo_config(tmp_path)
    given = {"policy": "policy", "rewards": [], "train_dataset": tiny.prompts()}
    one = facts_of_run(args, **given)
    monkeypatch.setattr(type(args), "world_size", 2)
    with pytest.raises(ValueError, match="the number of processes was 1, is 2"):
        RunIdentity(facts_of_run(args, **given), allow_changes=False).load_state_dict(one)


OTHER_NETWORKS = {
    "scale": ({"peft": tiny.lora(lora_alpha=3)}, "the adapter was .*'r': 4.*, is .*'lora_alpha': 3"),
    "dropout": ({"peft": LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.3)}, "0.1.*, is .*0.3"),
    "precision": ({"dtype": torch.float64}, "`dtype` was torch.float32, is torch.float64"),
}


def _adapted(directory, dtype=torch.float32, **kwargs):
    tok = tiny.tokenizer()
    return _trainer(directory, "lora", **{**SHORT, "model": tiny.policy(tok).to(dtype), **kwargs})


@pytest.mark.parametrize(("change", "message"), OTHER_NETWORKS.values(), ids=OTHER_NETWORKS)
def test_a_resume_with_another_network_is_refused(tmp_path, change, message):
    """The weights alone do not tell: scale and dropout have none, and a load converts the precision."""
    _adapted(tmp_path / "first", peft=tiny.lora()).train()
    with pytest.raises(ValueError, match=f"The checkpoint is of another run: .*{message}"):
        _adapted(tmp_path / "second", **{"peft": tiny.lora(), **change}).train(str(tmp_path / "first/checkpoint-4"))


def test_a_checkpoint_that_does_not_know_its_network_resumes():
    later = dict.fromkeys(LATER_FACTS, "new")
    RunIdentity({"a": 1, **later}, allow_changes=False).load_state_dict({"a": 1})
    with pytest.raises(ValueError, match="the reward adapter was None, is b"):
        RunIdentity({"a": 1, "the reward adapter": "b"}, allow_changes=False).load_state_dict({"a": 1})


def test_a_checkpoint_that_is_older_than_an_option_had_its_default(tmp_path):
    facts, defaults = {}, defaults_of(tiny.ppo_config(tmp_path))
    for rule in ("mean", "pessimistic"):
        facts[rule] = options_that_count(tiny.ppo_config(tmp_path, reward_heads=rule))
    older = {name: value for name, value in facts["mean"].items() if name not in ("`reward_heads`", "`gamma`")}
    RunIdentity(facts["mean"], allow_changes=False, defaults=defaults).load_state_dict(older)
    with pytest.raises(ValueError, match="another run: `reward_heads` was mean, is pessimistic"):
        RunIdentity(facts["pessimistic"], allow_changes=False, defaults=defaults).load_state_dict(older)


def test_what_changes_no_number_may_change(tmp_path):
    _short(tmp_path / "first", lr_scheduler_type="constant").train()
    changes = {"logging_steps": 2, "save_steps": 2, "max_steps": 8, "eval_strategy": "no", "run_name": "again"}
    changes |= {"reward_timeout": 5.0, "reward_retries": 1, "failed_rewards": "mask"}
    resumed = _short(tmp_path / "second", lr_scheduler_type="constant", **changes)
    resumed.train(str(tmp_path / "first" / "checkpoint-4"))
    assert resumed.state.global_step == 8


@pytest.mark.parametrize("named", [True, False], ids=["by name", "the latest"])
def test_weights_alone_are_no_checkpoint_to_go_on_from(tmp_path, named):
    options = {"max_steps": 4, "save_steps": 4, "save_only_model": True}
    _trainer(tmp_path, **options).train()
    checkpoint = tmp_path / "checkpoint-4"
    message = f"{checkpoint} was written with `save_only_model: true`: it has no optimiser, .*`model_name_or_path: "
    with pytest.raises(ValueError, match=message):
        _trainer(tmp_path, **options).train(str(checkpoint) if named else True)


def test_a_signal_gets_a_whole_checkpoint_whatever_else_is_saved(tmp_path):
    options = {"save_steps": 4, "max_steps": 12, "save_only_model": True}
    stopped = _trainer(tmp_path, **options)
    for callback in (PreemptionCallback(), SignalAt(6)):
        stopped.add_callback(callback)
    with pytest.raises(SystemExit):
        stopped.train()
    resumed = _trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 12
    whole = _trainer(tmp_path / "whole", **options)
    whole.train()
    _assert_same(_everything(whole), _everything(resumed))


class _StepCounter(TrainerCallback, ExportableState):
    """Counts as early stopping does."""

    def __init__(self):
        self.steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1

    def state(self):
        return {"args": {}, "attributes": {"steps": self.steps}}


def test_a_callback_continues_with_its_state(tmp_path):
    for max_steps in (2, 4):
        trainer = _trainer(tmp_path, max_steps=max_steps, save_steps=2, lr_scheduler_type="constant")
        trainer.add_callback(_StepCounter())
        trainer.train(resume_from_checkpoint=True)
        (counter,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, _StepCounter))
        assert counter.steps == max_steps


def _evaluated(directory, figures, **kwargs):
    """Return a trainer whose evaluations give these figures, by step."""
    trainer = _trainer(
        directory, eval_data=tiny.prompts(), eval_strategy="steps", eval_steps=4, save_steps=4, max_steps=12,
        metric_for_best_model="figure", load_best_model_at_end=True, **kwargs,
    )  # fmt: skip
    trainer.add_callback(PreemptionCallback())
    loop = trainer.evaluation_loop

    def evaluated(*args, **kwargs):
        output = loop(*args, **kwargs)
        output.metrics["eval_figure"] = figures[trainer.state.global_step]
        return output

    trainer.evaluation_loop = evaluated
    return trainer


@pytest.mark.parametrize("best", [4, 8])
def test_an_evaluation_made_up_for_may_find_the_best_checkpoint(tmp_path, best):
    """The signal comes in the fourth step, at which an evaluation is due. Its checkpoint is written before that."""
    figures = {0: 0.0, 4: 2.0, 8: 2.0 * best / 4 - 1.0, 12: 0.5}
    stopped = _evaluated(tmp_path, figures)
    stopped.callback_handler.add_callback(SignalAt(4))
    with pytest.raises(SystemExit):
        stopped.train()
    assert checkpoints_by_age(tmp_path) == [tmp_path / "checkpoint-4"]
    resumed = _evaluated(tmp_path, figures, save_total_limit=2)
    resumed.train(resume_from_checkpoint=True)
    assert Path(resumed.state.best_model_checkpoint) == tmp_path / f"checkpoint-{best}"
    assert {path.name for path in checkpoints_by_age(tmp_path)} == {f"checkpoint-{best}", "checkpoint-12"}
    kept, latest = (
        load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")["model.norm.weight"] for step in (best, 12)
    )
    assert torch.equal(resumed.model.state_dict()["model.norm.weight"].cpu(), kept)
    assert not torch.equal(kept, latest)
