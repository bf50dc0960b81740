"""Models from other people: their code is not run, pickles are not opened, and secrets are not passed on."""

import builtins
import io
import json
import os
import pickle
import zipfile
from concurrent.futures import Future
from dataclasses import fields
from types import SimpleNamespace
from typing import ClassVar

import pytest
import tiny
import torch
import yaml
from datasets import Dataset
from peft import get_peft_model
from trl import ModelConfig, SFTConfig, TrlParser

from rlhf_recipes import PPOConfig
from rlhf_recipes.comparison import runs as tracked_runs
from rlhf_recipes.models.loading import load_policy, load_tokenizer, model_init_kwargs
from rlhf_recipes.models.reward_model import load_reward_model, load_reward_model_base
from rlhf_recipes.options.recipes import PPOArguments, PreflightArguments, TrackingArguments
from rlhf_recipes.rewards.adapter import RewardAdapterScorer
from rlhf_recipes.rewards.scorer import RewardModelScorer
from rlhf_recipes.trainers.sft import SFTTrainer

pytestmark = pytest.mark.tiny

CODE = """
from pathlib import Path
Path("{mark}").touch()
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast


class Config(PreTrainedConfig):
    model_type = "custom"


class Model(PreTrainedModel):
    config_class = Config


class Tokenizer(PreTrainedTokenizerFast):
    pass
"""
AUTO_MAP = {
    "AutoConfig": "code.Config",
    "AutoModelForCausalLM": "code.Model",
    "AutoModelForSequenceClassification": "code.Model",
}


@pytest.fixture(autouse=True)
def no_one_to_ask(monkeypatch):
    """Answer yes when transformers asks `run the custom code? [y/N]`, as it does by default."""
    monkeypatch.setattr(builtins, "input", lambda text="": "y")


