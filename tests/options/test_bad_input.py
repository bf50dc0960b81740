"""Bad input is refused before anything is trained, with a message that names the option and the remedy."""

import re

import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict, IterableDataset

from rlhf_recipes.algorithm.value_head import ValueHead
from rlhf_recipes.options.ppo import PPOConfig
from rlhf_recipes.options.reward_modeling import RewardModelConfig

pytestmark = pytest.mark.tiny


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Dataset.from_dict({"text": ["a"] * 8}), "has no column 'prompt'"),
        (Dataset.from_dict({"prompt": []}), "`train_dataset` is empty"),
        (DatasetDict(train=Dataset.from_dict({"prompt": ["a"]})), "is a dictionary of 'train': pass one of them"),
        (Dataset.from_dict({"prompt": ["a"] * 7}), "has 7 prompts, fewer than one rollout's 8"),
        (Dataset.from_dict({"prompt": ["a"] * 7 + [" "]}), "empty 'prompt' in row 7"),
        (Dataset.from_dict({"prompt": ["a"] * 7 + ["word " * 200]}), "exceeds the model's 128 positions"),
        (Dataset.from_dict({"prompt": [*range(8)]}), r"a number \(int\) as 'prompt' in row 0"),
        (IterableDataset.from_generator(lambda: iter([])), "`train_dataset` is empty"),
        (Dataset.from_dict({"prompt": ["a"] * 7}).to_iterable_dataset(), "has 7 prompts, fewer than one rollout's 8"),
        (IterableDataset.from_generator(lambda: iter([{"prompt": "a"}] * 7)), "has 7 prompts, fewer than one"),
    ],
)
def test_prompts(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        tiny.ppo_trainer(tmp_path, data=data)


@pytest.mark.parametrize("chat", [False, True])
def test_evaluation_prompts_must_fit_like_those_of_training(tmp_path, chat):
    texts = ["a", "b", "word " * 200]
    rows = [[{"role": "user", "content": text}] for text in texts] if chat else texts
    with pytest.raises(ValueError, match="prompt in row 2 of `eval_dataset` has .* exceeds the model's 128 positions"):
        tiny.ppo_trainer(tmp_path, chat=chat, eval_data=Dataset.from_dict({"prompt": rows}), eval_strategy="epoch")


def test_a_token_outside_the_vocabulary_is_named_with_its_prompt(tmp_path):
    tok = tiny.tokenizer()
    model = tiny.policy(tok)
    tok.add_tokens(["<x>"])
    data = Dataset.from_dict({"prompt": ["a"] * 7 + ["b <x>"]})
    with pytest.raises(ValueError, match=r"`train_dataset` has the token '<x>' \(id 307\) in row 7"):
        tiny.ppo_trainer(tmp_path, model=model, tok=tok, data=data)


def test_a_stream_of_one_rollout_trains_and_needs_the_number_of_steps(tmp_path):
    stream = Dataset.from_dict({"prompt": ["a"] * 8}).to_iterable_dataset()
    trainer = tiny.ppo_trainer(tmp_path, data=stream, max_steps=6)
    trainer.train()
    assert trainer.state.global_step == 6
    with pytest.raises(ValueError, match="max_steps"):
        tiny.ppo_trainer(tmp_path, data=stream, max_steps=-1)


@pytest.mark.parametrize("column", ["chosen", "rejected"])
def test_preferences_without_a_column(tmp_path, column):
    with pytest.raises(ValueError, match=f"has no column '{column}'"):
        tiny.reward_trainer(tmp_path, data=tiny.preferences().remove_columns(column))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"prompt": ["a"], "chosen": [""], "rejected": ["b"]}, "empty 'chosen' in row 0"),
        ({"prompt": ["a"], "chosen": ["b"], "rejected": [" "]}, "empty 'rejected' in row 0"),
        ({"prompt": [], "chosen": [], "rejected": []}, "`train_dataset` is empty"),
        (
            {"prompt": ["a"], "chosen": [[{"role": "user", "content": "a"}]], "rejected": [[]]},
            "mixes formats: 'prompt' is text, 'chosen' is messages",
        ),
        (
            {
                "prompt": [[{"role": "user", "content": "a"}]],
                "chosen": [[{"role": "assistant", "content": ""}]],
                "rejected": [[{"role": "assistant", "content": "b"}]],
            },
            "empty 'chosen' in row 0",
        ),
    ],
)
def test_preferences(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        tiny.reward_trainer(tmp_path, data=Dataset.from_dict(rows))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_device_train_batch_size": 4, "generation_batch_size": 6}, "generation_batch_size"),
        ({"per_device_train_batch_size": 4, "num_generations": 3}, "divisible by num_generations"),
        (
            {"steps_per_generation": 3, "gradient_accumulation_steps": 2},
            "must be a multiple of `gradient_accumulation_",
        ),
        ({"gamma": 1.1}, "`gamma` must lie in"),
        ({"lam": -0.1}, "`lam` must lie in"),
        ({"value_lam": 2.0}, "`value_lam` must lie in"),
        ({"cliprange_value": 0.0}, "`cliprange_value` must be positive"),
        ({"vf_coef": -1.0}, "`vf_coef` must not be negative"),
        ({"kl_coef": -1.0}, "`kl_coef` must not be negative"),
        ({"kl_coef": 0.0, "kl_controller": "adaptive"}, "`kl_coef` must be positive with"),
        ({"target_kl": 0.0}, "`target_kl` must be positive"),
        ({"kl_horizon": 0}, "`kl_horizon` must be positive"),
        ({"kl_estimator": "k4"}, "`kl_estimator` must be one of k1, k2, k3"),
        ({"kl_controller": "pid"}, "`kl_controller` must be one of fixed, adaptive"),
        ({"truncated_completions": "drop"}, "`truncated_completions` must be one of"),
        ({"truncated_completions": "bootstrap", "missing_eos_penalty": 1.0}, "`missing_eos_penalty` needs"),
        ({"mask_truncated_completions": True}, "Use `truncated_completions: mask`"),
        ({"reward_norm_decay": 1.0}, "`reward_norm_decay` must lie in"),
        ({"reward_norm_clip": 0.0}, "`reward_norm_clip` must be positive"),
        ({"critic_warmup_steps": -1}, "`critic_warmup_steps` must not be negative"),
        ({"num_iterations": 0}, "`num_iterations` must be positive"),
        ({"loss_type": "bnpo"}, "`loss_type` must be one of"),
        ({"importance_sampling_level": "batch"}, "`importance_sampling_level` must be one of token, sequence, prefix"),
        (
            {"importance_sampling_level": "sequence", "off_policy_mask_threshold": 0.1},
            "`off_policy_mask_threshold` needs `importance_sampling_level: token`",
        ),
        ({"scale_rewards": "group"}, "`scale_rewards` must be 'none'"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "`multi_objective_aggregation` must be"),
        ({"sync_ref_model": True}, "`sync_ref_model` is not available"),
        ({"value_head_activation": "relu"}, "`value_head_activation` must be one of silu, gelu, got 'relu'. ReLU"),
        ({"value_head_size": 0}, "`value_head_size` must be positive"),
        ({"max_update_kl": 0.0}, "`max_update_kl` must be positive"),
        ({"max_kl": -1.0}, "`max_kl` must be positive"),
        ({"max_skipped_steps": 0}, "`max_skipped_steps` must be positive"),
        ({"max_rollbacks": -1}, "`max_rollbacks` must not be negative"),
        ({"rollback_learning_rate_factor": 0.0}, "`rollback_learning_rate_factor` must lie in (0, 1]"),
        ({"rollback_learning_rate_factor": 2.0}, "`rollback_learning_rate_factor` must lie in (0, 1]"),
        ({"reward_timeout": 0.0}, "`reward_timeout` must be positive"),
        ({"reward_retries": -1}, "`reward_retries` must not be negative"),
        ({"failed_rewards": "zero"}, "`failed_rewards` must be one of raise, mask, got 'zero'"),
    ],
)
def test_ppo_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PPOConfig(str(tmp_path), report_to=[], use_cpu=True, bf16=False, **options)


