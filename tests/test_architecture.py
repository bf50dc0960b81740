"""The shape of the code (CONTRIBUTING.md), read from its syntax trees. The repository itself is the oracle."""

import ast
import graphlib
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tolerances
import torch
from huggingface_hub import constants

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "rlhf_recipes"

# The wings, lowest first; those of one row do not know each other. A new wing gets a place here.
ORDER = (
    ("algorithm", "options", "quickstart"),
    ("data", "durability", "models"),
    ("rewards",),
    ("evaluation", "preflight"),
    ("trainers", "tracking"),
    ("comparison",),
    ("command",),
)
RANK = {wing: rank for rank, row in enumerate(ORDER) for wing in row}
FORBIDDEN_STEMS = {"utils", "common", "helpers", "misc"}
MAX_MODULE_LINES, MAX_RECIPE_LINES = 320, 120


def python_files(folder):
    """Every .py below a top-level folder, recursively; those in hidden folders are not ours."""
    paths = (ROOT / folder).rglob("*.py")
    return sorted(p for p in paths if not any(part.startswith(".") for part in p.relative_to(ROOT).parts))


def relative(path):
    return path.relative_to(ROOT).as_posix()


MODULES = [path for path in python_files(PACKAGE) if path.name != "__init__.py"]
RECIPES = python_files("recipes")
TESTS = python_files("tests")

each_library_file = pytest.mark.parametrize("path", python_files(PACKAGE), ids=relative)
each_recipe = pytest.mark.parametrize("path", RECIPES, ids=relative)
# tolerances.py is the one place where they are numbers.
each_test_file = pytest.mark.parametrize("path", [p for p in TESTS if p.name != "tolerances.py"], ids=relative)


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=relative(path))


def imported_names(tree, package):
    """Absolute dotted names imported anywhere in a tree, also inside functions and TYPE_CHECKING blocks.

    `from a import b` yields a.b: whether b is a module is for the caller to say.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def module_name(path):
    """`trainers.ppo` of `rlhf_recipes/trainers/ppo.py`."""
    return ".".join(path.relative_to(ROOT / PACKAGE).with_suffix("").parts)


NAMES = {module_name(path) for path in MODULES}


def internal_imports(tree, package=PACKAGE):
    """The package's own modules that a tree imports; "" for a name of the package or of a wing itself."""
    for name in imported_names(tree, package):
        head, *parts = name.split(".")
        if head == PACKAGE:
            prefixes = (".".join(parts[:end]) for end in (2, 1))
            yield next((prefix for prefix in prefixes if prefix in NAMES), "")


def wrong_imports(module, targets):
    """Those imports of a module that are neither downwards, nor inside its wing, nor of the console."""
    wing = module.partition(".")[0]

    def is_right(target):
        other = target.partition(".")[0]
        return target == "console" or (other in RANK and (other == wing or RANK[other] < RANK.get(wing, -1)))

    return sorted({target for target in targets if not is_right(target)})


def imports_by_module():
    return {module_name(path): set(internal_imports(tree_of(path))) for path in MODULES}


def test_there_is_something_to_check():
    assert len(MODULES) >= 50
    assert len(TESTS) >= 50
    assert len(RECIPES) >= 5


def test_imports_are_recognised_in_every_spelling():
    source = """
import rlhf_recipes.algorithm.kl as k
from rlhf_recipes.algorithm import masked
from rlhf_recipes import console, PPOTrainer
from rlhf_recipes.algorithm.losses import clipped_value_loss
from ..data import loading
from ..models.loading import load_policy
def later():
    from . import rollout
"""
    found = sorted(internal_imports(ast.parse(source), f"{PACKAGE}.trainers"))
    modules = ["algorithm.kl", "algorithm.losses", "algorithm.masked", "console"]
    assert found == ["", *modules, "data.loading", "models.loading", "trainers.rollout"]


