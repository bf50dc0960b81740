"""Load the splits that a recipe names."""

import json
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from accelerate import PartialState
from datasets import Dataset, DatasetBuilder, DatasetDict, load_dataset, load_dataset_builder
from datasets.data_files import EmptyDatasetError
from trl import ScriptArguments

from rlhf_recipes.console import print_lines
from rlhf_recipes.data.files import find_defect, is_beside_data
from rlhf_recipes.data.pairs import COLUMNS, Rows
from rlhf_recipes.data.prompts import add_separator
from rlhf_recipes.data.rows import mend_transcripts, readable_rows
from rlhf_recipes.options.paths import require_path
from rlhf_recipes.options.preferences import PreferenceArguments
from rlhf_recipes.options.recipes import PPOArguments
from rlhf_recipes.options.spelling import directory_meant

NO_DATA = "It holds no file with JSON lines, CSV or Parquet. Write `train.jsonl` there, with one JSON object a line."
BESIDE = ""  # key of the files that are left out


def load_split(script_args: ScriptArguments, split: str, *, option: str = "dataset_name") -> Dataset:
    """Load one split of a dataset: a Hub name, or a directory with JSON lines, CSV or Parquet.

    Say which files of a directory are read.

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
    config = script_args.dataset_config if option == "dataset_name" else None
    if Path(name).is_dir():
        dataset, files = _load_directory(name, config, option, split)
    else:
        dataset, files = _load_from_hub(name, config, option), None
    if split not in dataset:
        splits = ", ".join(map(repr, dataset))
        file = "" if files is None else f", or write `{split}.jsonl` there"
        raise ValueError(
            f"`{option}` {name} has no split {split!r}, only {splits}: set `dataset_train_split` or "
            f"`dataset_test_split`{file}."
        )
    if len(dataset[split]) == 0:
        raise ValueError(f"The split {split!r} of {name} is empty.")
    if files is not None and PartialState().is_main_process:
        _say_files(f"{name}: {len(dataset[split]):,} rows of the split {split!r}", files, split)
    return dataset[split]


def _say_files(what: str, files: dict[str, list[str]], split: str) -> None:
    """Say which files a split is read from, unless it is the one file of its name and nothing is left out."""
    is_plain = len(files[split]) == 1 and files[split][0].split(".")[0] == split
    left_out = f"; not from {', '.join(files[BESIDE])}" if files[BESIDE] else ""
    if left_out or not is_plain:
        print_lines(f"{what} from {', '.join(files[split])}{left_out}")


def _with_config(config: str | None) -> str:
    return "" if config is None else f" with `dataset_config: {config}`"


def _load_from_hub(name: str, config: str | None, option: str) -> DatasetDict:
    try:
        dataset = load_dataset(name, config)
    except (OSError, ValueError) as error:
        where = f"{_with_config(config)} (not a directory here, so it was looked for on the Hub)"
        reason = f"{' '.join(str(error).split())}.{directory_meant(name)}"
        raise ValueError(f"`{option}` {name!r} cannot be loaded{where}: {reason}") from error
    assert isinstance(dataset, DatasetDict)
    return dataset


def _load_directory(
    name: str, config: str | None, option: str, split: str
) -> tuple[DatasetDict, dict[str, list[str]]]:
    """Return the splits of a directory, and the files of each split and those beside them, in the directory."""
    files: dict[str, list[str]] = {}
    beside: list[str] = []
    try:
        builder = load_dataset_builder(name, config)
        files = _files_of(builder)
        if beside := [*filter(is_beside_data, chain(*files.values()))]:
            kept = ((split, [file for file in found if not is_beside_data(file)]) for split, found in files.items())
            files = {split: found for split, found in kept if found}
            if not files:
                raise ValueError(NO_DATA)
        # pandas takes the answers "None", "NA" and "null" of a CSV file for missing ones.
        words = {"keep_default_na": False, "na_values": [""]} if hasattr(builder.config, "keep_default_na") else {}
        # Always with the files: if a card in the directory names them, the cache is not by their content.
        builder = load_dataset_builder(name, config, data_files=files, **words)
        builder.download_and_prepare()
        dataset = builder.as_dataset()
        if split in dataset:  # `datasets` reads lines that are not in UTF-8, but not their rows
            dataset[split].data.table.validate(full=True)
    except EmptyDatasetError as error:
        raise ValueError(f"`{option}` {name!r} cannot be loaded: {NO_DATA}") from error
    except Exception as error:  # pyarrow, pandas and `datasets` have errors of their own
        reason = find_defect(chain(*files.values())) or " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"`{option}` {name!r} cannot be loaded{_with_config(config)}: {reason}") from error
    assert isinstance(dataset, DatasetDict)
    folder = Path(name).resolve()
    named = files | {BESIDE: beside}
    return dataset, {split: [str(Path(file).relative_to(folder)) for file in found] for split, found in named.items()}


def _files_of(builder: DatasetBuilder) -> dict[str, list[str]]:
    return {str(split): [str(file) for file in found] for split, found in (builder.config.data_files or {}).items()}


def load_prompts(script_args: ScriptArguments, split: str) -> Dataset:
    """Load the prompts of a split and the columns that a reward function may read, without the answers.

    Raises:
        ValueError: See `load_split` and `readable_rows`.
    """
    return without_answers(load_split(script_args, split))


def without_answers(dataset: Dataset, name: str = "dataset_name") -> Dataset:
    """Return the prompts and the columns that a reward function may read, without the answers.

    Args:
        dataset: Dataset with the column `prompt`.
        name: Option that names it, for messages.

    Raises:
        ValueError: See `readable_rows`.
    """
    dataset = readable_rows(dataset, ("prompt",), name)
    answers = [column for column in ("completion", "chosen", "rejected") if column in dataset.column_names]
    return dataset.remove_columns(answers)


def first_of_each_prompt(pairs: Dataset) -> Dataset:
    """Return the prompts of preference pairs, each once, with the columns that a reward function may read."""
    rows: dict[str, int] = {}
    for row, prompt in enumerate(pairs["prompt"]):
        rows.setdefault(json.dumps(prompt), row)
    return without_answers(pairs).select(rows.values())


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


def load_earlier_pairs(script_args: PreferenceArguments) -> list[tuple[Rows, Rows]]:
    """Load the pairs of each earlier set: those to train on, and those to evaluate on.

    Raises:
        ValueError: See `load_split` and `readable_rows`.
    """
    splits = (script_args.dataset_train_split, script_args.dataset_test_split)
    found = []
    for name in script_args.earlier_pairs:
        one: Any = SimpleNamespace(earlier_pairs=name, dataset_streaming=False)
        rows = [
            readable_rows(load_split(one, split, option="earlier_pairs"), COLUMNS, "earlier_pairs") for split in splits
        ]
        kept = ([*each.select_columns([c for c in (*COLUMNS, "margin") if c in each.column_names])] for each in rows)
        found.append((next(kept), next(kept)))
    return found
