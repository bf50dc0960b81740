"""An adapter is loaded on the base that it was trained on, or an error names both."""

import json
import shutil

import pytest
import tiny
import torch
from datasets import Dataset
from huggingface_hub import constants
from peft import get_peft_model
from trl import SFTConfig

from rlhf_recipes.models.adapter_base import BASE_FILE, find_base, saved_base
from rlhf_recipes.models.fingerprint import base_fingerprint
from rlhf_recipes.models.loading import load_policy
from rlhf_recipes.models.reward_model import load_reward_model
from rlhf_recipes.options.baselines import CONFIGS
from rlhf_recipes.rewards.scorer import RewardModelScorer
from rlhf_recipes.trainers.baselines import TRAINERS
from rlhf_recipes.trainers.sft import SFTTrainer
from rlhf_recipes.trainers.stock import Scoring

pytestmark = pytest.mark.tiny

SAVED = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}


def _base(directory, seed=0):
    shutil.rmtree(directory, ignore_errors=True)
    return tiny.save(tiny.policy(tiny.tokenizer(), seed=seed), directory)


def _sft(directory, base, peft):
    return SFTTrainer(
        base,
        SFTConfig(str(directory), **tiny.QUIET | SAVED),
        train_dataset=Dataset.from_dict({"text": tiny.TEXTS}),
        processing_class=tiny.tokenizer(),
        peft_config=peft,
    )


def _baseline(method):
    def build(directory, base, peft):
        options = {**tiny.QUIET, **SAVED, "max_completion_length": 4}
        options |= {} if method == "dpo" else {"num_generations": 2}
        trainer = TRAINERS[method]
        return trainer(
            base,
            CONFIGS[method](str(directory), **options),
            Scoring([tiny.length_reward], " "),
            train_dataset=trainer.rows(tiny.preferences()),
            processing_class=tiny.tokenizer(),
            peft_config=peft,
        )

    return build


TRAINED = {
    "sft": _sft,
    "reward_model": lambda directory, base, peft: tiny.reward_trainer(directory, base, peft=peft, **SAVED),
    "ppo": lambda directory, base, peft: tiny.ppo_trainer(directory, model=base, peft=peft, **SAVED),
    **{method: _baseline(method) for method in ("rloo", "grpo", "dpo")},
}


@pytest.mark.parametrize("kind", TRAINED)
def test_every_trainer_notes_the_base_of_its_adapter(tmp_path, kind):
    """The note is of the weights that were loaded, although another training replaces them before the save."""
    base = _base(tmp_path / "base")
    expected = {"base": base, "fingerprint": base_fingerprint(base)}
    trainer = TRAINED[kind](tmp_path / "out", base, tiny.lora())
    _base(tmp_path / "base", seed=3)
    trainer.train()
    trainer.save_model()
    assert saved_base(tmp_path / "out") == saved_base(tmp_path / "out" / "checkpoint-2") == expected
    assert expected["fingerprint"] != base_fingerprint(base)


