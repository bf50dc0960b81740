"""The worlds and the methods of the league, and the settings over which each method is tuned."""

import os
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from instruction_base import LORA, RECIPES, Sizes
from instruction_base import build_base as build_instructions
from instructions import instruction_score

from rlhf_recipes.quickstart.worlds import WORLDS as BUILT


@dataclass(frozen=True)
class World:
    """A world, and the budget of every run in it.

    Args:
        name: Name.
        steps: Optimiser steps, a multiple of `parts`.
        budgets: KL at which methods are compared, nats.
        gold: True score, a function of TRL's signature.
        max_completion_length: Tokens of an answer, at most.
        build: Function that builds a base. Its arguments are a folder, a seed, and the model and data of the user.
        separator: Text between prompt and answer; chats have none.
        methods: Methods that can run here, by name.
        has_reward_model: Whether a learned reward model is between the true score and the training.
        own_bases: Whether each seed has a base of its own. One base for all costs less, and shows less.
        held_out: Held-out prompts on which policies are measured, at most.
        samples: Answers to a held-out prompt, along the run and at its end.
        best_of: Largest n of best-of-n.
        temperature: Temperature of sampling.
        dtype: Precision of the models.
        options: Options of every recipe.
        sampling: Options of the recipes that sample from the policy.
        settings: Settings of methods that differ here, by method.
        parts: Number of times that a run is measured.
    """

    name: str
    steps: int
    budgets: tuple[float, ...]
    gold: Callable[..., Any]
    max_completion_length: int
    build: Callable[[Path, int, Path | None, Path | None], None]
    methods: tuple[str, ...]
    separator: str = "\n"
    has_reward_model: bool = True
    own_bases: bool = True
    held_out: int = 80
    samples: tuple[int, int] = (4, 12)
    best_of: int = 64
    temperature: float = 1.0
    dtype: str = "float32"
    options: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    parts: int = 4

    def settings_of(self, method: "Method") -> list[dict[str, Any]]:
        """Return the settings over which a method is tuned here."""
        return self.settings.get(method.name, method.settings)


@dataclass(frozen=True)
class Method:
    """A way to train a policy.

    Args:
        name: Name.
        recipe: Recipe that trains, without `.py`; TRL 1.12 has none.
        config: Configuration: a path, or a name in the folder of the quickstart.
        settings: Settings to tune over: options of the recipe.
        arguments: First arguments of the recipe.
        reads_preferences: Whether a critic is fitted to the preferences of the reward model.
    """

    name: str
    recipe: str
    config: str
    settings: list[dict[str, Any]]
    arguments: tuple[str, ...] = ()
    reads_preferences: bool = False

    @property
    def samples(self) -> bool:
        """Return whether the method samples from its policy."""
        return self.name != "dpo"

    def paths(self, base: Path) -> dict[str, Path]:
        """Return the options that name the data and the reward model of a base."""
        data = "prompts" if self.samples else "preferences"
        paths = {"dataset_name": base / data, "reward_model_path": base / "reward_modeling"}
        if self.reads_preferences:
            paths["critic_dataset_name"] = base / "preferences"
        return paths


def quickstart(name: str, steps: int, budgets: tuple[float, ...], build: Callable[..., None], **changes: Any) -> World:
    """Return a world of `recipes/quickstart.py`, whose bases `build` writes."""
    built, given = BUILT[name], {"methods": tuple(METHODS)} | changes
    return World(name, steps, budgets, built.gold_score, built.max_completion_length, build, **given)


def build_quickstart(name: str, until: str, folder: Path, seed: int, model: Path | None, data: Path | None) -> None:
    """Build the base of a seed by the recipe of the quickstart, which needs neither a model nor data."""
    scratch, here = folder.parent / f"quickstart-{seed}", Path.cwd()
    sys.argv = ["quickstart.py", "--world", name, "--until", until, "--seed", str(seed), "--directory", str(scratch)]
    runpy.run_path(str(RECIPES / "quickstart.py"), run_name="__main__")
    os.chdir(here)
    (scratch / "runs" / name).rename(folder)


def build_reports(folder: Path, *given: Any) -> None:
    """Build the base of reports. Its pairs have the labels of the true score, without the noise of the recipe."""
    build_quickstart("report", "preferences", folder, *given)
    for file in sorted((folder / "preferences").iterdir()):
        pairs = Dataset.from_json(str(file))
        pairs.map(true_labels, batched=True, remove_columns=pairs.column_names).to_json(str(file))


