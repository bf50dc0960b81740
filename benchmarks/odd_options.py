"""Check that odd options end well: run every recipe with values that are wrong, out of range or contradictory.

    python benchmarks/odd_options.py
    python benchmarks/odd_options.py --count 40 --seed 3 --recipes sft ppo

Options and values are drawn from the dataclasses of the recipes, for the command line and for YAML. Each line runs its
recipe in a process of its own, on tiny models, for two steps. A line is right if it is refused by one message that
names an option of the line, or if the run ends with finite weights that differ from the first ones. Exits with 1 if a
line ends in a traceback, in a refusal without the name, in no training, or not at all. Prints the lines that did.
"""

import argparse
import dataclasses
import enum
import json
import math
import os
import random
import re
import resource
import runpy
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
import trl
import uvicorn
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import tiny  # noqa: E402
from tracked_experiments import learning_curves, log_ppo_run  # noqa: E402

from rlhf_recipes.options import recipes as arguments  # noqa: E402
from rlhf_recipes.options.baselines import CONFIGS, BaselineArguments  # noqa: E402
from rlhf_recipes.options.ppo import PPOConfig  # noqa: E402
from rlhf_recipes.options.reward_modeling import RewardModelConfig  # noqa: E402
from rlhf_recipes.trainers import baselines, ppo, reward_modeling, sft  # noqa: E402, F401 (a fork then has them)

_AROUND = (trl.ModelConfig, arguments.TrackingArguments, arguments.PreflightArguments)
CLASSES: dict[str, tuple[Any, ...]] = {
    "sft": (trl.ScriptArguments, trl.SFTConfig, arguments.BoundaryArguments, *_AROUND),
    "reward_modeling": (trl.ScriptArguments, RewardModelConfig, *_AROUND),
    "ppo": (arguments.PPOArguments, PPOConfig, *_AROUND),
    **{f"baseline {method}": (BaselineArguments, config, *_AROUND) for method, config in CONFIGS.items()},
    "evaluate": (arguments.EvaluationArguments, trl.ModelConfig, arguments.TrackingArguments),
    "export": (arguments.ExportArguments, trl.ModelConfig),
    "compare": (arguments.ComparisonArguments,),
    "serve_reward_model": (arguments.ServeArguments, trl.ModelConfig),
}
TRAINED = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True, "max_steps": 2}
TRAINED |= {"per_device_train_batch_size": 4, "save_strategy": "no", "logging_steps": 1, "learning_rate": 1e-3}
SAMPLED = {"max_completion_length": 8, "reward_functions": ["tiny:length_reward"]}
BASE: dict[str, dict[str, Any]] = {
    "sft": {"model_name_or_path": "policy", "dataset_name": "demonstrations", **TRAINED},
    "reward_modeling": {"model_name_or_path": "policy", "dataset_name": "preferences", **TRAINED},
    "ppo": {"model_name_or_path": "policy", "dataset_name": "prompts", "check_numerics": False, **TRAINED, **SAMPLED},
    "baseline rloo": {"model_name_or_path": "policy", "dataset_name": "prompts", **TRAINED, **SAMPLED},
    "baseline grpo": {"model_name_or_path": "policy", "dataset_name": "prompts", **TRAINED, **SAMPLED},
    "baseline dpo": {"model_name_or_path": "policy", "dataset_name": "preferences", **TRAINED},
    "evaluate": {
        **{"model_name_or_path": "policy", "baseline_path": "policy", "dataset_name": "prompts"},
        **{"judge_functions": ["tiny:length_reward"], "max_completion_length": 8, "num_prompts": 4},
    },
    "export": {"model_name_or_path": "policy"},
    "compare": {"experiment": "odd", "tracking_uri": "sqlite:///mlflow.db"},
    "serve_reward_model": {"model_name_or_path": "reward_model"},
}
for _method in ("rloo", "grpo"):
    BASE[f"baseline {_method}"] |= {"num_generations": 2}
for _stage in ("sft", "reward_modeling", "ppo", "baseline rloo", "baseline grpo", "baseline dpo", "evaluate"):
    BASE[_stage] |= {"tracking": False}
BASE["baseline dpo"] |= {"reward_functions": ["tiny:length_reward"], "max_completion_length": 8}

