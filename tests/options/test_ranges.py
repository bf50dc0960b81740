"""Both sides of the range of every option: what cannot train is refused by name, and what can is not."""

import dataclasses
import math
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest
import trl

from rlhf_recipes.options import recipes
from rlhf_recipes.options.baselines import CONFIGS as BASELINES
from rlhf_recipes.options.baselines import BaselineArguments
from rlhf_recipes.options.judge import JudgeConfig
from rlhf_recipes.options.ppo import PPOConfig
from rlhf_recipes.options.process_reward_modeling import ProcessRewardModelConfig
from rlhf_recipes.options.ranges import CHOICES, INTERVALS, RANGES, check_values
from rlhf_recipes.options.reward_modeling import RewardModelConfig

OWN = [kind for kind in vars(recipes).values() if dataclasses.is_dataclass(kind)]
CLASSES = [
    *(*OWN, BaselineArguments, *BASELINES.values(), PPOConfig, RewardModelConfig, ProcessRewardModelConfig),
    *(JudgeConfig, trl.SFTConfig, trl.ModelConfig),
]
HINTS = {kind: get_type_hints(kind) for kind in CLASSES}
INF, NAN = math.inf, math.nan
TINY, BIG = 1e-12, 10**9

# The option, values that can train, and values that cannot. One option of each range, and each that has a value with
# a meaning of its own.
SIDES = [
    ("learning_rate", [0.0, TINY, 1e10], [-TINY, -1.0, INF, NAN]),
    ("weight_decay", [0.0, 0.1], [-0.1, NAN, INF]),
    ("adam_beta1", [0.0, 0.999], [1, 1.0, -2.0, NAN]),
    ("adam_beta2", [0.0, 0.999], [1.0, -2.0]),
    ("adam_epsilon", [TINY], [0.0, -TINY, INF]),
    ("max_grad_norm", [0.0, 1.0, INF], [-1.0, -INF, NAN]),
    ("warmup_steps", [0, 0.1, 10], [-1, INF]),
    ("max_steps", [-1, 1, BIG], [0, -2]),
    ("num_train_epochs", [TINY, 0.5, 3], [0, -1.0, INF, NAN]),
    ("per_device_train_batch_size", [1, BIG], [0, -1, 2**63]),
    ("gradient_accumulation_steps", [1], [0]),
    ("per_device_eval_batch_size", [1], [0]),
    ("dataloader_num_workers", [0, 1024], [-1, 10**6]),
    ("dataloader_prefetch_factor", [1, None], [0]),
    ("save_total_limit", [0, 1, None], [-1]),
    ("seed", [0, 2**32 - 1], [-1, 2**32]),
    ("data_seed", [0, None], [-1, 2**64]),
    ("ddp_timeout", [1, BIG], [0, 10**12]),
    ("neftune_noise_alpha", [0.0, 5.0, None], [-1.0, NAN]),
    ("label_smoothing_factor", [0.0, 1.0], [2.0, -0.1]),
    ("label_smoothing", [0.0, 0.49], [0.5]),
    ("torch_empty_cache_steps", [1, None], [0]),
    ("max_length", [1, None], [0]),
    ("max_completion_length", [1], [0]),
    ("temperature", [0.1], [0.0, INF, -1.0]),
    ("top_p", [TINY, 1.0], [0.0, 1.1, NAN]),
    ("top_k", [0, 50], [-1]),
    ("min_p", [0.0, 1.0, None], [2.0, -0.1]),
    ("repetition_penalty", [1.0, 0.5], [0.0, INF]),
    ("num_generations", [1], [0]),
    ("num_iterations", [1], [0]),
    ("steps_per_generation", [1, None], [0]),
    ("epsilon", [0.0, 0.2], [-1.0, INF]),
    ("epsilon_high", [0.3, None], [-1.0]),
    ("beta", [0.0, 0.1], [-0.1]),
    ("reward_weights", [[1.0, -1.0], None], [[NAN], [1.0, INF]]),
    ("reward_timeout", [1.0, None], [0.0, INF, 1e12]),
    ("reward_retries", [0, 1000], [-1, BIG]),
    ("lora_r", [1], [0, BIG]),
    ("lora_alpha", [1], [0]),
    ("lora_dropout", [0.0, 0.5], [1.0, 1.5]),
    ("gamma", [0.0, 1.0], [1.1, -0.1]),
    ("reward_norm_decay", [0.0, 0.99], [1.0]),
    ("rollback_learning_rate_factor", [TINY, 1.0], [0.0, 1.1]),
    ("value_head_size", [1, None], [0, BIG]),
    ("best_of", [[1, 4], []], [[0], [4, -1]]),
    ("port", [1, 65535], [0, 65536]),
    ("dtype", ["auto", "bfloat16"], ["nonsense", "int8"]),
    ("log_level", ["info"], ["nonsense", ""]),
]


