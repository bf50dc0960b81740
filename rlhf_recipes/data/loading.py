"""Load the splits that a recipe names."""

from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset
from trl import ScriptArguments

from rlhf_recipes.data.prompts import add_separator
from rlhf_recipes.data.rows import mend_transcripts, readable_rows
from rlhf_recipes.options.paths import require_path
from rlhf_recipes.options.recipes import PPOArguments


def load_split(script_args: ScriptArguments, split: str, *, option: str = "dataset_name") -> Dataset:
    """Load one split of a dataset: a Hub name, or a directory with JSON lines, CSV or Parquet.

    Args:
        script_args: Options of the recipe.
        split: Name of the split.
        option: Option that names the dataset.

    Raises:
        ValueError: If no dataset is named, it cannot be loaded, or it has no such split or no rows in it.
        FileNotFoundError: See `require_path`.
    """
    name = require_path(option, getattr(script_args, option))
    if Path(name).is_file():
        raise ValueError(f"`{option}` is the file {name}: name the directory that holds it.")
    if script_args.dataset_streaming:
        raise ValueError("`dataset_streaming` is not available in the recipes: leave it out.")
    try:
        dataset = load_dataset(name, script_args.dataset_config if option == "dataset_name" else None)
    except (OSError, ValueError) as error:
        where = "" if Path(name).exists() else " (not a directory here, so it was looked for on the Hub)"
        raise ValueError(f"`{option}` {name!r} cannot be loaded{where}: {error}") from error
    assert isinstance(dataset, DatasetDict)
    if split not in dataset:
        splits = ", ".join(map(repr, dataset))
        raise ValueError(
            f"{name} has no split {split!r}, only {splits}: set `dataset_train_split` or `dataset_test_split`."
        )
    if len(dataset[split]) == 0:
        raise ValueError(f"The split {split!r} of {name} is empty.")
    return dataset[split]


def load_prompts(script_args: ScriptArguments, split: str) -> Dataset:
    """Load the prompts of a split and the columns that a reward function may read, without the answers.

    Raises:
        ValueError: See `load_split` and `readable_rows`.
    """
    return without_answers(load_split(script_args, split))


def without_answers(dataset: Dataset) -> Dataset:
    """Return the prompts and the columns that a reward function may read, without the answers.

    Raises:
        ValueError: See `readable_rows`.
    """
    dataset = readable_rows(dataset, ("prompt",), "dataset_name")
    answers = [column for column in ("completion", "chosen", "rejected") if column in dataset.column_names]
    return dataset.remove_columns(answers)


def load_demonstrations(script_args: ScriptArguments, split: str, separator: str) -> Dataset:
    """Load a split for SFT: `prompt` and `completion`, or TRL's `messages` or `text`. `separator` ends plain prompts.

    Raises:
        ValueError: See `load_split` and `readable_rows`.
    """
    dataset = load_split(script_args, split)
    if "prompt" not in dataset.column_names:
        return dataset
    dataset = readable_rows(dataset, ("prompt", "completion"), "dataset_name")
    return add_separator(mend_transcripts(dataset), separator)


def load_critic_pairs(script_args: PPOArguments) -> Dataset | None:
    """Load the preferences to which a critic is fitted before the first rollout, if the recipe names some.

    Raises:
        ValueError: See `load_split`.
    """
    if script_args.critic_dataset_name is None:
        return None
    pairs = load_split(script_args, script_args.dataset_train_split, option="critic_dataset_name")
    return pairs.select(range(min(script_args.critic_pairs, len(pairs))))
