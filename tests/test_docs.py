"""Documentation and configurations are true: YAMLs parse, options are read, commands and paths exist."""

import ast
import dataclasses
import re

import pytest
import trl
import yaml
from documents import DOCUMENTS, PARSERS, RECIPES, ROOT
from processes import run_command

from rlhf_recipes import PPOConfig, ProcessRewardModelConfig, RewardModelConfig
from rlhf_recipes.command.plan import HARDWARE, plan
from rlhf_recipes.command.project import write
from rlhf_recipes.command.stages import STAGES
from rlhf_recipes.options import recipes as arguments
from rlhf_recipes.options.baselines import BaselineArguments, DPOConfig
from rlhf_recipes.options.judge import JudgeConfig
from rlhf_recipes.options.parser import RecipeParser
from rlhf_recipes.options.paths import require_path
from rlhf_recipes.options.preferences import PreferenceArguments
from rlhf_recipes.options.reward_model_evaluation import RewardModelEvaluationArguments
from rlhf_recipes.options.shipped import shipped_configurations
from rlhf_recipes.quickstart.stages import STAGES as QUICKSTART

IN_CLUSTERS = [
    path for stage in ("ppo", "reward_modeling") for path in (ROOT / "cluster/kubernetes").rglob(f"{stage}.yaml")
]
YAMLS = sorted([*(RECIPES / "configs").rglob("*.yaml"), *IN_CLUSTERS])
# Learning rate of each stage of a project whose file names none.
RATES = {
    "sft": trl.SFTConfig.learning_rate,
    "reward_modeling": RewardModelConfig.learning_rate,
    "ppo": PPOConfig.learning_rate,
}
# Our classes of options: the base from TRL whose options they inherit, and the variables that hold them.
OURS = {
    PPOConfig: (trl.GRPOConfig, {"args", "training_args", "limits"}),
    RewardModelConfig: (trl.RewardConfig, {"args", "training_args"}),
    ProcessRewardModelConfig: (trl.RewardConfig, {"args", "training_args"}),
    arguments.JudgeArguments: (trl.ScriptArguments, {"judge_args"}),
    arguments.PPOArguments: (trl.ScriptArguments, {"script_args", "judge_args"}),
    PreferenceArguments: (trl.ScriptArguments, {"script_args", "judge_args"}),
    arguments.EvaluationArguments: (trl.ScriptArguments, {"script_args", "judge_args"}),
    BaselineArguments: (trl.ScriptArguments, {"script_args", "judge_args", "limits", "self"}),
    DPOConfig: (trl.DPOConfig, {"args", "training_args"}),
    JudgeConfig: (None, {"config", "_config", "self"}),
    RewardModelEvaluationArguments: (trl.ScriptArguments, {"script_args", "judge_args", "limits"}),
    arguments.BoundaryArguments: (None, {"boundary_args"}),
    arguments.ExportArguments: (None, {"script_args", "start"}),
    arguments.ServeArguments: (None, {"script_args"}),
    arguments.ComparisonArguments: (None, {"script_args"}),
    arguments.TrackingArguments: (None, {"tracking"}),
    arguments.PreflightArguments: (None, {"preflight_args", "start"}),
}


def _stage(path):
    return re.sub(r"_q?lora(_vllm)?$", "", path.stem)


def _parse(stage, path):
    # GPU configurations ask for bf16, which this machine may not have. The test only parses them.
    trains = any(hasattr(cls, "use_cpu") for cls in PARSERS[stage])
    on_cpu = ["--use_cpu", "true"] if trains else []
    return RecipeParser(PARSERS[stage]).parse_args_and_config(["--config", str(path), *on_cpu])


