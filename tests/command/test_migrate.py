"""A configuration of TRL 1.12's PPO becomes one that the recipe parses, with the same rollouts and steps."""

import ast
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from rlhf_recipes.command.main import run
from rlhf_recipes.command.migrate import batches_of
from rlhf_recipes.command.migration import KEPT, OTHER_RULES, RULES
from rlhf_recipes.command.mistakes import UsageError
from rlhf_recipes.command.stages import STAGES
from rlhf_recipes.options.parser import RecipeParser
from rlhf_recipes.preflight.schedule import kl_findings, rollout_schedule, schedule_findings

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "coming-from-trl.md"
TRL = ROOT / "build" / "trl-1.12" / "trl"
needs_trl_1_12 = pytest.mark.skipif(not TRL.is_dir(), reason="no TRL 1.12 in build/trl-1.12")
# The command in the docstring of TRL 1.12's `ppo.py`, with some options of its own more.
SCRIPT = """
# the run of last week
accelerate launch --config_file zero2.yaml --num_processes 2 \\
    examples/scripts/ppo/ppo.py --dataset_name trl-internal-testing/descriptiveness-sentiment-trl-style \\
    --dataset-train-split descriptiveness --output_dir pythia-1b-ppo --num_ppo_epochs 1 --num_mini_batches 1 \\
    --learning_rate 3e-6 --per_device_train_batch_size 1 --gradient_accumulation_steps 16 --total_episodes 10000 \\
    --model_name_or_path EleutherAI/pythia-1b-deduped --sft_model_path EleutherAI/pythia-1b-deduped \\
    --reward_model_path EleutherAI/pythia-1b-deduped --local_rollout_forward_batch_size 1 --missing_eos_penalty 1.0 \\
    --save_steps 5 --warmup_ratio 0.1 --stop_token eos --lora_target_modules q_proj v_proj --use_peft --bf16 False \\
    --kl_estimator k1 --whiten_rewards
"""


def migrated(tmp_path, monkeypatch, text, suffix=".sh", *arguments):
    """Return the options of the new file, and the parsed ones."""
    monkeypatch.chdir(tmp_path)
    Path(f"old{suffix}").write_text(text)
    run(["migrate", f"old{suffix}", *arguments])
    parser = RecipeParser(STAGES["ppo"].options())
    parsed = parser.parse_args_and_config(["--config", "ppo.yaml", "--use_cpu", "true", "--bf16", "false"])
    return yaml.safe_load(Path("ppo.yaml").read_text()), parsed


