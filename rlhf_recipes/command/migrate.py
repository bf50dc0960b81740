"""`rlhf migrate`: rewrite a configuration of TRL 1.12's PPO for `rlhf ppo`.

rlhf migrate old.yaml
rlhf migrate old.sh --num_processes 4 --output my_ppo.yaml
"""

import math
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rlhf_recipes.command.arguments import ArgumentParser
from rlhf_recipes.command.migration import IN_ROLLOUTS, KEPT, OTHER_RULES, RULES
from rlhf_recipes.command.mistakes import UsageError
from rlhf_recipes.command.stages import STAGES

# transformers' defaults in TRL 1.12.
_BATCH, _EPOCHS = 8, 3.0
_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")
_COUNTED = ("num_mini_batches", "total_episodes", "per_device_train_batch_size", "gradient_accumulation_steps")
# A name that this version spells differently, or a number that several old options give.
_ELSEWHERE = {*_COUNTED, "num_train_epochs", "max_steps", "num_ppo_epochs", *IN_ROLLOUTS}


@dataclass(frozen=True)
class Batches:
    """How TRL 1.12 cut a rollout, and how this library does the same.

    Args:
        rows: Completions of a micro-batch, per process.
        micro_batches: Micro-batches of a rollout, per process.
        per_step: Micro-batches of an optimiser step.
        epochs: Passes over a rollout.
        rollout: Completions of a rollout, over all processes.
        is_exact: Whether an optimiser step of TRL 1.12 never reached into the next pass.
    """

    rows: int
    micro_batches: int
    per_step: int
    epochs: int
    rollout: int
    is_exact: bool

    @property
    def steps(self) -> int:
        """Return the optimiser steps of a rollout."""
        return self.epochs * self.micro_batches // self.per_step


@dataclass
class Migration:
    """The new configuration, and what a user must know about it.

    Args:
        options: Options by name.
        reasons: Comments by option.
        notes: Sentences about options that changed or have no counterpart.
    """

    options: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def main(arguments: Sequence[str]) -> None:
    """Write the new configuration, and print the notes."""
    parser = ArgumentParser("migrate", "Rewrite a configuration of TRL 1.12's PPO for `rlhf ppo`.")
    parser.add_argument("old", metavar="OLD", help="a YAML file, or a script with the command of TRL's ppo.py")
    parser.add_argument("--output", default="ppo.yaml", help="file to write; it must not exist (default: ppo.yaml)")
    parser.add_argument("--num_processes", type=int, help="GPUs that the old run used (default: as in OLD, or 1)")
    asked = parser.parse_args(arguments)
    old, processes = read_old(asked.old)
    processes = processes if asked.num_processes is None else asked.num_processes
    if processes < 1:
        raise UsageError(f"`--num_processes` {processes} is no number of processes: it must be at least 1.")
    migration = migrate(old, processes, known_options())
    try:
        with Path(asked.output).open("x", encoding="utf-8") as file:
            file.write(text_of(migration, asked.old, asked.output))
    except FileExistsError as error:
        raise UsageError(f"`--output` {asked.output} exists already. Name another file.") from error
    except OSError as error:
        raise UsageError(f"`--output` {asked.output} cannot be written: {error}") from error
    sys.stdout.write("".join(f"- {note}\n" for note in migration.notes))
    sys.stdout.write(f"\n{asked.output} is written. Next:\n  rlhf ppo --config {asked.output} --preflight_only true\n")


def known_options() -> set[str]:
    """Return the names of the options of `rlhf ppo`, whose import takes seconds."""
    return {name for kind in STAGES["ppo"].options() for name in getattr(kind, "__dataclass_fields__", {})}


