"""What the tests of the documentation share: its pages, the commands on them, and the parsers of the recipes."""

import ast
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import trl

import rlhf_recipes
from rlhf_recipes.options import preferences, reward_model_evaluation
from rlhf_recipes.options import recipes as arguments
from rlhf_recipes.options.baselines import CONFIGS, BaselineArguments

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *RECIPES.glob("*.md"), *(ROOT / "docs").glob("*.md")]
HOMES = (arguments, preferences, reward_model_evaluation, rlhf_recipes, trl)
# Scripts whose parser is built in a module.
PARSED_ELSEWHERE = {RECIPES / "quickstart.py": ROOT / "rlhf_recipes" / "quickstart" / "stages.py"}


def _parser_classes(recipe):
    """Return the classes of the one `RecipeParser((...))` in a recipe."""
    calls = (node for node in ast.walk(ast.parse(recipe.read_text())) if isinstance(node, ast.Call))
    (classes,) = (call.args[0].elts for call in calls if getattr(call.func, "id", "") == "RecipeParser")
    return tuple(next(getattr(home, name.id) for home in HOMES if hasattr(home, name.id)) for name in classes)


PARSERS = {
    path.stem: _parser_classes(path)
    for path in sorted(RECIPES.glob("*.py"))
    if "RecipeParser(" in path.read_text() and path.stem != "baseline"
}
# The method chooses the class of the baselines' options.
_AROUND = (trl.ModelConfig, arguments.TrackingArguments, arguments.PreflightArguments)
PARSERS |= {f"baseline_{method}": (BaselineArguments, config, *_AROUND) for method, config in CONFIGS.items()}
PARSERS["baseline"] = PARSERS["baseline_rloo"]


@dataclass
class Block:
    """Commands of one block of a page.

    Args:
        commands: Words of each command, without comments and without variables in front.
        needs: Hardware, network or cluster: the text of the line `Needs: ...` above it, or the `--hardware` of the
            project that the block begins. Empty without one.
    """

    commands: list[list[str]]
    needs: str = ""


def blocks(page):
    """Return the blocks of shell commands of a page, and as one more block the commands inside of its text."""
    text, found = page.read_text(), []
    for fence in re.finditer(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        above = text[: fence.start()].rstrip("\n").rpartition("\n\n")[2]
        if fence[1] in ("bash", "sh", "shell", "console"):
            said = re.match(r"Needs: (.+)", above) or re.search(r"rlhf init .*--hardware (\S+)", fence[2])
            found.append(Block(commands_of(fence[2]), said[1] if said else ""))
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL).replace("\n", " ")
    spans = re.findall(r"`((?:rlhf|accelerate launch|python|make|pip install) [^`]+)`", text)
    return [*found, Block([words for span in spans for words in commands_of(span)], "named in the text")]


def commands_of(text):
    """Return the words of each command in a text for a shell."""
    lines = text.replace("\\\n", " ").replace("&&", "\n").splitlines()
    words = (shlex.split(line, comments=True) for line in lines)
    bare = ([word for i, word in enumerate(each) if i or not re.match(r"[A-Z_0-9]+=", word)] for each in words)
    return [each for each in bare if each]


def options_of_script(script):
    """Return the options that a script adds to its own parser, read from the source that adds them."""
    script = PARSED_ELSEWHERE.get(script, script)
    nodes = [*ast.walk(ast.parse(script.read_text()))]
    calls = (node for node in nodes if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument")
    added = {call.args[0].value for call in calls if isinstance(call.args[0], ast.Constant)}
    loops = (node for node in nodes if isinstance(node, ast.For) and "add_argument(f" in ast.unparse(node))
    named = {
        target.id: node.value
        for node in nodes
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    lists = (named.get(getattr(loop.iter, "id", ""), loop.iter) for loop in loops)
    return added | {f"--{name.value}" for each in lists for name in ast.walk(each) if isinstance(name, ast.Constant)}