def test_a_script_becomes_a_configuration_that_parses(tmp_path, monkeypatch, capsys):
    new, (_, args, model_args, *_) = migrated(tmp_path, monkeypatch, SCRIPT)
    assert new["model_name_or_path"] == new["reward_model_path"] == "EleutherAI/pythia-1b-deduped"
    assert new["dataset_train_split"] == "descriptiveness"
    assert (args.num_iterations, args.steps_per_generation, args.gradient_accumulation_steps) == (1, 16, 16)
    rollouts = -(-10_000 // (1 * 16 * 2))  # the 2 processes are in the script
    assert args.max_steps == new["max_steps"] == rollouts
    assert (args.save_steps, args.warmup_steps) == (5, 0.1)
    assert (args.temperature, args.max_completion_length, args.kl_coef, args.adam_epsilon) == (0.7, 53, 0.05, 1e-8)
    assert (args.reward_norm, args.loss_type, args.response_separator) == (False, "dapo", "")
    assert (model_args.use_peft, model_args.lora_target_modules) == (True, ["q_proj", "v_proj"])
    printed = capsys.readouterr().out
    for expected in (
        "- `sft_model_path` is `model_name_or_path`: The policy, and the reference",
        "- `local_rollout_forward_batch_size` has no counterpart. As many rows as fit",
        "- `whiten_rewards` has no counterpart. Rewards are not whitened.",
        "- `model_name_or_path` has no counterpart. TRL's script read only the tokenizer from it.",
        "rlhf ppo --config ppo.yaml --preflight_only true",
    ):
        assert expected in printed
    text = Path("ppo.yaml").read_text()
    assert "temperature: 0.7 # the default of TRL 1.12\n" in text
    assert "max_steps: 313 # 313 rollouts: `total_episodes` 10,000 / 32\n" in text


def test_a_value_in_quotes_stays_whole(tmp_path, monkeypatch, capsys):
    words = '--output_dir "o #1" --exp_name "a: b" --learning_rate 3e-6 --bf16 false'
    new, _ = migrated(tmp_path, monkeypatch, f"python ppo.py {words}", ".sh")
    assert (new["output_dir"], new["run_name"]) == ("o #1", "a: b")
    assert (new["learning_rate"], new["bf16"]) == (3e-6, False)


def test_a_yaml_file_is_read_too(tmp_path, monkeypatch, capsys):
    old = {
        "num_ppo_epochs": 2, "per_device_train_batch_size": 64, "num_mini_batches": 4, "num_train_epochs": 1,
        "cliprange": 0.1, "save_steps": 0.25, "logging_steps": 2, "exp_name": "mine", "nonsense": 3,
    }  # fmt: skip
    new, (_, args, *_) = migrated(tmp_path, monkeypatch, yaml.safe_dump(old), ".yaml", "--num_processes", "8")
    assert (args.per_device_train_batch_size, args.steps_per_generation, args.gradient_accumulation_steps) == (
        16,
        4,
        1,
    )
    assert (args.epsilon, args.run_name, args.save_steps, args.logging_steps) == (0.1, "mine", 0.25, 16)
    assert new["num_train_epochs"] == 1
    assert "max_steps" not in new
    assert "- `nonsense` has no counterpart.\n" in capsys.readouterr().out


def optimiser_steps(rows, accumulated, mini_batches, epochs):
    """Count the steps of one rollout as TRL 1.12 and accelerate make them: walk through TRL's three loops."""
    local, count, steps = rows * accumulated, 0, 0
    for _ in range(epochs):
        for start in range(0, local, local // mini_batches):
            for _ in range(start, start + local // mini_batches, rows):
                count += 1
                steps += count % accumulated == 0
    return steps


@pytest.mark.parametrize("rows", [1, 4, 8])
@pytest.mark.parametrize("accumulated", [1, 2, 16])
@pytest.mark.parametrize("mini_batches", [1, 2, 4, 16])
@pytest.mark.parametrize("epochs", [1, 4])
def test_a_rollout_has_as_many_steps_as_in_trl_1_12(rows, accumulated, mini_batches, epochs):
    old = {
        "per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulated,
        "num_mini_batches": mini_batches, "num_ppo_epochs": epochs,
    }  # fmt: skip
    if rows * accumulated % mini_batches:
        with pytest.raises(UsageError, match="does not divide the"):
            batches_of(old, 2)
        return
    batches = batches_of(old, 2)
    assert batches.is_exact
    assert batches.steps == optimiser_steps(rows, accumulated, mini_batches, epochs)
    assert batches.rows * batches.micro_batches == rows * accumulated
    assert batches.rollout == rows * accumulated * 2
    assert batches.micro_batches % batches.per_step == 0


def test_a_step_that_reached_into_the_next_pass_is_said(tmp_path, monkeypatch, capsys):
    old = "per_device_train_batch_size: 4\ngradient_accumulation_steps: 3\nnum_mini_batches: 2\n"
    migrated(tmp_path, monkeypatch, old, ".yaml")
    assert "neither divides the other" in capsys.readouterr().out


def test_mini_batches_that_trl_1_12_put_together_are_said(tmp_path, monkeypatch, capsys):
    _, (_, args, *_) = migrated(
        tmp_path, monkeypatch, "gradient_accumulation_steps: 8\nnum_mini_batches: 4\n", ".yaml"
    )
    assert args.steps_per_generation // args.gradient_accumulation_steps == 1
    assert (
        "`num_mini_batches` is 4, but a pass over a rollout had fewer optimiser steps (1)" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("", [], "old.yaml holds no options"),
        ("a: [1", [], "old.yaml cannot be read"),
        ("num_mini_batches: x", [], "`num_mini_batches` x must be a whole number"),
        ("num_ppo_epochs: 0", [], "`num_ppo_epochs` 0 must be a whole number of at least 1"),
        ("seed: 1", ["--num_processes", "0"], "`--num_processes` 0 is no number of processes"),
        ("seed: 1", ["--output", "old.yaml"], "`--output` old.yaml exists already. Name another file."),
        ("seed: 1", ["--output", "no/ppo.yaml"], "`--output` no/ppo.yaml cannot be written"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, text, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("old.yaml").write_text(text)
    with pytest.raises(UsageError) as error:
        run(["migrate", "old.yaml", *arguments])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def fields_of(path, name):
    """Return the fields that a class of a file declares itself."""
    tree = ast.parse(path.read_text())
    body = next(node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == name)
    return [node.target.id for node in body if isinstance(node, ast.AnnAssign)]


@needs_trl_1_12
def test_every_field_of_trl_1_12_has_a_rule():
    assert list(RULES) == fields_of(TRL / "experimental/ppo/ppo_config.py", "PPOConfig")


@needs_trl_1_12
def test_the_page_names_every_argument_of_trl_1_12():
    tree = ast.parse((TRL / "experimental/ppo/ppo_trainer.py").read_text())
    trainer = next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == "PPOTrainer")
    start = next(node for node in trainer.body if getattr(node, "name", "") == "__init__")
    rows = re.findall(r"^\| `(\w+)` \|", section("Arguments of `PPOTrainer`"), re.MULTILINE)
    assert rows == [argument.arg for argument in start.args.args if argument.arg != "self"]


@needs_trl_1_12
def test_options_that_only_pass_through_still_exist():
    known = {name for kind in STAGES["ppo"].options() for name in kind.__dataclass_fields__}
    for file, name in (("scripts/utils.py", "ScriptArguments"), ("trainer/model_config.py", "ModelConfig")):
        assert set(fields_of(TRL / file, name)) <= known | set(OTHER_RULES)


def test_every_new_name_exists():
    known = {name for kind in STAGES["ppo"].options() for name in kind.__dataclass_fields__}
    assert {rule.new for rule in (*RULES.values(), *OTHER_RULES.values()) if rule.new} | set(KEPT) <= known


def section(title):
    text = PAGE.read_text("utf-8")
    return text[text.index(f"## {title}\n") :].partition("\n## ")[0]


def test_the_page_has_the_rules():
    rows = [
        f"| `{old}` | {'`' + rule.new + '`' if rule.new else 'none'} | {rule.note or 'the same'} |"
        for old, rule in {**RULES, **OTHER_RULES}.items()
    ]
    table = [line for line in section("Options").splitlines() if line.startswith("| `")]
    assert table == rows
    for name, (value, reason) in KEPT.items():
        assert f"| `{name}: {yaml.safe_dump(value).splitlines()[0]}` | {reason} |" in section(
            "What keeps the behaviour"
        )


def test_the_example_of_the_page_is_what_the_tool_writes(tmp_path, monkeypatch, capsys):
    blocks = dict(re.findall(r"```(\w+)\n(.*?)```", section("In two commands"), re.DOTALL))
    (_, (_, args, *_)) = migrated(tmp_path, monkeypatch, blocks["sh"])
    assert Path("ppo.yaml").read_text().replace("old.sh", "my_old_ppo.sh") == blocks["yaml"]
    assert shlex.split(blocks["bash"].splitlines()[0])[:3] == ["rlhf", "migrate", "my_old_ppo.sh"]
    schedule = rollout_schedule(SimpleNamespace(**vars(args) | {"generation_batch_size": 32}), rows=1000)
    assert not [*kl_findings(args, schedule), *schedule_findings(args, schedule, 100)]
