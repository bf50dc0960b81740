"""The command line and the YAML of a recipe, read into checked options."""

import os
import sys
from collections.abc import Hashable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import TrainingArguments
from trl import TrlParser

from rlhf_recipes.options.checks import check_new
from rlhf_recipes.options.learning_rates import rates_of
from rlhf_recipes.options.machine import fit_to_machine, said
from rlhf_recipes.options.ppo import PPOConfig
from rlhf_recipes.options.process_reward_modeling import ProcessRewardModelConfig
from rlhf_recipes.options.reward_modeling import RewardModelConfig
from rlhf_recipes.options.spelling import did_you_mean
from rlhf_recipes.options.training import check_training

CHECK_THEMSELVES = (PPOConfig, RewardModelConfig, ProcessRewardModelConfig)  # when they are constructed


class RecipeParser(TrlParser):
    """Read options as `trl.TrlParser` does, and refuse each wrong one in one line that names it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.set_defaults_with_config(use_cpu=None)  # tells a user's `false` from an option that is not set

    def parse_args_and_config(self, args: Iterable[str] | None = None, **kwargs: Any) -> Any:
        """Return the options: of the command line, else of the YAML file of `--config`, else the defaults.

        Raises:
            ValueError: If an option is unknown or wrong, or contradicts another one, or if the file cannot be read.
        """
        arguments = sys.argv[1:] if args is None else list(args)
        if "--config" in arguments:
            self._check_file(*arguments[arguments.index("--config") + 1 :][:1])
        try:
            parsed = super().parse_args_and_config(arguments, **kwargs)
        # transformers and TRL raise these for options that contradict each other, and for packages that are missing.
        except (ValueError, TypeError, NotImplementedError, ImportError, OSError) as error:
            raise ValueError(" ".join(str(error).split())) from error
        for options in parsed:
            if isinstance(options, TrainingArguments) and not isinstance(options, CHECK_THEMSELVES):
                check_training(options)
        return parsed

    def _check_file(self, path: str | None = None) -> None:
        if path is None:
            raise ValueError("`--config` names no file: write `--config FILE.yaml`.")
        try:
            options = yaml.load(Path(path).read_text(encoding="utf-8"), StrictLoader)  # noqa: S506 (a safe loader)
        except OSError as error:
            place = f"Name a file, from the working directory {os.getcwd()} on."
            raise ValueError(f"`--config` {path} cannot be read: {error.strerror}. {place}") from error
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"`--config` {path} cannot be read: {why_no_yaml(error)}") from error
        if not isinstance(options, dict):
            raise ValueError(f"`--config` {path} must hold options, each as `name: value`.")
        for name in options:
            if name not in self._names() | {"env"}:
                self._refuse_unknown(str(name), f" in {path}")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Check the values before the dataclasses are constructed: they would change some of them."""
        arguments = sys.argv[1:] if args is None else list(args)
        namespace, remaining = super().parse_known_args(arguments, namespace)
        if remaining:
            before = arguments[: arguments.index(remaining[0])][-1:]
            place = f" (after `{before[0]}`)" if before else ""
            self._refuse_unknown(remaining[0].lstrip("-").partition("=")[0], place)
        options = vars(namespace)
        if "use_cpu" in options:
            _fit(options)
        self._choose_rate(namespace)
        for kind in self.dataclass_types:
            check_new(kind, options)
        return namespace, remaining

    def _choose_rate(self, namespace: Any) -> None:
        """Give a run with LoRA that names no learning rate the one that is usual for LoRA."""
        if not getattr(namespace, "use_peft", False):
            return
        for kind in self.dataclass_types:
            rates, default = rates_of(kind), getattr(kind, "learning_rate", None)
            # The parser hands on the default itself. A value from the command line or a file is another object.
            if rates is not None and namespace.learning_rate is default:
                namespace.learning_rate = rates.lora_default

    def _names(self) -> set[str]:
        return {field.name for kind in self.dataclass_types for field in fields(kind)}

    def _refuse_unknown(self, name: str, place: str) -> NoReturn:
        hint = did_you_mean(name.replace("-", "_"), self._names(), "`--help` lists the options.")
        raise ValueError(f"`{name}`{place} is no option of this recipe.{hint}")

    def error(self, message: str) -> NoReturn:
        """End with one line, not with a list of hundreds of options."""
        sys.stderr.write(f"Error: {message}\n")
        sys.exit(2)


def _fit(options: dict[str, Any]) -> None:
    """Set the device and the precision that the user left out, and say it once."""
    chosen = fit_to_machine(options)
    line = said(options, chosen)
    options.update(chosen)
    if options["bf16"] is False and not options["fp16"]:
        os.environ["ACCELERATE_MIXED_PRECISION"] = "no"  # the file of a launcher may ask for another one
    if line is not None and os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"{line}\n")


def why_no_yaml(error: Exception) -> str:
    """Return the reason why a file is no YAML, in one line with the line of the file."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    context = "" if error.context is None or error.context_mark is None else _at(error.context, error.context_mark)
    problem = _at(error.problem or "it is wrong", error.problem_mark)
    return f"{context}{', ' if context else ''}{problem}. Write each option as `name: value`, and indent by spaces."


def _at(text: str, mark: Any) -> str:
    return f"{text} in line {mark.line + 1}"


class StrictLoader(yaml.SafeLoader):
    """Refuse a key that a file has twice: the second value would silently replace the first one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        """Return a mapping whose keys are all different."""
        names = [key.value for key, _ in node.value]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"`{twice}` is in it twice", node.start_mark)
        return super().construct_mapping(node, deep)