@pytest.mark.parametrize(("name", "right", "wrong"), SIDES, ids=[name for name, *_ in SIDES])
def test_both_sides_of_a_range(name, right, wrong):
    for value in right:
        check_values(SimpleNamespace, {name: value})
    for value in wrong:
        with pytest.raises(ValueError, match=f"^`{name}` must "):
            check_values(SimpleNamespace, {name: value})


def test_each_range_has_both_sides_here():
    tested = {name for name, *_ in SIDES}
    groups = {RANGES[name] for name in tested & RANGES.keys()}
    untested = {limits.claim for limits in RANGES.values()} - {limits.claim for limits in groups}
    assert untested == {"not be lower than -1"}, "local_rank, which launchers set"


@pytest.mark.parametrize(
    ("kind", "options", "is_right"),
    [
        (recipes.EvaluationArguments, {"temperature": 0.0}, True),  # greedy
        (recipes.EvaluationArguments, {"temperature": -1.0}, False),
        (BASELINES["dpo"], {"beta": 0.0}, False),  # no gradient
        (BASELINES["rloo"], {"beta": 0.0}, True),
        (PPOConfig, {"importance_sampling_level": "prefix"}, True),
        (BASELINES["grpo"], {"importance_sampling_level": "prefix"}, False),
        (trl.SFTConfig, {"loss_type": "grpo"}, False),
        (BASELINES["grpo"], {"loss_type": "bnpo"}, True),
    ],
)
def test_a_class_may_have_a_range_of_its_own(kind, options, is_right):
    if is_right:
        check_values(kind, options)
        return
    with pytest.raises(ValueError, match="must "):
        check_values(kind, options)


@pytest.mark.parametrize(("interval", "strategy"), INTERVALS.items())
def test_an_interval_counts_only_where_it_is_read(interval, strategy):
    for value in (0, -1, NAN, INF):
        check_values(trl.SFTConfig, {interval: value, strategy: "no"})
        with pytest.raises(ValueError, match=f"`{interval}` must be"):
            check_values(trl.SFTConfig, {interval: value, strategy: "steps"})
    check_values(trl.SFTConfig, {interval: 0.1, strategy: "steps"})  # a share of the run


def _is_number(hint):
    kinds = {hint, *get_args(hint), *(inner for kind in get_args(hint) for inner in get_args(kind))}
    return bool({int, float} & kinds)


def test_every_number_of_every_recipe_has_a_range():
    """A new option of TRL or transformers shows up here."""
    numbers = {name for hints in HINTS.values() for name, hint in hints.items() if _is_number(hint)}
    known = {name.rpartition(".")[2] for name in RANGES} | INTERVALS.keys()
    assert numbers - known == set()


def test_every_entry_is_an_option():
    for name in (*RANGES, *CHOICES):
        kind, _, option = name.rpartition(".")
        classes = [cls for cls in CLASSES if not kind or kind in [parent.__name__ for parent in cls.__mro__]]
        assert any(option in HINTS[cls] for cls in classes), name


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_default_is_in_its_range(kind):
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    check_values(kind, {name: value for name, value in defaults.items() if value is not dataclasses.MISSING})


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"critic": "reward", "vf_coef": 0.5}, "vf_coef"),
        ({"critic": "reward", "cliprange_value": 0.1}, "cliprange_value"),
        ({"critic": "adapter", "vf_coef": 0.5}, "vf_coef"),
        ({"critic": "adapter", "cliprange_value": 0.1}, "cliprange_value"),
        ({"critic_epochs": 2}, "critic_epochs"),
    ],
)
def test_an_option_without_effect_is_refused(tmp_path, options, name):
    cpu = {"report_to": [], "use_cpu": True, "bf16": False}
    with pytest.raises(ValueError, match=f"`{name}` .* has no effect with `critic: "):
        PPOConfig(str(tmp_path), **cpu, **options)
    PPOConfig(str(tmp_path), **cpu, **{name: PPOConfig.__dataclass_fields__[name].default})
    for critic in ("reward", "adapter"):
        PPOConfig(str(tmp_path), **cpu, critic=critic, critic_epochs=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"critic_warmup_steps": 2}, "`critic_warmup_steps` needs `critic: policy`. `critic: adapter` is fitted"),
        ({"value_gradient_to_backbone": True}, "needs `critic: policy`: the backbone must not change"),
        ({"fp16": True}, "`critic: adapter` has no loss scale"),
        ({"disable_dropout": False}, "`critic: adapter` shares .* leave out `disable_dropout: false`"),
        ({"neftune_noise_alpha": 5.0, "gradient_checkpointing": True}, "`neftune_noise_alpha` would also disturb"),
    ],
)
def test_what_a_critic_with_an_adapter_cannot_have_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(str(tmp_path), critic="adapter", **{"report_to": [], "use_cpu": True, "bf16": False, **options})