@pytest.fixture
def custom(tmp_path, monkeypatch):
    """Write a model that needs code in its directory. Return the directory, and the file that this code would make."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    path, mark = tmp_path / "custom", tmp_path / "executed"
    tiny.save(tiny.policy(tiny.tokenizer()), path)
    (path / "code.py").write_text(CODE.format(mark=mark))
    config = json.loads((path / "config.json").read_text()) | {"model_type": "custom", "auto_map": AUTO_MAP}
    (path / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((path / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": [None, "code.Tokenizer"]}}
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return str(path), mark


REWARD_BY_RECIPE = "reward model or judge by a recipe"
LOADERS = {
    "policy in PPO": lambda path, folder: tiny.ppo_trainer(folder / "out", model=path),
    "policy elsewhere": lambda path, folder: load_policy(path),
    "tokenizer": lambda path, folder: load_tokenizer(path),
    "reward model": lambda path, folder: load_reward_model(path),
    REWARD_BY_RECIPE: lambda path, folder: RewardModelScorer.from_pretrained(path),
    "base of a reward model": lambda path, folder: tiny.reward_trainer(folder / "out", path),
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_code_of_a_model_is_refused_and_not_run(custom, tmp_path, load):
    path, mark = custom
    with pytest.raises(ValueError, match="brings Python code of its own.*`trust_remote_code: true`"):
        load(path, tmp_path)
    assert not mark.exists()


def test_who_asks_for_it_gets_it(custom):
    """Without this, the tests above would prove nothing: the code can run."""
    path, mark = custom
    load_tokenizer(path, trust_remote_code=True)
    assert mark.exists()


KERNEL = "kernels-community/evil"
NAMED = {
    "plain": {"attn_implementation": KERNEL},
    "as an attribute": {"_attn_implementation": f"{KERNEL}@main:forward"},
    "paged": {"attn_implementation": f"paged|{KERNEL}"},
    "by part": {"attn_implementation": {"": KERNEL, "text_config": "sdpa"}},
    "in a part": {"text_config": {"attn_implementation": KERNEL}},
    "experts": {"experts_implementation": KERNEL},
}
LOAD_WEIGHTS = {name: load for name, load in LOADERS.items() if name != "tokenizer"}


@pytest.fixture
def kernels(monkeypatch):
    """Return the names of the kernels that transformers asks the Hub for, as if the package `kernels` were here."""
    asked = []

    def get_kernel(name, **kwargs):
        asked.append(name)
        raise RuntimeError("it would run now")

    for module in ("modeling_utils", "integrations.hub_kernels"):
        monkeypatch.setattr(f"transformers.{module}.is_kernels_available", lambda: True)
    monkeypatch.setattr("transformers.integrations.hub_kernels.get_kernel_hub", get_kernel, raising=False)
    return asked


def _write_into_config(directory, entries):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | entries))


@pytest.mark.parametrize("entries", NAMED.values(), ids=NAMED)
@pytest.mark.parametrize("load", LOAD_WEIGHTS.values(), ids=LOAD_WEIGHTS)
def test_a_kernel_that_a_configuration_names_is_refused_and_not_loaded(tmp_path, kernels, load, entries):
    make = tiny.reward_model if load in (LOADERS["reward model"], LOADERS[REWARD_BY_RECIPE]) else tiny.policy
    path = tiny.save(make(tiny.tokenizer()), tmp_path / "model")
    _write_into_config(tmp_path / "model", entries)
    with pytest.raises(ValueError, match=f"names the kernel '.*{KERNEL}.*`attn_implementation: sdpa`"):
        load(path, tmp_path)
    assert not kernels


def test_a_kernel_in_the_base_of_an_adapter_is_refused(tmp_path, kernels):
    base = tiny.save(tiny.policy(tiny.tokenizer()), tmp_path / "base")
    adapter = tiny.sft_adapter(load_policy(base))
    adapter.peft_config["default"].base_model_name_or_path = base
    path = tiny.save(adapter, tmp_path / "adapter")
    load_policy(path)
    _write_into_config(tmp_path / "base", NAMED["plain"])
    for load in (load_policy, lambda path: tiny.ppo_trainer(tmp_path / "out", model=path)):
        with pytest.raises(ValueError, match=f"names the kernel '{KERNEL}'"):
            load(path)
    assert not kernels


def test_a_user_may_choose_the_attention(tmp_path, kernels):
    path = tiny.save(tiny.policy(tiny.tokenizer()), tmp_path / "model")
    _write_into_config(tmp_path / "model", NAMED["plain"])
    assert load_policy(path, attn_implementation="eager").config._attn_implementation == "eager"
    assert not kernels
    with pytest.raises(ValueError, match="it would run now"):
        load_policy(path, attn_implementation=KERNEL)
    assert kernels == [KERNEL], "else the tests above would prove nothing"


def test_a_configuration_may_name_an_attention_that_is_no_kernel(tmp_path):
    path = tiny.save(tiny.policy(tiny.tokenizer()), tmp_path / "model")
    _write_into_config(tmp_path / "model", {"attn_implementation": "eager"})
    assert load_policy(path).config._attn_implementation == "eager"


class Bomb:
    """Make a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mknod, (self.mark,)


def _pickle(directory, tensors, name, mark):
    """Replace weights by a pickle in torch's format that makes a file when it is loaded."""
    torch.save(tensors, directory / name)
    with zipfile.ZipFile(directory / name) as source:
        entries = {entry: source.read(entry) for entry in source.namelist()}
    buffer = io.BytesIO()
    pickle.dump(Bomb(str(mark)), buffer)
    with zipfile.ZipFile(directory / name, "w") as target:
        for entry, content in entries.items():
            target.writestr(entry, buffer.getvalue() if entry.endswith("data.pkl") else content)
    for path in directory.glob("*.safetensors"):
        path.unlink()


@pytest.mark.parametrize(
    "load",
    [load_policy, load_tokenizer, load_reward_model, load_reward_model_base, RewardModelScorer.from_pretrained],
    ids=lambda load: load.__qualname__,
)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_pickled_weights_are_refused(tmp_path, load, name):
    tok = tiny.tokenizer()
    model = tiny.reward_model(tok) if "eward" in load.__qualname__ else tiny.policy(tok)
    path = tiny.save(model, tmp_path / "model")
    load(path)  # as safetensors
    _pickle(tmp_path / "model", {"x": torch.ones(1)}, name, tmp_path / "executed")
    with pytest.raises(ValueError, match=rf"holds its weights as a pickle \({name}\).*`save_pretrained`"):
        load(path)
    assert not (tmp_path / "executed").exists()


