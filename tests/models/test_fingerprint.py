"""Equal weights have equal fingerprints, and other weights have others."""

import json

import pytest
import tiny
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from rlhf_recipes.models.fingerprint import base_fingerprint, weights_fingerprint


@pytest.fixture
def base(tmp_path):
    tiny.policy(tiny.tokenizer()).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def _weights(directory):
    return load_file(directory / "model.safetensors")


def test_the_same_weights_in_other_files_are_the_same(base, tmp_path):
    fingerprint = weights_fingerprint(base)
    tiny.policy(tiny.tokenizer()).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert weights_fingerprint(tmp_path / "shards") == fingerprint
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"transformers_version": "6.0.0"}))
    assert weights_fingerprint(base) == fingerprint


def test_every_tensor_counts_and_its_name_and_shape(base):
    fingerprint, weights = weights_fingerprint(base), _weights(base)
    seen = {fingerprint}
    for name, tensor in weights.items():
        for changed in (weights | {name: tensor * 1.001}, weights | {name: tensor.reshape(1, *tensor.shape)}):
            save_file(changed, base / "model.safetensors")
            seen.add(weights_fingerprint(base))
        save_file({other: weights[other] for other in weights if other != name}, base / "model.safetensors")
        seen.add(weights_fingerprint(base))
    assert len(seen) == 1 + 3 * len(weights)


def test_the_configuration_counts(base):
    fingerprint = weights_fingerprint(base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert weights_fingerprint(base) != fingerprint


@pytest.mark.parametrize("row", [0, 333_330, 666_660, 999_999])
def test_a_large_tensor_is_read_at_its_ends_and_between(tmp_path, row):
    """Of 16 MB, four pieces are read: at the start, at one and two thirds, and at the end."""
    large = torch.zeros(1_000_000, 4)
    save_file({"large": large}, tmp_path / "model.safetensors")
    fingerprint = weights_fingerprint(tmp_path)
    large[row] = 1.0
    save_file({"large": large}, tmp_path / "model.safetensors")
    assert weights_fingerprint(tmp_path) != fingerprint


def test_a_base_is_its_model_and_not_the_heads_beside_it(base):
    fingerprint = base_fingerprint(str(base))
    save_file({"output.weight": torch.ones(1, 4)}, base / "value_head.safetensors")
    assert base_fingerprint(str(base)) == fingerprint
    assert weights_fingerprint(base) != fingerprint


def test_a_base_on_the_hub_is_read_from_its_cache(base, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--organisation--model"
    for revision, commit in (("main", "a" * 40), ("v2", "b" * 40)):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        (repository / "snapshots" / commit).mkdir(parents=True)
        tiny.policy(tiny.tokenizer(), seed=int(revision == "v2")).save_pretrained(repository / "snapshots" / commit)
    assert base_fingerprint("organisation/model", local_files_only=True) == base_fingerprint(str(base))
    assert base_fingerprint("organisation/model", "v2", local_files_only=True) != base_fingerprint(str(base))
    with pytest.raises(OSError, match="(?i)cannot find"):
        base_fingerprint("organisation/other", local_files_only=True)


def test_without_weights_there_is_no_fingerprint(tmp_path):
    assert weights_fingerprint(tmp_path) is None
    assert weights_fingerprint(tmp_path / "nowhere") is None
