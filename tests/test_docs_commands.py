"""The commands in the documentation: each is run, up to the start of a training, by the parsers that a user meets.

A block that needs a GPU, a network or a cluster has the line `Needs: ...` above it.
"""

import ast
import os
import re
import subprocess
import tomllib
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from documents import DOCUMENTS, PARSERS, RECIPES, ROOT, blocks, commands_of, options_of_script
from pip._internal.commands import create_command

from rlhf_recipes.command import main, running
from rlhf_recipes.options.judge import JudgeConfig
from rlhf_recipes.options.parser import RecipeParser

# Files of the examples, and the shipped configuration in each one's place.
YOURS = {
    "my_ppo.yaml": "quickstart/ppo.yaml",
    "my_sft.yaml": "quickstart/sft.yaml",
    "my_rm.yaml": "quickstart/reward_modeling.yaml",
    "prm.yaml": "report/process_reward_modeling.yaml",
    "my_rloo.yaml": "quickstart/baseline_rloo.yaml",
    "my_evaluation.yaml": "quickstart/evaluate.yaml",
    "my_preferences.yaml": "quickstart/sample_preferences.yaml",
}
SHELL = {"cd", "source", "mkdir", "git", "mv"}  # need nothing that a machine lacks
ELSEWHERE = {
    "docker",
    "hf",
    "kubectl",
    "text-embeddings-router",
    "trl",
    "vllm",
}  # need something that is named above the block
# Settings of PEFT, transformers and TRL 1.12 that are no options of a recipe.
OF_OTHERS = {"init_lora_weights", "output_router_logits", "num_return_sequences", "num_beams", "do_sample"}
OF_OTHERS |= {"stop_token"}
PLACEHOLDERS = {"N": "0", "STAGE": "ppo", "COMMAND": "ppo", "FILE": "accelerate_configs/multi_gpu.yaml"}


@pytest.fixture
def project(tmp_path, monkeypatch, capsys):
    """Enter a directory with the checkout's files, those of a project, and those that the examples call the user's."""
    monkeypatch.chdir(tmp_path)
    main.run(["init", "project"])
    for name in ("recipes", "accelerate_configs", "benchmarks", "constraints.txt"):
        os.symlink(ROOT / name, tmp_path / name)
    for name, shipped in YOURS.items():
        os.symlink(RECIPES / "configs" / shipped, tmp_path / name)
    for path in (tmp_path / "project").glob("*.yaml"):
        os.symlink(path, tmp_path / path.name)
    return tmp_path