NUMBERS = [-1, 0, 1, 2, 0.5, -0.5, 1.5, math.nan, math.inf, -math.inf, 10**12, 2**64, 1e-30, -(10**9)]
TEXTS = ["", "nonsense", "ünï-çödé", "0", "null", "x" * 300, "{bad", "a\nb", "1e-3"]
OTHERS = [None, True, False, [], ["nonsense"], [None], {}, {"nonsense": 1}, [[1]], [math.nan]]
PAIRS = [
    {"load_in_4bit": True, "load_in_8bit": True},
    {"fp16": True, "bf16": True},
    {"generation_batch_size": 8, "steps_per_generation": 2},
    {"early_stopping_patience": 2},
    {"load_best_model_at_end": True},
    {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2}
    | {"save_steps": 3},
    {"registered_model_alias": "a"},
    {"critic": "reward", "vf_coef": 0.5},
    {"critic_epochs": 3},
    {"kl_controller": "adaptive", "kl_coef": 0.0},
    {"best_of": [2]},
    {"lr_scheduler_type": "cosine_with_min_lr"},
    {"lr_scheduler_type": "reduce_lr_on_plateau"},
    {"dataloader_prefetch_factor": 2},
    {"dataloader_persistent_workers": True},
    {"use_peft": True, "lora_target_modules": ["nonsense"]},
    {"use_peft": True, "lora_target_modules": "all-linear", "lora_alpha": 0},
    {"use_peft": True, "lora_task_type": "nonsense"},
    {"packing": True, "max_length": None},
    {"optim_args": "nonsense"},
    {"optim": "galore_adamw"},
    {"num_generations": 3},
]  # fmt: skip
# Huge values of these are a long run, a long wait or a large model, as asked for.
MAY_BE_LONG = {
    *("max_steps", "num_train_epochs", "num_iterations", "critic_epochs", "gradient_accumulation_steps"),
    *("steps_per_generation", "num_samples", "max_completion_length", "num_generations", "num_generations_eval"),
    *("max_tool_calling_iterations", "dataloader_prefetch_factor", "max_waiting", "generation_batch_size"),
}
# With these, weights may stay the same on purpose.
MAY_STAND_STILL = re.compile(
    r"learning_rate|temperature|warmup|lr_scheduler|optim|adam|max_grad_norm|weight|coef|epsilon|dtype|beta"
)
# These leave the machine, start other programs, or compile for minutes.
LEFT_OUT = {
    "push_to_hub",
    "torch_compile",
    "torch_compile_mode",
    "torch_compile_backend",
    "deepspeed",
    "report_to",
    "trackio_space_id",
    "trackio_static_space_id",
    "config",
}


@dataclasses.dataclass
class Line:
    """One odd line of a recipe: options by name, and whether they come from a YAML file."""

    recipe: str
    options: dict[str, Any]
    is_yaml: bool
    extra: str = ""  # a line of YAML, as it is

    def __str__(self) -> str:
        """Return the line as a reader would write it."""
        return f"{self.recipe} {'yaml' if self.is_yaml else 'line'} {self.options} {self.extra!r}"


def _hints(recipe: str) -> dict[str, Any]:
    own = [{f.name: get_type_hints(kind)[f.name] for f in dataclasses.fields(kind)} for kind in CLASSES[recipe]]
    return {name: hint for hints in own for name, hint in hints.items() if name not in LEFT_OUT}


def _values(hint: Any, draw: random.Random) -> Any:
    """Draw a value: half of the time one of the option's own kind."""
    choices = [choice for kind in (hint, *get_args(hint)) for choice in _choices(kind)]
    is_number = any(kind in (int, float) for kind in (hint, *get_args(hint)))
    own = choices or (NUMBERS if is_number else TEXTS)
    return draw.choice(own if draw.random() < 0.6 else NUMBERS + TEXTS + OTHERS)


def _choices(kind: Any) -> list[Any]:
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return [choice.value for choice in kind]
    return [True, False] if kind is bool else [value for value in get_args(kind) if isinstance(value, str)]


def drawn_lines(count: int, seed: int, recipes: list[str]) -> Iterator[Line]:
    """Yield odd lines, each recipe in turn."""
    draw = random.Random(seed)
    for number in range(count):
        recipe = recipes[number % len(recipes)]
        hints = _hints(recipe)
        kind = draw.random()
        if kind < 0.08:
            name = draw.choice(sorted(hints))
            cut = draw.randrange(len(name))
            yield Line(recipe, {name[:cut] + name[cut + 1 :] + draw.choice("xyz"): 1}, draw.random() < 0.5)
        elif kind < 0.12:
            name = draw.choice(sorted(hints))
            yield Line(
                recipe, {}, True, extra=draw.choice([f"{name}: 1\n{name}: 2\n", f"{name}: [1\n", "- 1\n", "1: 2\n"])
            )
        elif kind < 0.25 and (pairs := [pair for pair in PAIRS if pair.keys() <= hints.keys()]):
            yield Line(recipe, dict(draw.choice(pairs)), draw.random() < 0.5)
        else:
            names = draw.sample(sorted(hints), draw.choice([1, 1, 1, 2]))
            options = {name: _values(hints[name], draw) for name in names}
            if not any(_is_long(name, value) for name, value in options.items()):
                yield Line(recipe, options, draw.random() < 0.5)


def _is_long(name: str, value: Any) -> bool:
    return name in MAY_BE_LONG and isinstance(value, int | float) and value > 1000


def write_world(folder: Path) -> None:
    """Write tiny models and data, and the record of a run."""
    tok = tiny.tokenizer()
    tiny.save(tiny.policy(tok), folder / "policy")
    tiny.reward_trainer(folder / "reward_model", tiny.reward_model(tok)).save_model()
    tiny.write_splits(tiny.prompts(count=16), folder / "prompts")
    tiny.write_splits(tiny.preferences(count=16), folder / "preferences")
    pairs = tiny.preferences(count=16)
    tiny.write_splits(
        pairs.rename_column("chosen", "completion").remove_columns("rejected"), folder / "demonstrations"
    )
    log_ppo_run(f"sqlite:///{folder}/mlflow.db", "odd", learning_curves(0, points=4), {})


