"""The worlds and the methods of the league, and the settings over which each method is tuned."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_recipes.quickstart.worlds import WORLDS as BUILT


@dataclass(frozen=True)
class World:
    """A world of `recipes/quickstart.py`, and the budget of every run in it.

    Args:
        name: Name.
        steps: Optimiser steps, a multiple of four.
        budgets: KL at which methods are compared, nats.
        separator: Text between prompt and answer.
        options: Options of every recipe.
    """

    name: str
    steps: int
    budgets: tuple[float, ...]
    separator: str = "\n"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def gold(self) -> Any:
        """Return the true score, a function of TRL's signature."""
        return BUILT[self.name].gold_score

    @property
    def max_completion_length(self) -> int:
        """Return the number of tokens that an answer may have."""
        return BUILT[self.name].max_completion_length


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

    def paths(self, base: Path) -> dict[str, Path]:
        """Return the options that name the data and the reward model of a base."""
        data = "preferences" if self.name == "dpo" else "prompts"
        paths = {"dataset_name": base / data, "reward_model_path": base / "reward_modeling"}
        if self.reads_preferences:
            paths["critic_dataset_name"] = base / "preferences"
        return paths


HERE = Path(__file__).resolve().parent
WORLDS = {
    each.name: each
    for each in (World("quickstart", steps=60, budgets=(2.0, 3.0)), World("report", steps=60, budgets=(2.0, 4.0)))
}

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
        Method("ppo", "ppo", "ppo.yaml", [{"kl_coef": x} for x in (0.1, 0.15)], reads_preferences=True),
        Method(TRL_1_12, "", "", [{"kl_coef": x} for x in (0.1, 0.15)]),
    )
}