def test_there_are_yamls():
    assert len(YAMLS) >= 10


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: str(p.relative_to(ROOT)))
def test_yaml_parses_and_opens_with_what_it_is(path):
    assert _stage(path) in PARSERS, f"{path} belongs to no recipe"
    _parse(_stage(path), path)
    head = path.read_text().splitlines()[:4]
    assert head[0].startswith("# ")
    assert any("recipes/" in line and line.startswith("#") for line in head), "the header must give the command"


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: str(p.relative_to(ROOT)))
def test_yaml_holds_only_what_differs_from_the_defaults(path):
    defaults = {}
    for cls in PARSERS[_stage(path)]:
        for field in dataclasses.fields(cls):
            defaults[field.name] = field.default
    redundant = {
        name
        for name, value in yaml.safe_load(path.read_text()).items()
        if defaults[name] == value and value is not None
    }
    assert not redundant, f"{path} repeats the default of {redundant}"


@pytest.mark.parametrize("stage", PARSERS)
def test_an_unknown_key_is_an_error(stage, tmp_path):
    required = {"export": "output_dir: runs/export\n", "compare": "experiment: mine\n"}
    source = next((path.read_text() for path in YAMLS if _stage(path) == stage), required.get(stage, ""))
    misspelt = tmp_path / "misspelt.yaml"
    misspelt.write_text(source + "\nlearning_rat: 1.0e-3\n")
    with pytest.raises(ValueError, match="learning_rat"):
        _parse(stage, misspelt)


def _attributes_read(holders):
    """Return every attribute that the library or a recipe reads from variables with these names."""
    names = set()
    for path in [*(ROOT / "rlhf_recipes").rglob("*.py"), *RECIPES.glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                holder = getattr(node.value, "attr", getattr(node.value, "id", None))
                if holder in holders:
                    names.add(node.attr)
    return names


@pytest.mark.parametrize("cls", OURS, ids=lambda c: c.__name__)
def test_every_option_is_read_and_explains_itself(cls):
    base, holders = OURS[cls]
    inherited = {field.name for field in dataclasses.fields(base)} if base else set()
    own = {field.name: field.metadata.get("help") for field in dataclasses.fields(cls) if field.name not in inherited}
    assert own
    unread = own.keys() - _attributes_read(holders)
    assert not unread, f"{cls.__name__} has options that nothing reads: {unread}"
    assert all(own.values()), f"{cls.__name__} has options without a help text: {own}"


@pytest.mark.parametrize("stage", PARSERS)
def test_help_can_be_printed(stage):
    text = RecipeParser(PARSERS[stage]).format_help()  # a lone percent sign is an error there
    assert "%%" not in text
    assert f"--{dataclasses.fields(PARSERS[stage][0])[0].name}" in text


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_paths_in_the_documentation_exist(document):
    text = document.read_text()
    pattern = r"(?:recipes|rlhf_recipes|accelerate_configs|tests|benchmarks|cluster|docs)/[\w./-]*\w\.\w+"
    for mention in set(re.findall(pattern, text)):
        assert (ROOT / mention).exists(), f"{document.name} mentions {mention}"


@pytest.mark.parametrize("stage", sorted(path.stem for path in RECIPES.glob("*.py")))
def test_help_and_docstring(stage):
    script = RECIPES / f"{stage}.py"
    docstring = ast.get_docstring(ast.parse(script.read_text()))
    assert f"recipes/{stage}.py" in docstring
    if stage in ("quickstart", "prepare_smollm2"):
        assert run_command(script, "--help", directory=ROOT).returncode == 0


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_missing_input_of_a_yaml_names_a_command_that_exists(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = yaml.safe_load(path.read_text())
    for option in ("model_name_or_path", "reward_model_path", "reward_adapter", "baseline_path", "dataset_name"):
        if not str(options.get(option)).startswith("runs/"):
            continue
        with pytest.raises(FileNotFoundError) as error:
            require_path(option, options[option])
        command = re.search(r"Run `(.*)` first", str(error.value)).group(1)
        if command == "make smollm2":
            continue
        stage = STAGES[command.removeprefix("rlhf ").split()[0]]
        for name in re.findall(r"--config (\S+)", command):
            assert name in shipped_configurations(stage.script), f"{path.name}, {option}: {command}"
        if "--until" in command:
            assert command.split()[-1] in QUICKSTART


@pytest.mark.parametrize(("page", "column"), [("reliability", 5), ("correctness", 3)])
def test_every_row_of_the_tables_has_its_test(page, column):
    lines = (ROOT / f"docs/{page}.md").read_text().splitlines()
    rows = [
        line for line, below in zip(lines, [*lines[1:], ""], strict=True) if line[:2] == "| " and below[:4] != "|---"
    ]
    assert len(rows) >= 20
    defined = {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))  # functions in a text that a test writes do not count
        if isinstance(node, ast.FunctionDef)
    }
    for row in rows:
        cells = re.sub(r"`[^`]*`", lambda code: code[0].replace("|", "/"), row).split("|")  # options may hold a bar
        named = re.findall(r"`(test_\w+)`", cells[column])
        assert named, row
        assert set(named) <= defined, row


