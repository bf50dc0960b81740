"""Each wrong line of a recipe is refused in one line that names it, before anything is loaded."""

import os

import pytest
import tiny
import trl

from rlhf_recipes.options import training
from rlhf_recipes.options.baselines import DPOConfig
from rlhf_recipes.options.parser import RecipeParser
from rlhf_recipes.options.ppo import PPOConfig
from rlhf_recipes.options.recipes import PPOArguments, TrackingArguments
from rlhf_recipes.options.reward_modeling import RewardModelConfig

CLASSES = (PPOArguments, PPOConfig, trl.ModelConfig, TrackingArguments)
CPU = ["--output_dir", "out", "--use_cpu", "true"]


def _parse(*line):
    return RecipeParser(CLASSES).parse_args_and_config([*CPU, *line])


def _file(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    return "--config", str(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--learning_rat", "1"], None),  # the beginning of one name only: argparse takes it
        (["--lerning_rate", "1"], r"`lerning_rate` \(after `true`\) is no option .* Did you mean `learning_rate`\?"),
        (["--load_in_8bit", "-inf"], r"`inf` \(after `--load_in_8bit`\) is no option"),
        (["--config"], "`--config` names no file"),
        (["--config", "nowhere.yaml"], "`--config` nowhere.yaml cannot be read: .*No such file"),
        (["--learning_rate", "inf"], "`learning_rate` must be finite, got inf"),
        (["--load_in_4bit", "--load_in_8bit"], "`load_in_4bit` and `load_in_8bit` exclude each other"),
        (["--lr_scheduler_kwargs", "{bad"], "`lr_scheduler_kwargs` must be a mapping, got '{bad'"),
        (["--lr_scheduler_kwargs", '{"nonsense": 1}'], "cannot be used with `lr_scheduler_kwargs` {'nonsense': 1}"),
        (["--optim", "galore_adamw"], "`optim: galore_adamw` cannot be used here: .*galore"),
        (["--optim_args", "nonsense"], "or its `optim_args` cannot be used"),
        (["--accelerator_config", "x" * 300], "`accelerator_config` is 'xxx.*, which is no file"),
        (["--output_dir", ""], "`output_dir` must name a directory"),
        (["--deepspeed", "nowhere.json"], "`deepspeed` is 'nowhere.json', which is no file"),
        (["--reward_functions", "len"], "`reward_functions` must name each function as `package.module:function`"),
        (["--load_best_model_at_end"], "load_best_model_at_end requires the save and eval strategy to match"),
    ],
)
def test_a_line_of_the_command(line, message):
    if message is None:
        _parse(*line)
        return
    with pytest.raises(ValueError, match=message) as error:
        _parse(*line)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 1\nlearning_rate: 2\n", "`learning_rate` is in it twice"),
        ("learning_rat: 1\n", r"`learning_rat` in .*run.yaml is no option .* Did you mean `learning_rate`\?"),
        ("1: 2\n", "`1` in .*run.yaml is no option"),
        ("- 1\n", "must hold options, each as `name: value`"),
        ("learning_rate: [1\n", "cannot be read: while parsing"),
        ("learning_rate: [1]\n", r"`learning_rate` must be a number, got \[1\]"),
        ("learning_rate: .nan\n", "`learning_rate` must be a number, got nan"),
        ("judge_models: runs/a\n", r"`judge_models` must be a list, got 'runs/a': write `judge_models: \[runs/a\]`"),
        ("reward_weights: [.inf]\n", "`reward_weights` must be finite, got inf"),
        ("reward_weights: [a]\n", "`reward_weights` must be a list, and each entry a number, got 'a'"),
        ("kl_estimator: k4\n", "`kl_estimator` must be one of k1, k2, k3, full, got 'k4'"),
        ("model_init_kwargs: 3\n", "`model_init_kwargs` must be a mapping, got 3"),
    ],
)
def test_a_file(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        _parse(*_file(tmp_path, text))


@pytest.mark.parametrize(("bf16", "precision"), [("false", "no"), ("true", "bf16")])
def test_the_precision_of_a_launch_file_yields_to_that_of_the_options(monkeypatch, bf16, precision):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    RecipeParser(CLASSES).parse_args_and_config(["--use_cpu", "true", "--bf16", bf16, "--output_dir", "out"])
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == precision


def test_what_a_file_may_hold(tmp_path):
    text = "learning_rate: 1e-4\nlora_target_modules: all-linear\nlr_scheduler_type: cosine_with_min_lr\n"
    text += "lr_scheduler_kwargs: {min_lr_rate: 0.1}\nresume_from_checkpoint: true\nmax_completion_length: null\n"
    _, config, model, _ = _parse(*_file(tmp_path, text), "--save_total_limit", "0")
    assert (config.learning_rate, config.save_total_limit, config.lr_scheduler_kwargs) == (
        1e-4,
        0,
        {"min_lr_rate": 0.1},
    )
    assert model.lora_target_modules == "all-linear"


def test_a_value_of_another_kind_is_one_line_and_no_list_of_options(capsys):
    with pytest.raises(SystemExit) as end:
        _parse("--learning_rate", "fast")
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "Error: argument --learning_rate/--learning-rate: invalid float value: 'fast'"
    ]


@pytest.mark.parametrize("make", [trl.SFTConfig, trl.DPOConfig, trl.RLOOConfig, trl.GRPOConfig])
def test_a_user_of_the_library_gets_the_same(tmp_path, make):
    """The recipes read them by `RecipeParser`; our trainers check what a program has constructed."""
    from rlhf_recipes.options.training import check_training

    sampled = {"num_generations": 2} if hasattr(make, "num_generations") else {}
    check_training(make(str(tmp_path), **tiny.QUIET, **sampled))
    with pytest.raises(ValueError, match="`adam_beta1` must lie in"):
        check_training(make(str(tmp_path), adam_beta1=1.0, **tiny.QUIET, **sampled))


@pytest.mark.parametrize("schedule", ["constant", "linear", "constant_with_warmup"])
@pytest.mark.parametrize("rate", ["0", "1", "0.0"])
def test_a_learning_rate_may_be_a_whole_number(tmp_path, schedule, rate):
    """A control run has the rate 0. YAML reads it as a whole number."""
    _, config, *_ = _parse(*_file(tmp_path, f"learning_rate: {rate}\nlr_scheduler_type: {schedule}\n"))
    assert config.learning_rate == float(rate)


@pytest.mark.parametrize("make", [PPOConfig, RewardModelConfig, trl.SFTConfig, DPOConfig])
def test_the_schedule_of_a_recipe_is_tried_once_when_it_is_read(make, monkeypatch):
    tried = []
    monkeypatch.setattr(training, "_check_schedule", tried.append)
    RecipeParser(make).parse_args_and_config(CPU)
    assert len(tried) == 1