def test_the_package_is_its_wings():
    """A new module belongs to a wing, and a new wing to `ORDER`."""
    entries = {path.name for path in (ROOT / PACKAGE).iterdir() if path.name != "__pycache__"}
    assert entries == {*RANK, "__init__.py", "console.py", "py.typed"}
    assert all((ROOT / PACKAGE / wing / "__init__.py").exists() for wing in RANK)


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_between_wings_go_downwards(path):
    module = module_name(path)
    package = ".".join([PACKAGE, *module.split(".")[:-1]])
    wrong = wrong_imports(module, internal_imports(tree_of(path), package))
    assert not wrong, f"{relative(path)} must not import {wrong}: see ORDER"


def test_no_import_goes_round_in_a_circle():
    graphlib.TopologicalSorter(imports_by_module()).prepare()


@pytest.mark.parametrize(
    ("module", "target", "is_wrong"),
    [
        ("algorithm.kl", "trainers.ppo", True),
        ("algorithm.kl", "options.ppo", True),
        ("trainers.ppo", "tracking.store", True),
        ("trainers.ppo", "", True),
        ("console", "options.ppo", True),
        ("trainers.ppo", "trainers.rollout", False),
        ("comparison.report", "algorithm.kl", False),
        ("algorithm.kl", "console", False),
    ],
)
def test_the_rule_of_the_wings(module, target, is_wrong):
    assert bool(wrong_imports(module, [target])) is is_wrong


@pytest.mark.parametrize("path", python_files(f"{PACKAGE}/algorithm"), ids=relative)
def test_formulas_need_torch_and_the_standard_library_only(path):
    allowed = sys.stdlib_module_names | {"torch", PACKAGE}
    assert not {name for name in imported_names(tree_of(path), PACKAGE) if name.split(".")[0] not in allowed}


@each_library_file
def test_the_library_never_imports_recipes_or_tests(path):
    outside = {"recipes", "tests", "oracles", "conftest", "benchmarks"}
    assert not [name for name in imported_names(tree_of(path), PACKAGE) if name.split(".")[0] in outside]


def test_recipes_are_scripts_not_a_package():
    assert not list((ROOT / "recipes").rglob("__init__.py"))
    stems = {path.stem for path in RECIPES}
    for path in RECIPES:
        siblings = {name.split(".")[0] for name in imported_names(tree_of(path), "recipes")} & (stems | {"recipes"})
        # `recipes/evaluate.py` shares its name with a library; importing a sibling is what is forbidden.
        assert not siblings - set(sys.stdlib_module_names), f"{relative(path)} imports {siblings}"


def test_oracles_know_nothing_of_the_library():
    tree = tree_of(ROOT / "tests" / "oracles.py")
    assert {name.split(".")[0] for name in imported_names(tree, "tests")} <= {"math", "fractions"}
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "__import__"]


