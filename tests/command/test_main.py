"""The command starts at once, knows its commands, and answers a mistake in one line."""

import ast
import subprocess
import sys

import pytest

from rlhf_recipes.command.main import TOOLS, overview, run
from rlhf_recipes.command.mistakes import UsageError
from rlhf_recipes.command.stages import STAGES
from rlhf_recipes.options.shipped import shipped

COMMAND = (sys.executable, "-m", "rlhf_recipes.command")
SLOW_IMPORTS = ("torch", "trl", "transformers", "accelerate", "mlflow", "numpy", "rich")


@pytest.mark.parametrize("arguments", [["--help"], ["init", "mine"], ["doctor"], ["config", "nonsense"], ["nonsense"]])
def test_what_needs_no_library_imports_none(arguments, tmp_path):
    script = (
        "import sys\nfrom rlhf_recipes.command.main import main\n"
        f"sys.argv = ['rlhf', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"sys.exit(' '.join(name for name in {SLOW_IMPORTS!r} if name in sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.stderr.splitlines()[-1:] in ([""], []) or result.stderr.startswith("Error: "), result.stderr
    assert not set(result.stderr.split()) & set(SLOW_IMPORTS), result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pp"], "`pp` is no command of `rlhf`. Did you mean `ppo`?"),
        (["xyzzy"], "`xyzzy` is no command of `rlhf`. The commands are quickstart, "),
        (["ppo", "--config", "quickstart/pop.yaml"], "is no file and no shipped configuration. Did you mean `quick"),
        (["ppo", "--config", "nowhere.yaml"], "Shipped are llama3.1_8b/ppo_qlora, "),
        (["ppo", "--config_file", "multi_gpus"], "Did you mean `multi_gpu`?"),
        (["ppo", "--num_processes"], "Argument --num_processes: expected one argument."),
        (["evaluate", "--config", "quickstart/ppo"], "Shipped are llama3.1_8b/evaluate, "),
        (["init", "--harware", "cpu", "x"], "`--harware` is no argument of `rlhf init`. Did you mean `--hardware`?"),
        (["init"], "The following arguments are required: NAME. `rlhf init --help` lists the arguments."),
        (["init", "x", "--hardware", "tpu"], "invalid choice: 'tpu'"),
        (["init", "a: b"], "'a: b' is no name for a project"),
        (["init", "--", "-x"], "'-x' is no name for a project"),
        (["init", "--", "-x", "--model"], "`--model` comes after `--`, where only names are read: leave out `--`."),
        (["init", "x", "--model", "./mine"], "`--model` ./mine does not exist."),
        (["init", "x", "--model", "~/mine"], "`--model` ~/mine does not exist."),
        (["config", "pppo"], "`pppo` is no stage with options. Did you mean `ppo`?"),
        (["config", "quickstart"], "`quickstart` is no stage with options. The stages are sft, "),
    ],
)
def test_a_mistake_is_one_line_with_the_remedy(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as error:
        run(arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_mistake_ends_the_process_with_2(tmp_path):
    result = subprocess.run([*COMMAND, "pp"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "Error: `pp` is no command of `rlhf`. Did you mean `ppo`?\n"


def test_the_overview_has_a_line_for_each_command(capsys):
    run([])
    assert capsys.readouterr().out == overview()
    for name in (*STAGES, *TOOLS):
        assert f"\n  {name} " in overview()
    assert max(map(len, overview().splitlines())) <= 100


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_has_the_options_of_its_recipe(name):
    """The recipe is the oracle: the classes of its one `RecipeParser`."""
    stage = STAGES[name]
    tree = ast.parse((shipped("recipes") / f"{stage.script}.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    parsers = [call.args[0] for call in calls if getattr(call.func, "id", "") == "RecipeParser"]
    if name == "baseline":  # the method chooses one of the classes
        (parsers,) = [
            [node.value]
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and "CONFIGS[" in ast.unparse(node.value)
        ]
    used = [ast.unparse(kind).partition("[")[0] for parser in parsers for kind in parser.elts]
    assert [kind.partition(":")[2] for kind in stage.kinds] == used


@pytest.mark.parametrize("name", [name for name, stage in STAGES.items() if stage.kinds])
def test_the_options_named_in_the_help_exist(name):
    fields = {field for kind in STAGES[name].options() for field in kind.__dataclass_fields__}
    assert set(STAGES[name].used.split()) <= fields