def definitions(path):
    """Return the names of the functions and classes in a file."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_a_link_to_the_code_names_is_there(document):
    for name, path in re.findall(r"\[`(\w+)`\]\(([\w./-]+\.py)\)", document.read_text()):
        assert name in definitions(document.parent / path), f"{document.name} finds no {name} in {path}"


def test_every_formula_names_its_function_and_its_test():
    text = (ROOT / "docs/how-ppo-works.md").read_text()
    formulas = re.findall(r"(?:```math\n.*?```\s*)+(.*?)\n\n", text, re.DOTALL)
    assert len(formulas) >= 20
    for below in formulas:
        code, _, test = below.partition("Test: ")
        assert re.match(r"Code: \[`\w+`\]\(\.\./rlhf_recipes/", code), below
        assert re.match(r"\[`test_\w+`\]\(\.\./tests/", test), below


def test_the_table_of_hyper_parameters_is_that_of_rlhf_init(tmp_path):
    text = (ROOT / "docs/hyper-parameters.md").read_text()
    rows = {
        row[0].strip("`"): row[1:]
        for row in re.findall(r"^\| (`[a-z][a-z0-9-]+`) " + r"\| (.*?) " * 6 + r"\|$", text, re.M)
    }
    assert rows.keys() == HARDWARE.keys()
    for hardware, model in HARDWARE.items():
        project = plan("mine", model, hardware)
        write(project, tmp_path / hardware)
        stages = {stage: yaml.safe_load((tmp_path / hardware / f"{stage}.yaml").read_text()) for stage in RATES}
        rates = [f"{stages[stage].get('learning_rate', default):.0e}" for stage, default in RATES.items()]
        trained = ("LoRA" if project.lora else "all") + (" on 4-bit weights" if project.four_bit else "")
        expected = (model.split("/")[1], trained, *(rate.replace("e-0", "e-") for rate in rates), str(project.rollout))
        assert rows[hardware] == expected


def test_no_message_names_the_file_of_a_recipe():
    """An installed package has no such file. `options/commands.py` chooses between the file and `rlhf`."""
    for path in (ROOT / "rlhf_recipes").rglob("*.py"):
        tree = ast.parse(path.read_text())
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        docstrings = {ast.get_docstring(n, clean=False) for n in ast.walk(tree) if isinstance(n, documented)}
        said = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        assert not [text for text in said - docstrings if re.search(r"recipes/\w+\.py", text)], path
    pages = (ROOT / "rlhf_recipes/comparison/templates").glob("*.jinja")
    assert not [page for page in pages if re.search(r"recipes/\w+\.py", page.read_text())]


def test_the_messages_of_the_troubleshooting_page_are_in_the_code():
    text = (ROOT / "docs/troubleshooting.md").read_text()
    table = text.split("## By message")[1].split("## By curve")[0]
    quoted = [
        message for row in re.findall(r"^\| (`.*?) \|", table, re.M) for message in re.findall(r"`([^`]+)`", row)
    ]
    assert len(quoted) >= 12
    sources = [ast.walk(ast.parse(path.read_text())) for path in (ROOT / "rlhf_recipes").rglob("*.py")]
    said = "\n".join(
        n.value for nodes in sources for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)
    )
    missing = [message for message in quoted if message not in said.replace("`", "")]
    assert not missing


def test_every_page_is_in_the_index():
    index = (ROOT / "docs/README.md").read_text()
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"} <= set(
        re.findall(r"\]\(([\w-]+\.md)\)", index)
    )
