"""The reward model as a second adapter on the policy's backbone."""

import pytest
import tiny
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from tolerances import EXACT, MERGED, assert_close
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from rlhf_recipes.rewards.adapter import REWARD_ADAPTER
from rlhf_recipes.rewards.scorer import RewardModelScorer

pytestmark = [pytest.mark.tiny, pytest.mark.portable]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Write a base, and a LoRA reward model that was trained on it."""
    directory = tmp_path_factory.mktemp("one_backbone")
    base = tiny.save(tiny.policy(tiny.tokenizer()), directory / "base")
    tiny.save_lora_reward_model(base, directory / "rm", max_steps=20, learning_rate=1e-2)
    return directory


def _trainer(directory, output_dir, *, base="base", peft=True, adapter="rm", rewards=None, **kwargs):
    paths = {"model": str(directory / base), "reward_adapter": adapter and str(directory / adapter)}
    return tiny.ppo_trainer(output_dir, rewards=rewards, peft=tiny.lora() if peft else None, **paths, **kwargs)


def test_its_scores_are_those_of_the_reward_model_by_itself(tmp_path, directory):
    trainer = _trainer(directory, tmp_path, max_steps=8, learning_rate=1e-2)
    trainer.train()  # the scores must not depend on the training of the policy
    text = {
        "prompts": ["the fox\n\n", "is the hare\n\n", "world\n\n"],
        "completions": ["is red and the hare", "berries", "x"],
    }
    (scorer,) = trainer.reward_funcs
    alone = RewardModelScorer.from_pretrained(str(directory / "rm"))
    assert_close(scorer(**text), alone(**text), MERGED)
    assert max(scorer(**text)) - min(scorer(**text)) > 0.1
    assert trainer.model.training
    assert trainer.model.active_adapter == "default"


def test_an_adapter_that_changed_its_base_is_refused(tmp_path, directory):
    peft = tiny.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights="pissa")
    tiny.reward_trainer(tmp_path / "rm", str(directory / "base"), peft=peft).save_model()
    with pytest.raises(ValueError, match=r"`reward_adapter` .* with `init_lora_weights: pissa`, which can"):
        _trainer(directory, tmp_path, adapter=tmp_path / "rm")


@pytest.mark.parametrize("more", [{"modules_to_save": ["embed_tokens"]}, {"bias": "lora_only"}])
def test_an_adapter_that_would_replace_weights_of_the_policy_is_refused(tmp_path, directory, more):
    base = tiny.LlamaForCausalLM(tiny._config(tiny.tokenizer(), attention_bias=True))
    tiny.save(base, tmp_path / "base")
    tiny.reward_trainer(tmp_path / "rm", str(tmp_path / "base"), peft=tiny.lora(**more)).save_model()
    with pytest.raises(ValueError, match=r"also holds \d+ weights that are not LoRA's"):
        _trainer(tmp_path, tmp_path / "out", adapter="rm")


def test_an_adapter_may_have_tokens_of_its_own(tmp_path, directory):
    peft = tiny.lora(trainable_token_indices=[5, 6])
    tiny.reward_trainer(tmp_path / "rm", str(directory / "base"), peft=peft, max_steps=1).save_model()
    _trainer(directory, tmp_path / "out", adapter=tmp_path / "rm")


def test_it_warms_up_the_normaliser(tmp_path, directory):
    trainer = _trainer(directory, tmp_path)
    assert trainer.reward_normalizer.mean == trainer.reward_funcs[0].card.score_mean


def test_nothing_of_it_learns_or_is_saved(tmp_path, directory):
    trainer = _trainer(directory, tmp_path, max_steps=4, save_strategy="steps", save_steps=4)
    reward = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if f".{REWARD_ADAPTER}." in n}
    assert reward
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    after = dict(trainer.model.named_parameters())
    for name, parameter in reward.items():
        assert_close(after[name], parameter, EXACT)
        assert not after[name].requires_grad
    trainable = {n for n, p in after.items() if p.requires_grad}
    assert any("lora_A.default" in name for name in trainable)
    assert any("value_head" in name for name in trainable)
    for folder in (tmp_path / "final", tmp_path / "checkpoint-4"):
        assert not [path for path in folder.iterdir() if path.is_dir()], "only the policy's adapter is saved"
        assert not [name for name in load_file(folder / "adapter_model.safetensors") if REWARD_ADAPTER in name]
    assert REWARD_ADAPTER in trainer.model.peft_config


def test_the_reference_is_still_the_base(tmp_path, directory):
    trainer = _trainer(directory, tmp_path)
    batch = tiny.rollout(trainer)
    kl = (batch["old_per_token_logps"] - batch["ref_per_token_logps"]) * batch["completion_mask"]
    assert_close(kl, torch.zeros_like(kl), EXACT)


def test_a_policy_may_start_from_an_sft_adapter(tmp_path, directory):
    sft = get_peft_model(AutoModelForCausalLM.from_pretrained(directory / "base"), tiny.lora())
    sft.save_pretrained(tmp_path / "sft")
    trainer = _trainer(directory, tmp_path / "out", base=tmp_path / "sft", peft=False)
    trainer.train()
    assert set(trainer.model.peft_config) == {"default", "ref", REWARD_ADAPTER}
    trainer.save_model()
    names = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert names
    assert not [name for name in names if ".ref." in name or f".{REWARD_ADAPTER}." in name]


def test_it_adds_to_the_other_rewards(tmp_path, directory):
    trainer = _trainer(directory, tmp_path, rewards=[tiny.length_reward], reward_weights=[1.0, 0.5])
    tiny.rollout(trainer)
    assert trainer.reward_func_names == ["length_reward", "rm"]


def test_no_second_base_is_in_memory(tmp_path, directory):
    shared = _trainer(directory, tmp_path / "a")
    separate = _trainer(directory, tmp_path / "b", adapter=None, rewards=str(directory / "rm"))

    def parameters(trainer):
        models = [trainer.model, *(s.model for s in trainer.reward_funcs if s.model is not trainer.model)]
        return sum({p.data_ptr(): p.numel() for m in models for p in m.parameters()}.values())

    base = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(directory / "base").parameters())
    # The reward model by itself has no LM head, which the policy ties to nothing.
    assert parameters(separate) - parameters(shared) > 0.5 * base


def test_another_base_is_refused(tmp_path, directory):
    tiny.policy(tiny.tokenizer(), seed=5).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="was trained on .*base, but the policy's base is .*other"):
        _trainer(directory, tmp_path / "out", base=tmp_path / "other")


def test_a_quantised_base_is_another_base(tmp_path, directory, monkeypatch):
    monkeypatch.setattr("rlhf_recipes.rewards.adapter.saved_quantization", lambda path: BitsAndBytesConfig())
    with pytest.raises(ValueError, match="was quantised with .*but the policy's is not quantised"):
        _trainer(directory, tmp_path)


def test_a_policy_without_an_adapter_is_refused(tmp_path, directory):
    with pytest.raises(ValueError, match="needs a policy that is an adapter too: set `use_peft: true`"):
        _trainer(directory, tmp_path, peft=False)


def test_a_whole_model_is_no_reward_adapter(tmp_path, directory):
    with pytest.raises(ValueError, match="which is no adapter"):
        _trainer(directory, tmp_path, adapter="base")


def test_an_adapter_without_a_score_head_is_no_reward_model(tmp_path, directory):
    get_peft_model(AutoModelForCausalLM.from_pretrained(directory / "base"), tiny.lora()).save_pretrained(
        tmp_path / "sft"
    )
    with pytest.raises(ValueError, match="has no score head"):
        _trainer(directory, tmp_path / "out", adapter=tmp_path / "sft")


@pytest.mark.parametrize("in_a_list", [True, False])
def test_a_reward_model_does_not_count_twice(tmp_path, directory, in_a_list):
    path = f"{directory}/./rm"
    with pytest.raises(ValueError, match="are the same reward model, whose score would count twice. Leave out"):
        _trainer(directory, tmp_path, rewards=[path] if in_a_list else path)


def test_no_reward_at_all_is_refused(tmp_path, directory):
    with pytest.raises(ValueError, match="There is no reward"):
        _trainer(directory, tmp_path, adapter=None)


def test_a_resumed_run_keeps_its_reward_adapter(tmp_path, directory):
    options = {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 4, "learning_rate": 1e-2}
    _trainer(directory, tmp_path, max_steps=4, **options).train()
    again = _trainer(directory, tmp_path, max_steps=8, **options)
    text = {"prompts": ["the fox\n\n"], "completions": ["is red"]}
    before = again.reward_funcs[0](**text)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.state.global_step == 8
    assert_close(again.reward_funcs[0](**text), before, MERGED)