def read_old(path: str) -> tuple[dict[str, Any], int]:
    """Return the options of a YAML file or of a script, and the number of processes that the script names.

    Raises:
        UsageError: If the file cannot be read, or holds no options.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        if Path(path).suffix in (".yaml", ".yml", ".json"):
            options, processes = yaml.safe_load(text), 1
        else:
            options, processes = _of_command(shlex.split(text.replace("\\\n", " "), comments=True))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(options, dict) or not options:
        raise UsageError(f"{path} holds no options: give a YAML file, or a script with `ppo.py --learning_rate ...`.")
    return {str(name).replace("-", "_"): _number(value) for name, value in options.items()}, processes


def _number(value: Any) -> Any:
    """Return a number that YAML takes for a text, such as 3e-6."""
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def _of_command(words: list[str]) -> tuple[dict[str, Any], int]:
    """Return the options behind the first word that ends with `.py`, and accelerate's number of processes."""
    start = next((place for place, word in enumerate(words) if word.endswith(".py")), -1)
    launcher = _pairs(words[: max(start, 0)])
    return _pairs(words[start + 1 :]), int(launcher.get("num_processes", 1))


def _pairs(words: list[str]) -> dict[str, Any]:
    found: dict[str, list[str]] = {}
    name = None
    for word in words:
        if word.startswith("--"):
            name, mark, value = word[2:].replace("-", "_").partition("=")
            found[name] = [value] if mark else []
        elif name is not None:
            found[name].append(word)
    values = {name: [_value(word) for word in given] for name, given in found.items()}
    return {name: given[0] if len(given) == 1 else given or True for name, given in values.items()}


def _value(word: str) -> Any:
    """Return a word of a command as a number, a truth value or a mapping; any other text stays, also with a `#`."""
    parsed = yaml.safe_load(word) if "#" not in word else word
    return parsed if isinstance(parsed, int | float) or word[:1] in ("{", "[") else word


def batches_of(old: Mapping[str, Any], processes: int) -> Batches:
    """Return how the rollouts of an old configuration are cut.

    TRL 1.12 samples `per_device_train_batch_size * gradient_accumulation_steps` completions per process. It cuts them
    into `num_mini_batches`, and these into micro-batches. But accelerate makes a step after
    `gradient_accumulation_steps` micro-batches, whatever a mini-batch is. With at most as many mini-batches as
    accumulated micro-batches, a pass over the rollout is one optimiser step.

    Raises:
        UsageError: If a number is not positive, or a rollout cannot be cut into so many mini-batches.
    """
    rows = _count(old, "per_device_train_batch_size", _BATCH)
    accumulated = _count(old, "gradient_accumulation_steps", 1)
    mini_batches, epochs = _count(old, "num_mini_batches", 1), _count(old, "num_ppo_epochs", 4)
    if rows * accumulated % mini_batches:
        raise UsageError(
            f"`num_mini_batches` {mini_batches} does not divide the {rows * accumulated} completions of a rollout "
            "(`per_device_train_batch_size` x `gradient_accumulation_steps`). TRL 1.12 refuses this, too."
        )
    of_mini_batch = rows * accumulated // mini_batches
    cut = min(rows, of_mini_batch)
    micro_batches = rows * accumulated // cut
    per_step = max(n for n in range(1, min(accumulated, micro_batches) + 1) if micro_batches % n == 0)
    is_exact = accumulated % mini_batches == 0 or mini_batches % accumulated == 0
    return Batches(cut, micro_batches, per_step, epochs, rows * accumulated * processes, is_exact)


def _count(old: Mapping[str, Any], name: str, default: int) -> int:
    value = old.get(name, default)
    if not isinstance(value, int) or value < 1:
        raise UsageError(f"`{name}` {value} must be a whole number of at least 1.")
    return value


