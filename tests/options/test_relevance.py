"""One table says which options matter for the group of a run, for a comparison, and for a resume."""

from dataclasses import dataclass, fields
from fnmatch import fnmatchcase

import pytest

from rlhf_recipes.comparison.groups import group_runs
from rlhf_recipes.comparison.runs import TrackedRun
from rlhf_recipes.options.ppo import PPOConfig
from rlhf_recipes.options.recipes import EvaluationArguments
from rlhf_recipes.options.relevance import CLASSES, class_of, config_group, flat, options_that_count
from rlhf_recipes.options.secrets import public_options
from rlhf_recipes.options.sft import SFTConfig


@dataclass
class Options:
    """Options of a first dataclass."""

    learning_rate: float = 1e-5
    output_dir: str = "runs/seed-0/ppo"
    model: str = "runs/seed-0/sft"
    seed: int = 0


@dataclass
class Others:
    """Options of a second dataclass, which has some names too."""

    seed: int = 0
    model: str = "other"


def _are_one_group(first, second):
    """Return whether two configurations have one `group` tag; check that the report says the same."""
    tags = {config_group(first), config_group(second)}
    runs = [
        TrackedRun(name, name, "FINISHED", "0", flat(options), {}, {})
        for name, options in (("a", first), ("b", second))
    ]
    groups, _ = group_runs(runs)
    assert len(groups) == len(tags), "the report and the tag disagree"
    return len(tags) == 1


def test_the_tag_and_the_report_agree_about_every_option():
    sections = public_options((PPOConfig(output_dir="runs/ppo", bf16=False),))
    for option in (field.name for field in fields(PPOConfig) if field.init):
        changed = {name: options | {option: "another"} for name, options in sections.items()}
        expected = class_of(option) in ("seed", "place and name", "logging and saving")
        assert _are_one_group(sections, changed) is expected, option


@pytest.mark.parametrize(
    ("option", "same"),
    [
        *((name, True) for name in ("seed", "output_dir", "logging_steps", "save_steps", "report_to", "hub_model_id")),
        *((name, False) for name in ("learning_rate", "max_steps", "eval_steps", "deepspeed", "reward_adapter")),
    ],
)
def test_a_group_is_an_experiment(option, same):
    assert _are_one_group({"PPOConfig": {option: 1}}, {"PPOConfig": {option: 2}}) is same


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"seed": 1}, True),
        ({"output_dir": "elsewhere"}, True),
        ({"model": "runs/seed-1/sft"}, True),
        ({"model": "runs/Seed_12/sft"}, True),
        ({"learning_rate": 2e-5}, False),
    ],
)
def test_a_group_is_an_experiment_whatever_the_seed(changes, same):
    first, second = (public_options((options, Others())) for options in (Options(), Options(**changes)))
    assert _are_one_group(first, second) is same


def test_only_a_seed_is_taken_for_a_seed():
    first, second = (public_options((Options(model=f"runs/linseed-{n}/sft"),)) for n in (0, 1))
    assert not _are_one_group(first, second)


def test_an_option_of_two_dataclasses_counts_twice():
    first, second = (public_options((Options(), other)) for other in (Others(), Others(model="a third")))
    assert not _are_one_group(first, second)
    assert _are_one_group(*(public_options((Options(), Others(seed=seed))) for seed in (0, 1)))


@pytest.mark.parametrize(
    ("option", "counts"),
    [
        *((name, True) for name in ("seed", "data_seed", "learning_rate", "per_device_train_batch_size", "gamma")),
        *((name, True) for name in ("vllm_mode", "num_generations_eval", "bf16_full_eval", "ignore_data_skip")),
        *((name, False) for name in ("logging_steps", "save_steps", "logged_samples", "eval_steps", "output_dir")),
        *((name, False) for name in ("deepspeed", "ddp_timeout", "gradient_checkpointing_kwargs", "hub_revision")),
        *((name, False) for name in ("reward_adapter", "reward_timeout", "vllm_server_host", "do_eval")),
    ],
)
def test_which_options_a_resume_compares(option, counts):
    assert (f"`{option}`" in options_that_count(PPOConfig(output_dir="runs/ppo", bf16=False))) is counts


def test_the_length_of_a_run_is_free_with_a_constant_learning_rate():
    decaying, constant = (
        options_that_count(PPOConfig(output_dir="runs/ppo", bf16=False, lr_scheduler_type=schedule))
        for schedule in ("linear", "constant_with_warmup")
    )
    assert decaying.keys() - constant.keys() == {"`max_steps`", "`num_train_epochs`"}


def test_every_entry_of_the_table_names_an_option_and_no_option_is_in_two_classes():
    known = {field.name for config in (PPOConfig, SFTConfig, EvaluationArguments) for field in fields(config)}
    patterns = [pattern for each in CLASSES.values() for pattern in each]
    assert [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in known)] == []
    assert [name for name in known if sum(fnmatchcase(name, pattern) for pattern in patterns) > 1] == []
