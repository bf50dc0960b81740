"""A recipe gets its options and accelerate gets its own; a configuration is a file or a shipped name."""

import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from rlhf_recipes.command import running
from rlhf_recipes.command.mistakes import UsageError
from rlhf_recipes.command.running import found, run_recipe, split_launcher, with_configuration
from rlhf_recipes.command.stages import STAGES
from rlhf_recipes.options.commands import LAUNCHER_FLAGS, LAUNCHER_OPTIONS
from rlhf_recipes.options.shipped import shipped, shipped_configurations, shipped_launch_files

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """No file of `accelerate config`, and no choice of GPUs."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("option", [*LAUNCHER_OPTIONS, *LAUNCHER_FLAGS])
def test_an_option_of_the_launcher_is_accelerates_and_no_recipes(option):
    value = [] if option in LAUNCHER_FLAGS else ["no" if option == "mixed_precision" else "1"]
    asked = launch_command_parser().parse_args([f"--{option}", *value, "x.py"])
    assert (str(getattr(asked, option)), asked.training_script) == (*(value or ["True"]), "x.py")
    for stage in STAGES.values():
        for method in ("rloo", "grpo", "dpo"):
            assert not any(option in kind.__dataclass_fields__ for kind in stage.options(method))


def test_without_a_choice_there_is_one_process():
    launcher, options = split_launcher(["--config", "mine.yaml", "--learning_rate", "-1e-5", "--use_peft"])
    assert options == ["--config", "mine.yaml", "--learning_rate", "-1e-5", "--use_peft"]
    asked = launch_command_parser().parse_args([*launcher, "x.py"])
    assert (asked.num_processes, asked.num_machines, asked.gpu_ids) == (1, 1, "0")
    assert (asked.mixed_precision, asked.dynamo_backend) == ("no", "no")


def test_a_choice_of_gpus_stays(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert "--gpu_ids" not in split_launcher([])[0]


def test_several_processes():
    launcher, options = split_launcher(
        ["--seed", "1", "--num_processes=2", "--config", "x", "--main_process_port", "7"]
    )
    assert options == ["--seed", "1", "--config", "x"]
    asked = launch_command_parser().parse_args([*launcher, "x.py"])
    assert (asked.num_processes, asked.main_process_port, asked.gpu_ids) == (2, 7, None)


def test_a_shipped_launch_file():
    launcher, _ = split_launcher(["--config_file", "multi_gpu"])
    assert launcher == ["--config_file", str(ROOT / "accelerate_configs" / "multi_gpu.yaml")]


def test_the_file_of_accelerate_config_counts(tmp_path):
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / "default_config.yaml").touch()
    assert split_launcher(["--seed", "1"]) == ([], ["--seed", "1"])


@pytest.mark.parametrize("name", ["quickstart/ppo", "quickstart/ppo.yaml"])
@pytest.mark.parametrize("form", [["--config", "{}"], ["--config={}"]])
def test_a_shipped_configuration_is_taken_and_named(name, form, capsys):
    path = ROOT / "recipes" / "configs" / "quickstart" / "ppo.yaml"
    arguments = [part.format(name) for part in form]
    assert with_configuration(STAGES["ppo"], [*arguments, "--seed", "1"]) == ["--config", str(path), "--seed", "1"]
    assert capsys.readouterr().err == f"`--config` {name} is the shipped {path}.\n"


def test_a_file_here_comes_first_and_says_so(tmp_path, capsys):
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart" / "ppo.yaml").touch()
    known = shipped_configurations("ppo")
    assert found("config", "quickstart/ppo.yaml", known) == "quickstart/ppo.yaml"
    assert "is quickstart/ppo.yaml (a file here, not the shipped /" in capsys.readouterr().err
    with pytest.raises(UsageError, match="no file and no shipped"):
        found("config", "quickstart/", known)


def test_every_file_is_shipped_under_its_name():
    configs = ROOT / "recipes" / "configs"
    named = {f"{path.parent.name}/{path.stem}": path for path in configs.rglob("*.yaml")}
    assert {
        name: path for stage in STAGES.values() for name, path in shipped_configurations(stage.script).items()
    } == named
    assert "quickstart/evaluate_reward_model" not in shipped_configurations("evaluate"), "it is another recipe's"
    assert set(shipped_launch_files().values()) == set((ROOT / "accelerate_configs").glob("*.yaml"))


def test_in_an_installed_package_the_folder_inside_counts(tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf_recipes.options.shipped.PACKAGE", tmp_path / "rlhf_recipes")
    (tmp_path / "recipes").mkdir()
    assert shipped("recipes") == tmp_path / "recipes"
    (tmp_path / "rlhf_recipes" / "recipes").mkdir(parents=True)
    assert shipped("recipes") == tmp_path / "rlhf_recipes" / "recipes"


def test_a_training_is_launched_with_its_script_and_options(monkeypatch):
    launched = []
    monkeypatch.setattr(running.launch, "main", launched.extend)
    with pytest.raises(SystemExit) as end:
        run_recipe(STAGES["reward-modeling"], ["--num_processes", "1", "--num_machines", "1", "--max_steps", "1"])
    assert end.value.code is None
    script = str(ROOT / "recipes" / "reward_modeling.py")
    assert launched[-3:] == [script, "--max_steps", "1"]


def test_another_recipe_replaces_the_process(monkeypatch):
    started = []
    monkeypatch.setattr(running.os, "execv", lambda *command: started.append(command))
    run_recipe(STAGES["serve"], ["--port", "1"])
    script = str(ROOT / "recipes" / "serve_reward_model.py")
    assert started == [(sys.executable, [sys.executable, script, "--port", "1"])]