def migrate(old: Mapping[str, Any], processes: int, known: set[str]) -> Migration:
    """Return the configuration that does what an old one did.

    Args:
        old: Options of TRL 1.12's script.
        processes: Number of processes of the old run.
        known: Names of the options of `rlhf ppo`.
    """
    new, rules = Migration(), RULES | OTHER_RULES
    defaults = {name: rule.default for name, rule in rules.items() if rule.default is not None}
    for name, value in {**defaults, **old}.items():
        if name in _ELSEWHERE:
            continue
        rule = rules.get(name)
        target = name if rule is None else rule.new
        if target is not None and target in known:
            new.options[target] = value
            new.reasons[target] = _reason(name, target, is_given=name in old)
            if rule is not None and rule.note and name in old:
                new.notes.append(f"`{name}`{'' if name == target else f' is `{target}`'}: {rule.note}")
        elif name in old:
            new.notes.append(f"`{name}` has no counterpart. {'' if rule is None else rule.note}".rstrip())
    for name, (value, reason) in KEPT.items():
        new.options[name], new.reasons[name] = value, reason
    _add_batches(new, old, batches_of(old, processes), processes)
    return new


def _reason(old: str, new: str, *, is_given: bool) -> str:
    renamed = f"`{old}` in TRL 1.12" if old != new else ""
    default = "" if is_given else "its default" if renamed else "the default of TRL 1.12"
    return ", ".join(part for part in (renamed, default) if part)


def _add_batches(new: Migration, old: Mapping[str, Any], batches: Batches, processes: int) -> None:
    """Add the batch sizes, the length of the run, and what TRL 1.12 counted in rollouts."""
    new.options |= {
        "per_device_train_batch_size": batches.rows,
        "steps_per_generation": batches.micro_batches,
        "gradient_accumulation_steps": batches.per_step,
        "num_iterations": batches.epochs,
    }
    new.reasons["steps_per_generation"] = (
        f"completions of a rollout: {batches.rollout:,}, of {processes} process{'' if processes == 1 else 'es'}"
    )
    new.reasons["gradient_accumulation_steps"] = f"optimiser steps per rollout: {batches.steps}"
    if (episodes := old.get("total_episodes")) is not None:
        rollouts = math.ceil(_count(old, "total_episodes", 1) / batches.rollout)
        new.options["max_steps"] = rollouts * batches.steps
        new.reasons["max_steps"] = f"{rollouts:,} rollouts: `total_episodes` {episodes:,} / {batches.rollout:,}"
    else:
        new.options["num_train_epochs"] = old.get("num_train_epochs", _EPOCHS)
    for name in IN_ROLLOUTS:
        if (value := old.get(name)) is not None and isinstance(value, int | float):
            new.options[name] = value if value < 1 else round(value * batches.steps)
            new.reasons[name] = "" if value < 1 else f"{value:g} rollouts; counted in optimiser steps here"
    _note_batches(new, old, batches)


def _note_batches(new: Migration, old: Mapping[str, Any], batches: Batches) -> None:
    asked, made = old.get("num_mini_batches", 1), batches.steps // batches.epochs
    if not batches.is_exact:
        new.notes.append(
            "`num_mini_batches` and `gradient_accumulation_steps`: neither divides the other, so an optimiser step of "
            f"TRL 1.12 reached into the next pass over the rollout. Optimiser steps of a pass here: {made}."
        )
    elif asked > made:
        new.notes.append(
            f"`num_mini_batches` is {asked}, but a pass over a rollout had fewer optimiser steps ({made}), because "
            f"TRL 1.12 accumulated over the mini-batches. The new file does the same. For {asked} steps divide "
            f"`gradient_accumulation_steps` by {asked // made}, and multiply by it what counts steps (`max_steps`)."
        )
    new.notes.append(
        "The critic is a head on the policy's own states. TRL 1.12 trained a value model of its own, from the reward "
        "model. `critic: reward` reads the reward model's states."
    )


def text_of(migration: Migration, source: str, output: str) -> str:
    """Return the YAML file, with a comment at each option that is not as it was."""
    lines = [
        f"# PPO, rewritten from {Path(source).name} of TRL 1.12 by `rlhf migrate`.",
        f"# rlhf ppo --config {output}",
    ]
    for name, value in migration.options.items():
        written = yaml.safe_dump({name: value}, sort_keys=False, allow_unicode=True, width=1000).rstrip("\n")
        reason = migration.reasons.get(name)
        lines.append(f"{written} # {reason}" if reason and "\n" not in written else written)
    return "\n".join(lines) + "\n"