CONTINUOUS = {"use_transformers_continuous_batching": True}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["use_transformers_continuous_batching", "use_transformers_paged"])
@pytest.mark.filterwarnings("ignore:`use_transformers_paged` is deprecated:FutureWarning")
def test_continuous_batching_would_round_the_trained_weights(tmp_path, name, precision):
    """TRL casts the policy in place, to the precision of autocast."""
    options = {"bf16": False, "fp16": False} | {name: True, precision: True}
    message = (
        f"`use_transformers_continuous_batching` cannot be used with `{precision}`: TRL would round the trained "
        f"weights to 16 bits in the first rollout. Set `{precision}: false`, or sample with `use_vllm: true`."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        PPOConfig(str(tmp_path), report_to=[], use_cpu=True, **options)


@pytest.mark.parametrize(
    "options",
    [{**CONTINUOUS, "bf16": False}, {**CONTINUOUS, "bf16": True, "use_vllm": True}, {"bf16": True}],
    ids=["full precision", "vLLM, which goes before", "plain generation"],
)
def test_what_casts_no_weight_is_not_refused(tmp_path, options):
    PPOConfig(str(tmp_path), report_to=[], use_cpu=True, **options)


def test_reward_model_options(tmp_path):
    with pytest.raises(ValueError, match="`l2_coefficient` must not be negative"):
        RewardModelConfig(str(tmp_path), report_to=[], use_cpu=True, bf16=False, l2_coefficient=-1.0)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_value_head_activation(activation):
    with pytest.raises(ValueError, match="`value_head_activation` must be one of silu, gelu"):
        ValueHead(8, activation=activation)


def test_value_head_starts_at_zero_and_is_float32():
    head = ValueHead(8, 16, "gelu")
    values = head(torch.randn(2, 3, 8, dtype=torch.bfloat16))
    assert values.shape == (2, 3)
    assert values.dtype == torch.float32
    assert values.abs().sum() == 0
    assert head.hidden.out_features == 16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(torch.randn(2, 3, 8)).dtype == torch.float32
