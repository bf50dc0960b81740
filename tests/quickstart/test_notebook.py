"""The notebook of the quickstart: each cell can be run, and it holds no output."""

import ast
from pathlib import Path

import nbformat
import pytest
from documents import RECIPES, options_of_script
from nbclient import NotebookClient

from rlhf_recipes.command.stages import STAGES

NOTEBOOK = Path(__file__).parents[2] / "notebooks/quickstart.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def _code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_it_is_valid_and_holds_no_output(notebook):
    nbformat.validate(notebook)
    assert len(_code(notebook)) >= 5
    assert all(cell.outputs == [] and cell.execution_count is None for cell in _code(notebook))


def test_its_commands_are_those_of_rlhf(notebook):
    nodes = [node for cell in _code(notebook) for node in ast.walk(ast.parse(cell.source))]
    calls = [[ast.literal_eval(word) for word in node.args] for node in nodes if _is_command(node)]
    assert calls
    for name, *options in calls:
        script = RECIPES / f"{STAGES[name].script}.py"
        assert {option for option in options if option.startswith("--")} <= options_of_script(script)


def _is_command(node):
    return isinstance(node, ast.Call) and getattr(node.func, "id", "") == "rlhf"


@pytest.mark.slow  # runs the quickstart, for minutes; `test_the_notebook_shows_a_run` runs the cells without it
@pytest.mark.timeout(3600)
def test_it_runs_from_its_first_cell_to_its_last(notebook, tmp_path):
    NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in _code(notebook) for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert any("Win rate over SFT by the gold score: 0." in output.get("text", "") for output in outputs)
