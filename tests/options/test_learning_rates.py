"""A run with LoRA gets a rate for LoRA; a rate far from what is usual is found; what is shipped is usual."""

import pytest
import trl
import yaml

from rlhf_recipes.command.plan import size_of
from rlhf_recipes.command.topics import options_of
from rlhf_recipes.options.baselines import CONFIGS
from rlhf_recipes.options.learning_rates import SMALL, TINY, rates_of
from rlhf_recipes.options.parser import RecipeParser
from rlhf_recipes.options.ppo import PPOConfig
from rlhf_recipes.options.reward_modeling import RewardModelConfig
from rlhf_recipes.options.shipped import shipped
from rlhf_recipes.preflight.rates import rate_findings, rate_line

CPU = ["--output_dir", "out", "--use_cpu", "true", "--bf16", "false"]
KINDS = {"sft": trl.SFTConfig, "reward_modeling": RewardModelConfig, "ppo": PPOConfig, **CONFIGS}


def _rate(kind, *line):
    options, _ = RecipeParser((kind, trl.ModelConfig)).parse_args_and_config([*CPU, *line])
    return options.learning_rate


@pytest.mark.parametrize(("stage", "lora"), [("sft", 2e-4), ("reward_modeling", 1e-4), ("ppo", 1e-5), ("dpo", 1e-5)])
def test_a_run_with_lora_gets_a_rate_for_lora(stage, lora, tmp_path):
    kind = KINDS[stage]
    assert _rate(kind) == kind.learning_rate
    assert _rate(kind, "--use_peft") == lora
    assert _rate(kind, "--use_peft", "--learning_rate", str(kind.learning_rate)) == kind.learning_rate
    file = tmp_path / "run.yaml"
    file.write_text(f"use_peft: true\nlearning_rate: {kind.learning_rate:.1e}\n")
    assert _rate(kind, "--config", str(file)) == kind.learning_rate, "what a user writes stays"
    file.write_text("use_peft: true\n")
    assert _rate(kind, "--config", str(file)) == lora


def test_the_list_of_options_shows_both_defaults():
    (option,) = (o for o in options_of([PPOConfig]) if o.name == "learning_rate")
    assert option.default == "1e-06 (with `use_peft`: 1e-05)"


@pytest.mark.parametrize(
    ("rate", "size", "lora", "level"),
    [
        (1e-6, 7e9, False, None),
        (1e-6, 7e9, True, "learn almost nothing"),
        (1e-5, 7e9, True, None),
        (1e-4, 7e9, False, "diverge"),
        (1e-4, 2e6, False, None),
        (1e-6, 2e6, False, "learn almost nothing"),
    ],
)
def test_a_rate_of_ppo_far_from_what_is_usual_is_found(rate, size, lora, level):
    messages = [finding.message for finding in rate_findings(PPOConfig, rate, size, lora=lora)]
    assert [level in message for message in messages] == ([] if level is None else [True])


def test_the_line_says_what_was_chosen():
    assert (
        rate_line(PPOConfig, 1e-5, 7e9, lora=True)
        == "learning rate 1e-05, the default with LoRA (usual: 3e-06 to 2e-04)"
    )
    assert rate_line(PPOConfig, 1e-5, 7e9, lora=False) == "learning rate 1e-05 (usual: 1e-07 to 1e-05)"


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_defaults_are_usual(kind):
    rates = rates_of(kind)
    assert not rate_findings(kind, rates.lora_default, SMALL, lora=True)
    assert not rate_findings(kind, kind.learning_rate, SMALL, lora=False)


@pytest.mark.parametrize(
    "path", sorted((shipped("recipes") / "configs").glob("*/*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_the_rates_of_the_shipped_configurations_are_usual(path):
    options = yaml.safe_load(path.read_text())
    kind = next((kind for stage, kind in KINDS.items() if path.stem.startswith((stage, f"baseline_{stage}"))), None)
    if kind is None:
        return
    lora = options.get("use_peft", False)
    rate = options.get("learning_rate", rates_of(kind).lora_default if lora else kind.learning_rate)
    assert not rate_findings(kind, rate, size_of(path.parent.name) or TINY / 10, lora=lora)