def test_a_pickled_adapter_is_refused(tmp_path):
    base = tiny.save(tiny.policy(tiny.tokenizer()), tmp_path / "base")
    model = tiny.policy(tiny.tokenizer())
    model.config._name_or_path = base
    adapter = tmp_path / "adapter"
    get_peft_model(model, tiny.lora()).save_pretrained(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": base}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    tiny.tokenizer().save_pretrained(adapter)
    load_policy(str(adapter))
    _pickle(adapter, {"x": torch.ones(1)}, "adapter_model.bin", tmp_path / "executed")
    for load in (load_policy, RewardAdapterScorer, lambda path: tiny.ppo_trainer(tmp_path / "out", model=path)):
        with pytest.raises(ValueError, match=r"holds its weights as a pickle \(adapter_model.bin\)"):
            load(str(adapter))
    assert not (tmp_path / "executed").exists()


def test_recipes_ask_the_hub_for_safetensors_only():
    assert model_init_kwargs(ModelConfig())["use_safetensors"] is True


@pytest.mark.parametrize("option", ["output_dir", "reward_model_path", "judge_models"])
def test_a_yaml_cannot_run_code(tmp_path, option):
    mark, file = tmp_path / "executed", tmp_path / "config.yaml"
    file.write_text(f"{option}: !!python/object/apply:os.mknod ['{mark}']\n")
    parser = TrlParser((PPOArguments, PPOConfig, ModelConfig, TrackingArguments, PreflightArguments))
    with pytest.raises(yaml.constructor.ConstructorError, match="could not determine a constructor"):
        parser.parse_args_and_config(["--config", str(file)])
    assert not mark.exists()
    yaml.unsafe_load(file.read_text())
    assert mark.exists(), "else this would prove nothing"


def test_the_configuration_of_a_run_in_a_store_cannot_run_code(tmp_path, monkeypatch):
    """`recipes/compare.py` reads configurations that other people recorded."""
    mark = tmp_path / "executed"
    text = f"PPOConfig: !!python/object/apply:os.mknod ['{mark}']"
    monkeypatch.setattr(tracked_runs, "_read_artifact", lambda *args: text)
    with pytest.raises(yaml.constructor.ConstructorError, match="could not determine a constructor"):
        tracked_runs._read_options(None, "run", "sqlite://")
    assert not mark.exists()
    yaml.unsafe_load(text)
    assert mark.exists(), "else this would prove nothing"


TOKEN, PASSWORD = "hf_" + "a" * 30, "pa55word"


@pytest.mark.parametrize("make", [tiny.ppo_trainer, tiny.reward_trainer], ids=lambda make: make.__name__)
def test_no_checkpoint_holds_the_hub_token(tmp_path, monkeypatch, make):
    """`training_args.bin` is a pickle of all options."""
    monkeypatch.setenv("HF_TOKEN", "before")
    options = {"hub_token": TOKEN, "model_init_kwargs": {"token": PASSWORD}, "save_strategy": "steps", "save_steps": 2}
    path = tiny.save(tiny.policy(tiny.tokenizer()), tmp_path / "base")
    trainer = make(tmp_path / "out", model=path, max_steps=4, **options)
    trainer.train()
    trainer.save_model()
    assert os.environ["HF_TOKEN"] == "before"
    assert trainer.args.hub_token == TOKEN, "with which transformers pushes"
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert {file.name for file in files} >= {"training_args.bin", "trainer_state.json"}
    for file in files:
        content = file.read_bytes()
        assert TOKEN.encode() not in content, file
        assert PASSWORD.encode() not in content, file


class _Hub:
    """Keeps the tokens of the pushes."""

    tokens: ClassVar[list[str]] = []

    def upload_folder(self, *, token, **kwargs):
        self.tokens.append(token)
        return Future()


def test_what_sft_saves_and_pushes_holds_no_secret(tmp_path, monkeypatch):
    """The pushes have the token all the same."""
    monkeypatch.setenv("HF_TOKEN", "before")
    monkeypatch.setattr("transformers.trainer.hf_api", _Hub)
    options = {name: value for name, value in tiny.QUIET.items() if name != "save_strategy"}
    address = f"https://me:{PASSWORD}@hub.example/a"
    args = SFTConfig(
        str(tmp_path), hub_token=TOKEN, max_steps=1, save_steps=1, run_name=address, trackio_space_id=TOKEN,
        model_init_kwargs={"token": PASSWORD, "revision": address}, lr_scheduler_kwargs={}, hub_strategy="checkpoint",
        **options,
    )  # fmt: skip
    path = tiny.save(tiny.policy(tiny.tokenizer()), tmp_path / "base")
    data = Dataset.from_dict({"text": tiny.TEXTS})
    trainer = SFTTrainer(path, args=args, train_dataset=data, processing_class=tiny.tokenizer())
    trainer.train()
    trainer.hub_model_id, trainer.push_in_progress, before = "me/policy", None, trainer.args
    trainer._push_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert _Hub.tokens == [TOKEN, TOKEN], "for the weights and for the whole checkpoint"
    assert os.environ["HF_TOKEN"] == "before"
    assert trainer.args is before
    assert trainer.args.run_name == args.run_name == address, "the run itself goes on with what it was given"
    secrets = {"run_name", "trackio_space_id", "model_init_kwargs", "hub_token"}
    in_training = {"restore_callback_states_from_checkpoint"}  # set while it trains
    pushed = (tmp_path / "_hub", secrets | {"output_dir"})  # the folder that the Hub gets
    for folder, expected in (pushed, (tmp_path / "checkpoint-1", secrets | in_training)):
        written = folder / "training_args.bin"
        saved = torch.load(written, weights_only=False)
        assert (saved.run_name, saved.trackio_space_id) == ("https://***@hub.example/a", "***")
        assert saved.model_init_kwargs == {"token": None, "revision": "https://***@hub.example/a"}
        assert saved.save_strategy is args.save_strategy, "all other options stay as they are"
        changed = {f.name for f in fields(args) if getattr(saved, f.name) != getattr(args, f.name)}
        assert changed == expected
        assert saved.hub_token is None
        assert TOKEN.encode() not in written.read_bytes()
        assert PASSWORD.encode() not in written.read_bytes()


@pytest.mark.parametrize("name", ["sk-r1-distill-qwen", "hf_" + "b" * 30, "token=a"])
def test_a_push_finds_a_directory_whose_name_looks_like_a_secret(tmp_path, monkeypatch, name):
    """The options in files hide the name, but transformers copies files into the directory while it pushes."""
    pushed = []
    hub = SimpleNamespace(upload_folder=lambda **push: pushed.append(push) or Future())
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    output_dir = tmp_path / name
    quiet = {option: value for option, value in tiny.QUIET.items() if option != "save_strategy"}
    args = SFTConfig(str(output_dir), max_steps=1, save_steps=1, hub_strategy="checkpoint", hub_revision=name, **quiet)
    path = tiny.save(tiny.policy(tiny.tokenizer()), tmp_path / "base")
    data = Dataset.from_dict({"text": tiny.TEXTS})
    trainer = SFTTrainer(path, args=args, train_dataset=data, processing_class=tiny.tokenizer())
    trainer.train()
    trainer.hub_model_id, trainer.push_in_progress = f"me/{name}", None
    trainer._push_from_checkpoint(str(output_dir / "checkpoint-1"))
    assert [push["folder_path"] for push in pushed] == [str(output_dir / "_hub"), str(output_dir / "checkpoint-1")]
    assert {push["revision"] for push in pushed} == {name}
    assert (output_dir / "_hub" / "model.safetensors").is_file()
    assert not list(tmp_path.glob("[*]*"))
    for written in (output_dir / "_hub" / "training_args.bin", output_dir / "checkpoint-1" / "training_args.bin"):
        assert name.encode() not in written.read_bytes()


def test_a_password_in_the_address_of_a_vllm_server_is_refused(tmp_path):
    """TRL names the address when the server does not answer."""
    with pytest.raises(ValueError, match=r"`vllm_server_base_url` holds a password, .*`~/.netrc`") as error:
        tiny.ppo_config(tmp_path, vllm_server_base_url=f"http://me:{PASSWORD}@host:8000")
    assert PASSWORD not in str(error.value)
    tiny.ppo_config(tmp_path, vllm_server_base_url="http://host:8000/@me")


def test_a_padding_token_outside_the_vocabulary_is_named(tmp_path):
    directory = tiny.save(tiny.policy(tiny.tokenizer()), tmp_path / "policy")
    config = json.loads((tmp_path / "policy" / "config.json").read_text())
    (tmp_path / "policy" / "config.json").write_text(json.dumps(config | {"pad_token_id": 99_999}))
    with pytest.raises(ValueError, match=r"policy has a `pad_token_id` in `config.json` that is outside"):
        load_policy(directory)