class Commands:
    """Runs commands. What would start a training or another program is parsed instead."""

    def __init__(self, monkeypatch):
        self.monkeypatch, self.needs = monkeypatch, ""
        monkeypatch.setattr(running.launch, "main", lambda words: self.launch(["launch", *words]))
        monkeypatch.setattr("torch.accelerator.device_count", lambda: 8 if self.needs else 0)
        monkeypatch.setattr(os, "execv", lambda _, words: self.python(words[1:]))

    def run(self, words, needs=""):
        """Run one command.

        Args:
            words: Words of the command.
            needs: Text of the line above its block.
        """
        self.needs = needs
        program, *rest = [PLACEHOLDERS.get(word, word) for word in words]
        if program in ELSEWHERE:
            assert needs, f"{program} needs something, and no line above the block says so"
        elif program not in SHELL or program == "cd":
            runners = {"rlhf": self.rlhf, "accelerate": self.launch, "cd": self.enter}
            runners |= {"python": self.python, "make": self.make, "pip": self.pip}
            runners[program](rest)

    def enter(self, words):
        self.monkeypatch.chdir(words[0])

    def rlhf(self, words):
        if len(words) == 1 and not words[0].startswith("-"):  # the name of a command, in a sentence or alone
            assert words[0] in {*main.STAGES, *main.TOOLS}
        elif words[0] in ("config", "doctor", "migrate"):  # their own tests run them
            self.tool(words)
        else:
            with suppress(SystemExit):  # after `--help`
                main.run(words)

    def tool(self, words):
        tool, *options = words
        script = ROOT / "rlhf_recipes" / "command" / {"config": "listing.py"}.get(tool, f"{tool}.py")
        assert _named(options) <= options_of_script(script)
        assert tool != "config" or options[0].replace("_", "-") in main.STAGES

    def launch(self, words):
        assert words[0] == "launch"
        asked = launch_command_parser().parse_args(words[1:])
        assert asked.config_file is None or os.path.isfile(asked.config_file), asked.config_file
        if asked.training_script.startswith("examples/scripts/"):  # of a checkout of TRL
            return
        if asked.config_file is not None and _read(asked.config_file)["num_processes"] > 1:
            assert self.needs, "several GPUs are needed, and no line above the block says so"
        self.python([*(["-m"] if asked.module else []), asked.training_script, *asked.training_script_args])

    def python(self, words):
        if words[0] == "-m":
            assert "__main__" in Path(find_spec(words[1]).origin).read_text()
            return
        script, options = ROOT / os.path.relpath(os.path.realpath(words[0]), ROOT), words[1:]
        assert script.is_file(), script
        if script.parent == RECIPES and (script.stem in PARSERS):
            self.recipe(script.stem, options)
        else:
            assert _named(options) <= {*options_of_script(script), "--help"}, options

    def recipe(self, stage, options):
        if stage == "ppo" and not any(o.startswith(("--config", "--model_name_or_path")) for o in options):
            options = ["--config", str(RECIPES / "configs/quickstart/ppo.yaml"), *options]
        if stage == "baseline":
            stage = f"baseline_{options[options.index('--method') + 1]}"
        trains = any(hasattr(kind, "use_cpu") for kind in PARSERS[stage])
        if trains:
            assert self.needs or _is_for_cpu(options), "a GPU is needed, and no line above the block says so"
        on_cpu = ["--use_cpu", "true"] if trains else []  # only parsed here, where a GPU or bf16 may be missing
        RecipeParser(PARSERS[stage]).parse_args_and_config([*options, *on_cpu])

    def make(self, words):
        targets = [word for word in words if "=" not in word]
        subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, check=True, capture_output=True)

    def pip(self, words):
        assert words[0] == "install"
        options, packages = create_command("install").parse_args(words[1:])
        assert all(os.path.isfile(file) for file in options.constraints)
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for package in [*packages, *options.editables]:
            asked = re.findall(r"\[(.*)\]", package) if package.startswith((".", "rlhf-recipes")) else []
            assert {extra for each in asked for extra in each.split(",")} <= extras.keys(), package


def _named(options):
    return {option.partition("=")[0] for option in options if option.startswith("--")}


def _read(file):
    return yaml.safe_load(Path(file).read_text())


def _is_for_cpu(options):
    given = dict(zip(options, options[1:], strict=False))
    file = _read(given["--config"]) if "--config" in given else {}
    return given.get("--use_cpu", str(file.get("use_cpu", False))).lower() == "true"


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_commands_of_a_page(page, project, monkeypatch):
    commands = Commands(monkeypatch)
    for block in blocks(page):
        monkeypatch.chdir(project)
        for words in block.commands:
            try:
                commands.run(words, block.needs)
            except (Exception, SystemExit) as error:
                pytest.fail(f"{page.name}: `{' '.join(words)}`: {type(error).__name__}: {error}")


def test_the_commands_in_recipes_and_configurations(project, monkeypatch):
    commands, run = Commands(monkeypatch), 0
    for file in [*RECIPES.glob("*.py"), *RECIPES.rglob("*.yaml")]:
        if file.suffix == ".py":
            lines = ast.get_docstring(ast.parse(file.read_text())).splitlines()
        else:
            lines = [line[2:] for line in file.read_text().splitlines() if line.startswith("# ")]
        for line in lines:
            if re.match(r" *(accelerate launch |python recipes/|rlhf )", line):
                for words in commands_of(line):
                    commands.run(words, "named beside it")
                    run += 1
    assert run >= 40


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_an_option_with_a_value_is_one(page):
    text = page.read_text()
    files = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    given = {name for file in files if not file.startswith("services:") for name in yaml.safe_load(file)}
    given |= set(re.findall(r"`([a-z]\w*_\w+): [\w.:-]+`", text))
    known = {name for kinds in PARSERS.values() for kind in kinds for name in kind.__dataclass_fields__}
    known |= JudgeConfig.__dataclass_fields__.keys()  # of the file of a judge
    assert given <= known | OF_OTHERS


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_names_that_python_on_a_page_imports_are_there(page):
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                assert all(hasattr(import_module(node.module), name.name) for name in node.names), block