def _in_fork(work: Any, log: Path, seconds: float) -> int | None:
    """Return the exit code of a function that runs in a process of its own; `None` if the time was over."""
    child = os.fork()
    if child == 0:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30, 16 * 2**30))
        code = 1
        try:
            work()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _arguments(line: Line, out: str) -> list[str]:
    """Return the command line: the usual options in a YAML file, and the odd ones there or on the line."""
    recipe, _, method = line.recipe.partition(" ")
    takes_dir = any("output_dir" in kind.__dataclass_fields__ for kind in CLASSES[line.recipe])
    usual = BASE[line.recipe] | ({"output_dir": out} if takes_dir else {})
    own = usual | (line.options if line.is_yaml else {})
    file = Path(f"{recipe}.yaml")
    file.write_text(yaml.safe_dump(own, allow_unicode=True) + line.extra, encoding="utf-8")
    odd = []
    for name, value in ({} if line.is_yaml else line.options).items():
        entries = value if isinstance(value, list) else [value]
        texts = [json.dumps(entry) if isinstance(entry, dict | list) else str(entry) for entry in entries]
        odd += [f"--{name}", *texts]
    return [*(["--method", method] if method else []), "--config", str(file), *odd]


def _run(line: Line, folder: Path, out: str) -> None:
    os.chdir(folder)
    sys.argv = [f"{line.recipe.split()[0]}.py", *_arguments(line, out)]
    uvicorn.run = lambda *args, **kwargs: None  # else a right line would serve for ever
    runpy.run_path(str(ROOT / "recipes" / sys.argv[0]), run_name="__main__")


def outcome(line: Line, folder: Path, seconds: float) -> tuple[str, str]:
    """Run a line, and return how it ended and the last lines that it printed."""
    out, log = f"out-{os.urandom(4).hex()}", folder / "log"
    code = _in_fork(lambda: _run(line, folder, out), log, seconds)
    text = log.read_text(encoding="utf-8", errors="replace")
    tail = "\n".join(text.strip().splitlines()[-4:])[-900:]
    if code is None:
        return "hang", tail
    if code == 0:
        return _trained(line, folder, folder / out)
    if "Traceback" in text or code < 0:
        return "traceback", tail
    refusal = text[text.rfind("Error:") :]
    words = set(re.findall(r"\w+", refusal)) if "Error:" in text else set()
    names = set(line.options) | set(re.findall(r"^(\w+):", line.extra, re.MULTILINE))
    names |= {"config"} if line.extra else set()
    is_named = bool(names & words) or any(f"--{name}" in refusal for name in names)
    return ("refused" if is_named else "refused without a name"), tail


def _trained(line: Line, world: Path, out: Path) -> tuple[str, str]:
    """Return whether a run that ended without an error has trained."""
    if (
        "max_steps" not in BASE[line.recipe]
        or "output_dir" in line.options
        or line.options.get("preflight_only") not in (None, False)
    ):
        return "accepted", ""
    folder = next(iter(out.glob("*.safetensors")), None)
    if folder is None:
        return "not trained", f"{out} holds no weights"
    weights = {name: weight for file in out.glob("*.safetensors") for name, weight in load_file(file).items()}
    if not all(weight.isfinite().all() for weight in weights.values() if weight.is_floating_point()):
        return "not trained", "weights are not finite"
    first = load_file(world / "policy" / "model.safetensors")
    moved = [name for name in weights if name not in first or not torch.equal(weights[name], first[name])]
    is_adapter = any("lora_B" in name and weight.any() for name, weight in weights.items())
    if not any(map(MAY_STAND_STILL.search, line.options)) and not (is_adapter if "lora_B" in str(weights) else moved):
        return "not trained", "no weight has changed"
    return "trained", ""


def main() -> None:
    """Run the lines, print what is wrong and a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=330, help="number of lines")
    parser.add_argument("--seed", type=int, default=0, help="seed of the lines")
    parser.add_argument("--recipes", nargs="+", default=[*CLASSES], choices=CLASSES, help="recipes to run")
    parser.add_argument("--seconds", type=float, default=120, help="deadline of one line")
    args = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", MLFLOW_DISABLE_TELEMETRY="true", TOKENIZERS_PARALLELISM="false")
    torch.set_num_threads(1)
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if _in_fork(lambda: write_world(folder), folder / "log", 300) != 0:
            sys.exit((folder / "log").read_text())
        for line in drawn_lines(args.count, args.seed, args.recipes):
            end, text = outcome(line, folder, args.seconds)
            found[end] += 1
            if end not in ("refused", "trained", "accepted"):
                print(f"{end.upper()}: {line}\n{text}\n", flush=True)
    print(f"{found.total()} lines: {dict(found)}")
    sys.exit(int(any(found[end] for end in found.keys() - {"refused", "trained", "accepted"})))


if __name__ == "__main__":
    main()