def test_importing_the_library_does_not_touch_the_network():
    """A fresh interpreter, not told to be offline, imports every module while an audit hook watches the sockets."""
    names = [PACKAGE, *(f"{PACKAGE}.{name}" for name in sorted(NAMES))]
    script = f"""
import importlib, os, sys
for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ.pop(name, None)
seen = []
def watch(event, args):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        seen.append((event, repr(args[-1] if event == "socket.connect" else args[0])))
sys.addaudithook(watch)
for name in {names!r}:
    importlib.import_module(name)
sys.exit(f"network at import: {{seen}}" if seen else 0)
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]


@each_library_file
def test_modules_stay_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_MODULE_LINES


@each_recipe
def test_recipes_stay_short_and_straight(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_RECIPE_LINES
    loops = [node.lineno for node in ast.walk(tree_of(path)) if isinstance(node, (ast.For, ast.AsyncFor, ast.While))]
    assert not loops, f"loops belong in the library: lines {loops}"


@each_recipe
def test_recipes_read_a_split_once(path):
    read = [n.attr for n in ast.walk(tree_of(path)) if isinstance(n, ast.Attribute) and n.attr.endswith("_split")]
    assert len(set(read)) == len(read), "pass on what was loaded"


@pytest.mark.parametrize("folder", [PACKAGE, "recipes", "tests", "benchmarks"])
def test_no_file_is_named_after_nothing(folder):
    named = [p for p in (ROOT / folder).rglob("*") if p.stem.lower() in FORBIDDEN_STEMS]
    assert not [relative(p) for p in named]


@pytest.mark.parametrize("path", python_files(PACKAGE) + RECIPES, ids=relative)
def test_nothing_prints(path):
    calls = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
    printed = [call.lineno for call in calls if getattr(call.func, "id", "") in ("print", "pprint")]
    assert not printed, f"log instead of printing: lines {printed}"


OPTIONS = {"args", "config", "training_args", "trainer_args", "script_args", "model_args", "tracking_args"}


def is_options(node):
    """Whether an expression is called like options; `model.config`, of a network, is none."""
    if isinstance(node, ast.Name):
        return node.id in OPTIONS
    is_own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    return isinstance(node, ast.Attribute) and node.attr in (OPTIONS if is_own else OPTIONS - {"config"})


def written_options(tree):
    """(line, text) of writes to an option outside of `__post_init__`, which completes options as they are made."""
    making = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "__post_init__"]
    allowed = {id(node) for function in making for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
            is_write = is_options(node.value)
        else:
            is_setattr = isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr")
            is_write = is_setattr and is_options(node.args[0])
        if is_write and id(node) not in allowed:
            yield node.lineno, ast.unparse(node)


@pytest.mark.parametrize("path", python_files(PACKAGE) + RECIPES, ids=relative)
def test_options_are_read_and_never_written(path):
    if path.parent != ROOT / PACKAGE / "options":
        assert not list(written_options(tree_of(path))), "use `with_changes`: the user's options stay as they are"


@pytest.mark.parametrize(
    ("source", "is_write"),
    [
        ("args.hub_token = None", True),
        ("self.args.eval_on_start = False", True),
        ("trainer.args.seed += 1", True),
        ("training_args.a, b = 1, 2", True),
        ("del config.report_to", True),
        ("for config.x in []: pass", True),
        ("setattr(args, name, value)", True),
        ("class A:\n def f(self): self.config.x = 1", True),
        ("class A:\n def __post_init__(self): args.x = 1", False),
        ("self.args = with_changes(args)", False),
        ("model.config.use_cache = False", False),
        ("self.beta = args.beta", False),
        ("args['x'] = 1", False),
    ],
)
def test_the_detector_of_written_options(source, is_write):
    assert bool(list(written_options(ast.parse(source)))) is is_write


FORMULA_FUNCTIONS = {
    *("exp", "expm1", "log", "log1p", "log2", "log_softmax", "softmax", "logsumexp", "logsigmoid", "sigmoid"),
    *("softplus", "clamp", "clamp_", "clamp_min", "clamp_max", "clip", "where", "cumsum", "cumprod", "minimum"),
    *("maximum", "max", "min", "sqrt", "rsqrt", "square", "pow", "var", "std", "einsum", "matmul"),
    *("mse_loss", "smooth_l1_loss", "huber_loss"),
}
NUMERIC_MODULES = {"torch", "math", "np", "numpy", "F", "functional"}
# The largest of some counts, and the trainer's `self.log(metrics)`, are no formulas; filling padding is hygiene.
AMBIGUOUS_METHODS = {"log", "max", "min"}


def formulas(tree):
    """(line, text) of calls and operators that compute a formula instead of naming one of algorithm/."""
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Pow, ast.MatMult)):
            yield node.lineno, ast.unparse(node)
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if node.func.attr in FORMULA_FUNCTIONS:
            owner = node.func.value
            numeric_owner = ast.unparse(owner).split(".")[-1] in NUMERIC_MODULES
            reports = node.func.attr == "log" and node.args and not numeric_owner
            counts = node.func.attr in AMBIGUOUS_METHODS - {"log"} and not numeric_owner
            if not (reports or counts):
                yield node.lineno, ast.unparse(node)


@pytest.mark.parametrize("path", python_files(f"{PACKAGE}/trainers") + RECIPES, ids=relative)
def test_trainers_and_recipes_hold_no_formula(path):
    assert not list(formulas(tree_of(path))), "move it to algorithm/, where it has an oracle"


@pytest.mark.parametrize(
    ("source", "is_formula"),
    [
        ("torch.exp(a - b)", True),
        ("(a - b).exp()", True),
        ("torch.nn.functional.logsigmoid(x)", True),
        ("ratio.clamp(0.8, 1.2)", True),
        ("torch.max(a, b)", True),
        ("torch.log(p)", True),
        ("p.log()", True),
        ("(v - r) ** 2", True),
        ("self.log(metrics)", False),
        ("super().log(metrics, start_time)", False),
        ("masked_mean(kl, mask)", False),
        ("lengths.max()", False),
        ("f(**options)", False),
    ],
)
def test_the_formula_detector(source, is_formula):
    assert bool(list(formulas(ast.parse(source)))) is is_formula


TOLERANCE_ARGUMENTS = {"rtol", "atol", "rel", "abs", "rel_tol", "abs_tol"}
# Where the tolerance sits when it has no name: allclose(a, b, rtol, atol), approx(x, rel, abs).
POSITIONAL_TOLERANCES = {"allclose": 2, "isclose": 2, "assert_allclose": 2, "assert_close": 2, "approx": 1}


def has_number(node):
    return any(isinstance(n, ast.Constant) and type(n.value) in (int, float) for n in ast.walk(node))


def literal_tolerances(tree):
    """Lines where a tolerance is written as a number: keyword, position, or dict entry."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            candidates = [k.value for k in node.keywords if k.arg in TOLERANCE_ARGUMENTS]
            candidates += node.args[POSITIONAL_TOLERANCES.get(name, len(node.args)) :]
        elif isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            candidates = [v for k, v in pairs if isinstance(k, ast.Constant) and k.value in TOLERANCE_ARGUMENTS]
        else:
            continue
        # tolerances.EXACT["rtol"] holds a string constant, not a number.
        yield from (value.lineno for value in candidates if has_number(value))


