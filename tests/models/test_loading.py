"""A policy is a causal LM with all its weights, however it is loaded."""

import pytest
import tiny
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration
from trl import SFTConfig

from rlhf_recipes.models.loading import load_policy
from rlhf_recipes.trainers.sft import SFTTrainer

pytestmark = pytest.mark.tiny
SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}


def _sft(directory, tmp_path):
    data = tiny.Dataset.from_dict({"text": ["the fox is red"] * 8})
    return SFTTrainer(
        directory,
        SFTConfig(str(tmp_path / "out"), **tiny.QUIET),
        train_dataset=data,
        processing_class=tiny.tokenizer(),
    )


WAYS = {
    "evaluation": lambda directory, tmp_path: load_policy(directory),
    "ppo": lambda directory, tmp_path: tiny.ppo_trainer(tmp_path / "out", model=directory),
    "lora": lambda directory, tmp_path: tiny.ppo_trainer(tmp_path / "out", model=directory, peft=tiny.lora()),
    "sft": _sft,
}
MODELS = {
    "a reward model": lambda tok: tiny.reward_model(tok),
    "a masked LM": lambda tok: BertForMaskedLM(BertConfig(vocab_size=len(tok), **SMALL)),
    "an encoder and a decoder": lambda tok: T5ForConditionalGeneration(
        T5Config(vocab_size=len(tok), d_model=32, d_ff=32, d_kv=8, num_layers=1, num_heads=4)
    ),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_a_policy_of_another_kind_is_refused(tmp_path, build, way):
    directory = tiny.save(build(tiny.tokenizer()), tmp_path / "model")
    with pytest.raises(ValueError, match="model is a .* and no causal LM|model.* cannot be loaded|Unrecognized"):
        way(directory, tmp_path)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_policy_without_all_its_weights_is_refused(tmp_path, way):
    model = tiny.policy(tiny.tokenizer())
    weights = {name: x for name, x in model.state_dict().items() if "layers.1." not in name}
    model.save_pretrained(tmp_path / "model", state_dict=weights)
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"model does not hold all weights of a LlamaForCausalLM: `model.layers.1"):
        way(str(tmp_path / "model"), tmp_path)


def test_a_reward_model_starts_from_all_weights(tmp_path):
    model = tiny.policy(tiny.tokenizer())
    weights = {name: x for name, x in model.state_dict().items() if "layers.1." not in name}
    model.save_pretrained(tmp_path / "model", state_dict=weights)
    with pytest.raises(ValueError, match="model does not hold all weights"):
        tiny.reward_trainer(tmp_path / "out", str(tmp_path / "model"))


@pytest.mark.parametrize(
    "content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b"\x08" + b"\0" * 7]
)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_broken_files_are_named(tmp_path, content, way):
    directory = tiny.save(tiny.policy(tiny.tokenizer()), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"The weights in .*model cannot be read"):
        way(directory, tmp_path)
