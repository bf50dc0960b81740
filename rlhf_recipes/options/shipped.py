"""Recipes and configurations that the package brings along.

Imports only the standard library: the command line must start at once.
"""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def shipped(folder: str) -> Path:
    """Return `recipes` or `accelerate_configs`: inside an installed package, or beside the package in a checkout."""
    inside, beside = PACKAGE / folder, PACKAGE.parent / folder
    return inside if inside.is_dir() else beside


def shipped_configurations(recipe: str) -> dict[str, Path]:
    """Return the configurations of a recipe by name, as `quickstart/ppo` for `recipes/configs/quickstart/ppo.yaml`."""
    recipes = shipped("recipes")
    longer = tuple(other.stem for other in recipes.glob(f"{recipe}_*.py"))  # `evaluate_reward_model` for `evaluate`
    found = sorted(
        path for path in (recipes / "configs").glob(f"*/{recipe}*.yaml") if not path.stem.startswith(longer)
    )
    return {f"{path.parent.name}/{path.stem}": path for path in found}


def shipped_launch_files() -> dict[str, Path]:
    """Return the files of `accelerate launch --config_file` by name, as `multi_gpu`."""
    return {path.stem: path for path in sorted(shipped("accelerate_configs").glob("*.yaml"))}