@each_test_file
def test_tolerances_are_named(path):
    lines = list(literal_tolerances(tree_of(path)))
    assert not lines, f"{relative(path)}: use a constant of tests/tolerances.py on lines {lines}"


@pytest.mark.parametrize(
    ("source", "is_literal"),
    [
        ("torch.testing.assert_close(a, b, rtol=1e6, atol=0)", True),
        ("torch.allclose(a, b, 1e-3)", True),
        ("assert_close(a, b, {'rtol': 1e-3, 'atol': 0.0})", True),
        ("pytest.approx(a, abs=-1e-3)", True),
        ("math.isclose(a, b, rel_tol=10 * EPS)", True),
        ("torch.testing.assert_close(a, b, **FP32)", False),
        ("assert_close(a, [[0.5, 1.0]], FP32)", False),
        ("pytest.approx(0.5, **TOLERANCE)", False),
    ],
)
def test_the_tolerance_detector(source, is_literal):
    assert bool(list(literal_tolerances(ast.parse(source)))) is is_literal


@pytest.mark.parametrize("name", tolerances.ALL)
def test_no_tolerance_is_a_blank_cheque(name):
    """A respected repository ships `rtol=1e6`."""
    tolerance = tolerances.ALL[name]
    assert set(tolerance) == {"rtol", "atol"}
    assert 0 <= tolerance["rtol"] <= 0.05
    assert 0 <= tolerance["atol"] <= 0.05


@pytest.mark.parametrize("address", [("192.0.2.1", 80), ("example.invalid", 443)])
def test_the_network_is_blocked(address):
    """192.0.2.0/24 is reserved for documentation, .invalid never resolves: nobody is bothered if the block fails."""
    with pytest.raises(RuntimeError, match="offline"):
        socket.create_connection(address, timeout=1)


def test_loopback_stays_open():
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(("localhost", server.getsockname()[1]), timeout=5).close()


def test_the_hub_is_offline():
    assert constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("repetition", [0, 1])
def test_every_test_starts_from_the_same_seed(repetition):
    assert (torch.initial_seed(), torch.rand(1).item()) == (0, torch.rand(1, generator=torch.manual_seed(0)).item())


@pytest.mark.gpu
def test_the_gpu_marker_implies_a_gpu():
    """Skipped without CUDA; were the skip lost, this would fail."""
    assert torch.cuda.is_available()