@pytest.mark.parametrize("kind", ["sft", "ppo"])
def test_a_whole_model_has_no_base(tmp_path, kind):
    trainer = TRAINED[kind](tmp_path / "out", _base(tmp_path / "base"), None)
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / BASE_FILE).write_text("{}")  # of an earlier run
    trainer.save_model()
    assert saved_base(tmp_path / "out") is None


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Write a base, named by a relative path, with an adapter of a policy and one of a reward model."""
    directory = tmp_path_factory.mktemp("adapters")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        tiny.save(tiny.policy(tiny.tokenizer()), directory / "runs" / "base")
        for kind, name in (("ppo", "policy"), ("reward_model", "rm")):
            trainer = TRAINED[kind](directory / name, "runs/base", tiny.lora())
            trainer.train()
            trainer.save_model()
    return directory


@pytest.fixture
def place(world, tmp_path, monkeypatch):
    """Return a copy of that directory as the working directory, whose notes name the copy."""
    shutil.copytree(world, tmp_path / "place")
    for name in ("policy", "rm"):
        file = tmp_path / "place" / name / BASE_FILE
        note = json.loads(file.read_text())
        assert note["base"] == str(world / "runs" / "base"), "absolute, though the option was not"
        file.write_text(json.dumps(note | {"base": str(tmp_path / "place" / "runs" / "base")}))
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


LOADS = {
    "export and evaluation": lambda place, out: load_policy(str(place / "policy")),
    "the policy of PPO": lambda place, out: tiny.ppo_trainer(out, model=str(place / "policy")),
    "a baseline": lambda place, out: _baseline("grpo")(out, str(place / "policy"), None),
    "a reward model": lambda place, out: load_reward_model(str(place / "rm")),
    "a server": lambda place, out: RewardModelScorer.from_pretrained(str(place / "rm")),
    "a reward model of PPO": lambda place, out: tiny.ppo_trainer(out, rewards=str(place / "rm")),
    "a reward adapter": lambda place, out: tiny.ppo_trainer(
        out, model=str(place / "runs" / "base"), rewards=None, peft=tiny.lora(), reward_adapter=str(place / "rm")
    ),
}


@pytest.mark.parametrize("load", LOADS)
def test_a_base_that_was_trained_anew_is_refused(place, tmp_path, load):
    LOADS[load](place, tmp_path / "before")
    trained_on = base_fingerprint("runs/base")
    _base(place / "runs" / "base", seed=9)
    with pytest.raises(ValueError, match="was trained on .*runs/base") as error:
        LOADS[load](place, tmp_path / "after")
    assert trained_on in str(error.value)
    assert base_fingerprint("runs/base") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("load", LOADS)
def test_a_relative_base_is_found_from_another_directory(place, tmp_path, monkeypatch, load):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    LOADS[load](place, tmp_path / "out")


def test_another_model_at_the_same_relative_place_is_not_taken(place, tmp_path, monkeypatch):
    expected = _logits(load_policy(str(place / "policy")))
    _base(tmp_path / "elsewhere" / "runs" / "base", seed=4)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert torch.equal(_logits(load_policy(str(place / "policy"))), expected)


def _logits(policy):
    with torch.no_grad():
        return policy.eval()(torch.arange(4, 40).reshape(2, 18)).logits


def test_a_base_that_is_gone_is_said_with_the_places_and_the_remedy(place, tmp_path, monkeypatch):
    """A base that was a directory is not looked for on the Hub, where somebody else may own its name."""
    (place / "runs" / "base").rename(tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr("rlhf_recipes.models.fingerprint.snapshot_download", lambda *args, **kwargs: str(tmp_path))
    with pytest.raises(ValueError, match="is an adapter on runs/base") as error:
        load_policy(str(place / "policy"))
    for path in (tmp_path / "elsewhere" / "runs" / "base", place / "runs" / "base"):
        assert str(path) in str(error.value)
    assert "`base_model_name_or_path`" in str(error.value)
    file = place / "policy" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "moved")}))
    load_policy(str(place / "policy"))
    load_reward_model(str(place / "rm"), base=str(tmp_path / "moved"))


@pytest.mark.parametrize("name", ["nobody/nothing", "/nowhere/base", "two words"])
def test_a_base_of_a_foreign_adapter_that_is_not_found(tmp_path, name):
    adapter = get_peft_model(tiny.policy(tiny.tokenizer()), tiny.lora())
    adapter.peft_config["default"].base_model_name_or_path = name
    adapter.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"is an adapter on {name}, which is neither a directory .* nor a model on"):
        load_policy(str(tmp_path))


def test_an_older_adapter_is_loaded_with_one_line(place, caplog):
    (place / "policy" / BASE_FILE).unlink()
    load_policy("policy")
    (message,) = caplog.messages
    assert message == "Whether runs/base holds the weights on which policy was trained cannot be checked."


def test_other_weights_can_be_used_on_purpose(place, caplog):
    other = _base(place / "other", seed=2)
    with pytest.raises(ValueError, match=f"To use other weights on purpose, delete policy/{BASE_FILE}"):
        load_policy("policy", base=other)
    (place / "policy" / BASE_FILE).unlink()
    load_policy("policy", base=other)


def test_the_note_of_a_base_on_the_hub_is_of_its_revision(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--organisation--model"
    for revision, commit in (("main", "a" * 40), ("v2", "b" * 40)):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        tiny.save(tiny.policy(tiny.tokenizer(), seed=int(revision == "v2")), repository / "snapshots" / commit)
    options = {"model": "organisation/model", "peft": tiny.lora(), "model_init_kwargs": {"revision": "v2"}}
    trainer = tiny.ppo_trainer(tmp_path / "out", **options, trust_remote_code=False)
    trainer.save_model()
    note, expected = saved_base(tmp_path / "out"), base_fingerprint("organisation/model", "v2")
    assert note == {"base": "organisation/model", "fingerprint": expected, "revision": "v2"}
    at_v2 = load_policy(str(tmp_path / "out")).model.embed_tokens.weight
    assert torch.equal(at_v2, trainer.model.get_base_model().model.embed_tokens.weight)
    assert find_base(str(tmp_path / "out"), revision="v2") == "organisation/model"
    with pytest.raises(
        ValueError, match=r"was trained on organisation/model .* give its revision \(`model_revision`\)"
    ):
        find_base(str(tmp_path / "out"))
