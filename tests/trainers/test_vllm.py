"""The data that goes to vLLM and comes back from it, recorded in TRL's client. This needs no engine."""

import pytest
import tiny
import torch
from tolerances import EXACT, FP32, MERGED, assert_close
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl.generation.vllm_generation import VLLMGeneration

from rlhf_recipes.models.loading import load_policy

pytestmark = pytest.mark.tiny

LOG_RATIO = 0.25
"""The error of the engine's log-probabilities, in nats."""


class Engine(VLLMGeneration):
    """Replace the engine behind TRL's own client: keep the weights that it gets, and answer with fixed completions."""

    def _init_vllm(self):
        self.received = []

    def sync_weights(self):
        self.received.append({name: parameter.clone() for name, parameter in self._iter_named_params()})

    def generate(self, prompts, images, num_generations, profiler=None):
        completions = [[70 + row, 80, 90 + row, 1][: 2 + row % 3] for row in range(len(prompts))]
        logprobs = [[[-LOG_RATIO] for _ in completion] for completion in completions]
        return prompts, completions, logprobs, None


@pytest.fixture(autouse=True)
def _no_engine(monkeypatch):
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", Engine)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Write a base, and a LoRA reward model that was trained on it."""
    directory = tmp_path_factory.mktemp("vllm")
    base = tiny.save(tiny.policy(tiny.tokenizer()), directory / "base")
    tiny.save_lora_reward_model(base, directory / "rm")
    return directory


def _trainer(directory, output_dir, **kwargs):
    return tiny.ppo_trainer(output_dir, model=str(directory / "base"), use_vllm=True, **kwargs)


@pytest.mark.parametrize("kind", ["full", "lora", "lora with reward adapter"])
@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_it_is_sent_a_plain_policy(tmp_path, directory, kind, mode):
    options = {"reward_adapter": str(directory / "rm"), "rewards": None} if "reward" in kind else {}
    peft = None if kind == "full" else tiny.lora()
    if mode == "server":
        options["vllm_importance_sampling_correction"] = False  # TRL would ask the server about its log-probabilities
    trainer = _trainer(directory, tmp_path, peft=peft, vllm_mode=mode, max_steps=8, learning_rate=1e-2, **options)
    trainer.train()
    first, second = trainer.vllm_generation.received
    plain = dict(AutoModelForCausalLM.from_pretrained(directory / "base").named_parameters())
    assert first.keys() == second.keys() == plain.keys()
    for name, parameter in plain.items():
        assert_close(first[name], parameter, EXACT if kind == "full" else MERGED)
    assert any(not torch.equal(first[name], second[name]) for name in plain), "the second is the trained policy"


def test_it_is_sent_what_was_learnt(tmp_path, directory):
    trainer = _trainer(directory, tmp_path, peft=tiny.lora(), max_steps=4, learning_rate=1e-2)
    trainer.train()
    trainer.save_model()
    trainer.vllm_generation.received.clear()
    trainer._last_loaded_step = -1
    tiny.rollout(trainer)
    (received,) = trainer.vllm_generation.received
    for name, parameter in load_policy(str(tmp_path)).named_parameters():
        assert_close(received[name], parameter, MERGED)


def test_importance_sampling_multiplies_our_advantages(tmp_path, directory):
    """The engine's correction multiplies the loss of each token by its ratio."""
    trainer = _trainer(directory, tmp_path, vf_coef=0.0, vllm_importance_sampling_mode="token_truncate")
    batch = tiny.rollout(trainer)
    mask = batch["completion_mask"]
    expected = (
        (batch["old_per_token_logps"] + LOG_RATIO).exp().clamp(max=trainer.args.vllm_importance_sampling_clip_max)
    )
    assert_close(batch["importance_sampling_ratio"] * mask, expected * mask, FP32)
    assert len(set(mask.sum(dim=1).tolist())) > 1
    trainer.current_gradient_accumulation_steps = 1
    corrected = trainer._compute_loss(trainer.model, batch)
    batch["advantages"] = batch["advantages"] * batch["importance_sampling_ratio"]
    batch["importance_sampling_ratio"] = torch.ones_like(batch["importance_sampling_ratio"])
    assert_close(trainer._compute_loss(trainer.model, batch), corrected, FP32)


def test_a_quantised_policy_is_refused(tmp_path, directory):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match="`use_vllm` does not go with a quantised policy"):
        _trainer(directory, tmp_path, peft=tiny.lora(), quantization=BitsAndBytesConfig(load_in_4bit=True))
