"""Options are read and never written, and making them has no side effect."""

import copy
import os

import pytest
import tiny
from trl import SFTConfig

from rlhf_recipes.options.changes import options_of_trainer, with_changes
from rlhf_recipes.options.ppo import PPOConfig
from rlhf_recipes.options.process_reward_modeling import ProcessRewardModelConfig
from rlhf_recipes.options.recipes import (
    BoundaryArguments,
    ComparisonArguments,
    EvaluationArguments,
    ExportArguments,
    JudgeArguments,
    PPOArguments,
    PreflightArguments,
    ServeArguments,
    TrackingArguments,
)
from rlhf_recipes.options.reward_modeling import RewardModelConfig
from rlhf_recipes.options.secrets import use_hub_token

TOKEN = "hf_" + "a" * 30
TRAINING = tiny.RECIPE | {"hub_token": TOKEN}
CONFIGS = {
    PPOConfig: {"output_dir": "out", **TRAINING},
    RewardModelConfig: {"output_dir": "out", **TRAINING},
    ProcessRewardModelConfig: {"output_dir": "out", **TRAINING},
    BoundaryArguments: {},
    ComparisonArguments: {"experiment": "mine", "tracking_uri": "sqlite:///mine.db"},
    EvaluationArguments: {"judge_models": ["mine"]},
    ExportArguments: {"output_dir": "out"},
    JudgeArguments: {"judge_models": ["mine"]},
    PPOArguments: {"reward_model_path": "mine"},
    PreflightArguments: {},
    ServeArguments: {},
    TrackingArguments: {"tracking_uri": "sqlite:///mine.db", "experiment_name": "mine"},
}


@pytest.mark.parametrize(("config", "options"), CONFIGS.items(), ids=[config.__name__ for config in CONFIGS])
def test_making_options_changes_nothing_in_the_process(monkeypatch, config, options):
    monkeypatch.setenv("HF_TOKEN", "before")
    environment = dict(os.environ)
    made = config(**options)
    assert dict(os.environ) == environment
    assert getattr(made, "hub_token", TOKEN) == TOKEN


@pytest.mark.parametrize(("token", "expected"), [(TOKEN, TOKEN), (None, "before")])
def test_the_token_of_an_option_has_priority_over_that_of_the_environment(monkeypatch, token, expected):
    monkeypatch.setenv("HF_TOKEN", "before")
    use_hub_token(token)
    assert os.environ["HF_TOKEN"] == expected


def test_a_changed_copy_has_its_own_containers():
    """TRL writes into `accelerator_config` and `gradient_checkpointing_kwargs`."""
    args = SFTConfig("out", gradient_checkpointing_kwargs={"use_reentrant": True}, **TRAINING)
    before = copy.deepcopy(args)
    own = with_changes(args, run_name="mine")
    assert (own.run_name, own.hub_token, type(own)) == ("mine", TOKEN, SFTConfig)
    assert own.distributed_state is args.distributed_state
    own.gradient_checkpointing_kwargs["use_reentrant"] = False
    own.accelerator_config.dispatch_batches = False
    own.report_to.append("mine")
    assert args == before


def test_a_recipe_writes_to_mlflow_once_and_loads_with_the_options_of_the_model():
    kwargs = {"dtype": "float32", "attn_implementation": "eager"}
    args = SFTConfig("out", report_to=["mlflow", "tensorboard"], model_init_kwargs=kwargs, **TRAINING)
    before = copy.deepcopy(args)
    own = options_of_trainer(args, {"dtype": "bfloat16", "revision": "main"})
    assert own.report_to == ["tensorboard"]
    assert own.model_init_kwargs == {"dtype": "bfloat16", "attn_implementation": "eager", "revision": "main"}
    assert args == before


def test_the_log_names_what_a_recipe_sets_without_its_values(caplog):
    args = SFTConfig("out", report_to=["mlflow"], model_init_kwargs={"token": TOKEN}, **TRAINING)
    with caplog.at_level("INFO", logger="rlhf_recipes.options.changes"):
        options_of_trainer(args, {})
        options_of_trainer(args, {"dtype": "float32"})
    assert caplog.messages == [
        "The recipe sets `report_to` for the trainer.",
        "The recipe sets `report_to`, `model_init_kwargs` for the trainer.",
    ]
