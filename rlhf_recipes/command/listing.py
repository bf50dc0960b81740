"""`rlhf config`: the options of a stage by topic; and the short help of a stage.

rlhf config ppo
rlhf config ppo --search kl
rlhf config baseline --method dpo
"""

import os
import sys
import textwrap
from collections.abc import Iterable, Sequence
from itertools import groupby

from rlhf_recipes.command.arguments import ArgumentParser
from rlhf_recipes.command.mistakes import UsageError
from rlhf_recipes.command.stages import STAGES, Stage
from rlhf_recipes.command.topics import Option, options_of
from rlhf_recipes.options.shipped import shipped_configurations
from rlhf_recipes.options.spelling import did_you_mean

WIDTH = 100


def main(arguments: Sequence[str]) -> None:
    """Print all options of a stage, or those that a word finds."""
    listed = {name: stage for name, stage in STAGES.items() if stage.kinds}
    parser = ArgumentParser("config", "List the options of a stage by topic, with default, type and meaning.")
    parser.add_argument("stage", metavar="STAGE", help=", ".join(listed))
    parser.add_argument("--search", metavar="WORD", help="only options with this word in their name or meaning")
    parser.add_argument("--method", choices=("rloo", "grpo", "dpo"), default="rloo", help="method of `baseline`")
    asked = parser.parse_args(arguments)
    name = asked.stage.replace("_", "-")
    if name not in listed:
        remedy = did_you_mean(name, listed, f"The stages are {', '.join(listed)}.")
        raise UsageError(f"`{asked.stage}` is no stage with options.{remedy}")
    options = options_of(listed[name].options(asked.method))
    _print(listing(name, options if asked.search is None else _search(options, asked.search)))


def _print(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # `rlhf config ppo | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes the rest at its end


def _search(options: Sequence[Option], word: str) -> list[Option]:
    matching = [option for option in options if word.lower() in f"{option.name} {option.help} {option.topic}".lower()]
    if not matching:
        raise UsageError(f"No option has {word!r} in it.{did_you_mean(word, [option.name for option in options])}")
    return matching


def listing(name: str, options: Sequence[Option]) -> str:
    """Return the options as text, in the order given."""
    head = (
        f"{len(options)} options of `rlhf {name}` with their defaults. Write `name: value` into the file of "
        "`--config`, or `--name value` on the command line, which overrides the file."
    )
    lines = textwrap.wrap(head, WIDTH)
    for owner, owned in groupby(options, lambda option: option.owner):
        lines += ["", f"Options of {owner}".upper()]
        for topic, rows in groupby(owned, lambda option: option.topic):
            lines += ["", topic, *(line for row in rows for line in _described(row))]
    return "\n".join(lines) + "\n"


def _described(option: Option) -> Iterable[str]:
    head = f"{option.name}: {option.default}  ({option.kind})"
    yield from textwrap.wrap(head, WIDTH, initial_indent=" " * 2, subsequent_indent=" " * 10)
    yield from textwrap.wrap(option.help, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)


def print_help(name: str, stage: Stage) -> None:
    """Print what a stage does, its most used options, and where the others are."""
    known = {option.name: option for option in options_of(stage.options())}
    configurations = ", ".join(shipped_configurations(stage.script)) or "none"
    launcher = " [--config_file FILE] [--num_processes N]" if stage.launched else ""
    lines = [
        f"rlhf {name}{launcher} [--config FILE] [--OPTION VALUE ...]",
        "",
        stage.purpose,
        "",
        *textwrap.wrap(f"FILE of --config is a path or a shipped configuration: {configurations}.", WIDTH),
        *(["FILE of --config_file is a path or a shipped file of accelerate, such as multi_gpu."] if launcher else []),
        "",
        "The most used options:",
        *(line for used in stage.used.split() for line in _described(known[used])),
        "",
        f"All {len(known)} options: rlhf config {name}",
    ]
    sys.stdout.write("\n".join(lines) + "\n")