def true_labels(pairs: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return the pairs whose answers have different true scores, the better answer as `chosen`."""
    names = ("chosen", "rejected")
    scores = [BUILT["report"].gold_score(prompts=pairs["prompt"], completions=pairs[name]) for name in names]
    rows = zip(pairs["prompt"], *(pairs[name] for name in names), *scores, strict=True)
    better = [(prompt, *((a, b) if x > y else (b, a))) for prompt, a, b, x, y in rows if x != y]
    return {name: [row[i] for row in better] for i, name in enumerate(("prompt", *names))}


def rewarded_by(score: str) -> dict[str, Any]:
    """Return the options of a world where a function, `MODULE:NAME`, is the reward, in place of a reward model."""
    no_model = {"reward_model_path": None, "critic": None, "critic_dataset_name": None}
    return {**no_model, "reward_functions": [score], "judge_functions": [score]}


def report(steps: int, **changes: Any) -> World:
    """Return the world of reports. Its true score is the reward, as a program's verdict can be.

    The answers have 75 tokens, so there is much credit to spread. RLOO pays `beta` for a nat in the scores' own unit,
    and PPO pays `kl_coef` in standard deviations of the scores. A standard deviation is about three units here. DPO
    has pairs that the true score has labelled. TRL 1.12's PPO takes no reward but a model, so it cannot run here.
    """
    given: dict[str, Any] = {
        "methods": ("ppo", "rloo", "grpo", "dpo", "ppo-as-it-was"),
        "has_reward_model": False,
        "own_bases": False,
        "samples": (3, 8),
        "options": rewarded_by("rlhf_recipes.quickstart.report_world:report_score"),
        "settings": {
            "ppo": [{"kl_coef": kl_coef, "lam": lam} for kl_coef, lam in ((0.03, 0.95), (0.05, 0.98))],
            "rloo": [{"beta": x} for x in (0.3, 0.15)],
            "ppo-as-it-was": [{"target_kl": x} for x in (3.0, 2.0)],
        },
    }
    return quickstart("report", steps, (1.0, 2.0), build_reports, **(given | changes))


def instructions(sizes: Sizes, steps: int, **changes: Any) -> World:
    """Return the world of a chat model and instructions that a program checks. It needs a model and questions.

    The score is the reward, because a reward model of this size learns too little of it. The runs use LoRA in
    bfloat16, and each rollout once.
    """
    # DPO keeps the logits of prompts and answers, so its mini-batch comes in parts.
    quarters = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    # The first policy does not end a third of its answers. The score does not punish this, and TRL's trainers do not.
    for_ppo = {"missing_eos_penalty": 0.0}
    given: dict[str, Any] = {
        "methods": ("ppo", "rloo", "grpo", "dpo"),
        "has_reward_model": False,
        "own_bases": False,
        "held_out": 96,
        "samples": (1, 3),
        "best_of": 8,
        "temperature": sizes.temperature,
        "dtype": LORA["dtype"],
        "options": {
            **rewarded_by("instructions:instruction_score"),
            **LORA,
            "learning_rate": 2e-4,
            "per_device_train_batch_size": 16,
        },
        # 64 completions per rollout, one epoch of 4 mini-batches
        "sampling": {"steps_per_generation": 4, "num_iterations": 1, "temperature": sizes.temperature},
        "settings": {
            "ppo": [{"kl_coef": x, **for_ppo} for x in (0.05, 0.1)],
            "rloo": [{"beta": x} for x in (0.02, 0.05)],
            "grpo": [{"beta": x} for x in (0.05, 0.1)],
            "dpo": [{"learning_rate": x, "beta": 0.1, **quarters} for x in (3e-4, 1e-4)],
        },
    }
    length = sizes.max_completion_length
    build = partial(build_chat, sizes)
    return World("instructions", steps, (0.5, 1.0), instruction_score, length, build, **(given | changes))


def build_chat(sizes: Sizes, folder: Path, seed: int, model: Path | None, data: Path | None) -> None:
    """Build the base of the world of instructions from a chat model and a data set with questions."""
    if model is None or data is None:
        raise SystemExit("This world needs `--model` and `--data`.")
    build_instructions(folder, seed, model.resolve(), data.resolve(), sizes)


HERE = Path(__file__).resolve().parent
TRL_1_12 = "ppo-trl-1.12"  # by league_trl_1_12.py
METHODS = {
    each.name: each
    for each in (
        Method("rloo", "baseline", "baseline_rloo.yaml", [{"beta": x} for x in (0.1, 0.05)], ("--method", "rloo")),
        Method("grpo", "baseline", "baseline_grpo.yaml", [{"beta": x} for x in (0.1, 0.2)], ("--method", "grpo")),
        Method(
            "dpo",
            "baseline",
            "baseline_dpo.yaml",
            [{"learning_rate": rate, "beta": 0.1} for rate in (1e-4, 5e-5)],
            ("--method", "dpo"),
        ),
        Method("ppo-as-it-was", "ppo", str(HERE / "ppo_as_it_was.yaml"), [{"target_kl": x} for x in (3.5, 2.5)]),
        Method("ppo", "ppo", "ppo.yaml", [{"adam_epsilon": x} for x in (1e-5, 1e-8)], reads_preferences=True),
        Method(TRL_1_12, "", "", [{"kl_coef": x} for x in (0.1, 0.15)]),
    )
}

WORLDS = {
    each.name: each
    for each in (
        quickstart("quickstart", 60, (2.0, 3.0), partial(build_quickstart, "quickstart", "reward_modeling")),
        report(steps=60),
        instructions(Sizes(), steps=80),
    )
}
