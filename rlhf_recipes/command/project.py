"""`rlhf init`: a project with data, a configuration per stage, and the next command.

rlhf init my_project
rlhf init my_project --model Qwen/Qwen2.5-1.5B-Instruct --hardware gpu
"""

import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rlhf_recipes.command.arguments import ArgumentParser
from rlhf_recipes.command.mistakes import UsageError
from rlhf_recipes.command.plan import HARDWARE, Plan, plan
from rlhf_recipes.options.spelling import directory_meant

TEMPLATES = Path(__file__).with_name("templates")
# Question, better answer, worse answer.
EXAMPLES = {
    "train": (
        ("How long do I boil an egg?", "Six minutes for a soft yolk, ten for a hard one.", "It depends on the egg."),
        ("Which planet is the largest?", "Jupiter is the largest planet.", "There are eight planets, I think."),
        ("What does 3 + 4 * 2 give?", "11, because the product comes first.", "14."),
    ),
    "test": (
        ("How many legs has a spider?", "A spider has eight legs.", "Spiders have many legs."),
        ("Why is the sky blue?", "Air scatters blue light more than red light.", "Because it is blue."),
        ("What is water made of?", "Water is made of hydrogen and oxygen.", "Water is wet."),
    ),
}


def main(arguments: Sequence[str]) -> None:
    """Write a project, and say what to do next."""
    parser = ArgumentParser("init", "Write a project: data, a configuration per stage, and the next command.")
    parser.add_argument("name", metavar="NAME", help="directory of the project; it must not exist, or be empty")
    parser.add_argument("--model", help="name or path of the model to start from (default: fits the hardware)")
    parser.add_argument("--hardware", choices=HARDWARE, default="cpu", help="where it trains (default: cpu)")
    asked = parser.parse_args(arguments)
    directory = Path(asked.name)
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise UsageError(f"{directory} exists already. `rlhf init` overwrites nothing: choose another name.")
    name = directory.resolve().name
    if not re.fullmatch(r"[\w.][\w.-]*", name):  # a command would take one that begins with `-` for an option
        raise UsageError(
            f"{name!r} is no name for a project: use letters, digits, `.`, `_` and `-`, and no `-` at its beginning."
        )
    model = _model(asked.model) if asked.model else HARDWARE[asked.hardware]
    project = plan(name, model, asked.hardware)
    try:
        write(project, directory)
    except OSError as error:
        raise UsageError(f"{directory} cannot be written: {error}") from error
    sys.stdout.write(
        f"{directory} is a project for {model} ({project.size_text}) on {asked.hardware}.\n"
        f"Next: put your rows into {directory / 'data'}, then\n"
        f"  cd {directory} && rlhf sft {project.launch}--config sft.yaml\n"
        "README.md there has all steps.\n"
    )


def _model(given: str) -> str:
    """Return the full path of a directory with a model, because the stages run inside the project, or a Hub name."""
    path = Path(given).expanduser()
    if not path.exists():
        if given.startswith((".", "/", "~")):
            raise UsageError(f"`--model` {given} does not exist.{directory_meant(given)}")
        return given
    if (path / "config.json").is_file():
        return os.path.abspath(path)
    if (path / "adapter_config.json").is_file():
        raise UsageError(
            f"`--model` {given} is an adapter, and a project starts from a whole model: `rlhf export` makes one of it."
        )
    inner = [str(file.parent) for file in sorted(path.glob("*/config.json"))]
    hint = f" Did you mean `{inner[0]}`?" if inner else " Name a directory that `save_pretrained` has written."
    raise UsageError(f"`--model` {given} holds no model: there is no `config.json` in it.{hint}")


def write(project: Plan, directory: Path) -> None:
    """Write the data and all files of the templates."""
    templates = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    for file in sorted(TEMPLATES.glob("*.jinja")):
        text = templates.get_template(file.name).render(plan=project)
        _write(directory / file.stem, text)
    for split, examples in EXAMPLES.items():
        for name, rows in _rows(examples).items():
            lines = (json.dumps(row) + "\n" for row in rows)
            _write(directory / "data" / name / f"{split}.jsonl", "".join(lines))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("x", encoding="utf-8") as file:  # fails if the file exists
        file.write(text)


def _rows(examples: Sequence[tuple[str, str, str]]) -> dict[str, list[dict[str, list[dict[str, str]]]]]:
    asked = [[{"role": "user", "content": question}] for question, _, _ in examples]
    better = [[{"role": "assistant", "content": answer}] for _, answer, _ in examples]
    worse = [[{"role": "assistant", "content": answer}] for _, _, answer in examples]
    return {
        "demonstrations": [{"prompt": p, "completion": b} for p, b in zip(asked, better, strict=True)],
        "preferences": [
            {"prompt": p, "chosen": b, "rejected": w} for p, b, w in zip(asked, better, worse, strict=True)
        ],
        "prompts": [{"prompt": p} for p in asked],
    }
