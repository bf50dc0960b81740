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
    configs = shipped("recipes") / "configs"
    return {f"{path.parent.name}/{path.stem}": path for path in sorted(configs.glob(f"*/{recipe}*.yaml"))}


def shipped_launch_files() -> dict[str, Path]:
    """Return the files of `accelerate launch --config_file` by name, as `multi_gpu`."""
    return {path.stem: path for path in sorted(shipped("accelerate_configs").glob("*.yaml"))}
