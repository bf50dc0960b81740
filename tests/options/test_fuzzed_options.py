"""With any value of an option, a run either trains, or is refused before it starts by a message with its name."""

import dataclasses
import math
import re
import zlib
from typing import get_args, get_type_hints

import pytest
import tiny
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from trl import GRPOConfig

from rlhf_recipes import PPOConfig

pytestmark = pytest.mark.tiny

OWN = {field.name for field in dataclasses.fields(PPOConfig)} - {
    field.name for field in dataclasses.fields(GRPOConfig)
}
SHARED = {
    *("learning_rate", "per_device_train_batch_size", "steps_per_generation", "gradient_accumulation_steps"),
    *("num_iterations", "num_generations", "max_completion_length", "temperature", "top_p", "epsilon", "epsilon_high"),
    *("max_grad_norm", "weight_decay", "adam_epsilon", "warmup_steps", "loss_type", "scale_rewards", "beta", "seed"),
    *("reward_weights", "entropy_coef", "top_entropy_quantile", "save_steps", "eval_strategy", "delta"),
}
HINTS = get_type_hints(PPOConfig)
ANYTHING = st.one_of(
    st.sampled_from([0, 1, 2, 3, 7, -1, 0.5, 0.0, -0.5, 1e9, 1e-9, math.nan, math.inf, True, False, None]),
    st.sampled_from(["", "none", "adaptive", "0.1", "silu", "mask", [], [1.0], ["x"], {}, {"a": 1}]),
)


def _values(name):
    """Return good and bad values of an option, and all of them for a choice."""
    choices = [value for value in get_args(HINTS[name]) if isinstance(value, str)]
    return st.one_of(ANYTHING, st.sampled_from(choices)) if choices else ANYTHING


OPTIONS = st.sampled_from(sorted(OWN | SHARED)).flatmap(lambda name: st.tuples(st.just(name), _values(name)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzzed")


def _is_trained(options, share):
    """Whether this draw is one of each `share`: by its text, so that a repeated run trains the same."""
    return zlib.crc32(repr(options).encode()) % share == 0


@pytest.mark.parametrize("share", [4, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(options=st.lists(OPTIONS, min_size=1, max_size=3, unique_by=lambda option: option[0]))
@example(options=[("gamma", "0.1")])
@example(options=[("learning_rate", None)])
@example(options=[("max_completion_length", 10**9)])
def test_an_option_is_trained_with_or_refused_by_name(folder, share, options):
    """Build a trainer of every draw, and train one in `share` of those that are accepted for a step."""
    options, refusal = dict(options), None
    try:
        trainer = tiny.ppo_trainer(folder, max_steps=1, eval_data=tiny.prompts(), **{"save_strategy": "no", **options})
    except (ValueError, NotImplementedError) as error:
        refusal = str(error)
    if refusal is not None:
        assert set(options) & set(re.findall(r"\w+", refusal)), f"{options}: {refusal}"
    elif _is_trained(options, share):
        trainer.train()
        assert trainer.state.global_step == 1
