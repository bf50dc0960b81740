"""Datasets: loading, validation and the explicit boundary between prompt and response.

Layer L2. Formats are TRL's: `prompt`; `prompt`, `chosen`, `rejected`; `prompt`, `completion`; plain text or messages.
"""

import re
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from transformers import PreTrainedTokenizerBase
from trl import ScriptArguments, is_conversational

from rlhf_recipes.configs import PPOConfig

AnyDataset: TypeAlias = Dataset | IterableDataset
MaybeDataset = TypeVar("MaybeDataset", Dataset, IterableDataset, None)


def require_path(option: str, path: str | None) -> str:
    """Return `path` if it can be loaded from; a missing output of an earlier stage is named with its command.

    By convention `recipes/<stage>.py` writes `runs/<model>/<stage>` from `recipes/configs/<model>/<stage>.yaml`, and
    `recipes/quickstart.py` all of `runs/quickstart`.

    Args:
        option: Name of the option, for the message.
        path: Its value: a local path, or a name on the Hub.

    Raises:
        ValueError: If `path` is `None`.
        FileNotFoundError: If it is a local path that does not exist.
    """
    if path is None:
        raise ValueError(f"`{option}` is not set.")
    if Path(path).exists() or not path.startswith((".", "/", "~", "runs/")):
        return path
    match Path(path).parts:
        case ("runs", "quickstart", "base" | "data" | "prompts"):
            command = "`python recipes/quickstart.py --until world`"
        case ("runs", "quickstart", "preferences" | "sft" | "reward_modeling" | "ppo" as stage):
            command = f"`python recipes/quickstart.py --until {stage}`"
        case ("runs", "smollm2_135m", "base"):
            command = "`make smollm2`"
        case ("runs", model, name) if recipe := re.fullmatch(r"(sft|reward_modeling|ppo)(_\w+)?", name):
            shipped = sorted(Path(__file__).parents[1].glob(f"recipes/configs/{model}/{name}*.yaml"))
            config = f"recipes/configs/{model}/{shipped[0].name}" if shipped else "YOUR_CONFIG.yaml"
            command = f"`accelerate launch recipes/{recipe[1]}.py --config {config}`"
        case _:
            raise FileNotFoundError(f"`{option}` is {path}, which does not exist.")
    raise FileNotFoundError(f"`{option}` is {path}, which does not exist. Run {command} first.")


def load_split(script_args: ScriptArguments, split: str) -> Dataset:
    """Load one split of the dataset that a recipe names: a Hub name, or a directory of JSON lines, CSV or Parquet.

    Raises:
        ValueError: If no dataset is named, it cannot be loaded, or it has no such split or no rows in it.
        FileNotFoundError: See `require_path`.
    """
    name = require_path("dataset_name", script_args.dataset_name)
    if Path(name).is_file():
        raise ValueError(f"`dataset_name` is the file {name}: name the directory that holds it.")
    if script_args.dataset_streaming:
        raise ValueError("`dataset_streaming` is not available in the recipes: leave it out.")
    try:
        dataset = load_dataset(name, script_args.dataset_config)
    except (OSError, ValueError) as error:
        where = "" if Path(name).exists() else " (not a directory here, so it was looked for on the Hub)"
        raise ValueError(f"`dataset_name` {name!r} cannot be loaded{where}: {error}") from error
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
    """Load the prompts of a split, without their answers but with what a reward function may want to know.

    Raises:
        ValueError: See `load_split` and `check_columns`.
    """
    return without_answers(load_split(script_args, split))


def without_answers(dataset: Dataset) -> Dataset:
    """Return a split's prompts, with what a reward function may want to know.

    Raises:
        ValueError: See `check_columns`.
    """
    check_columns(dataset, ("prompt",), "dataset_name")
    answers = [column for column in ("completion", "chosen", "rejected") if column in dataset.column_names]
    return dataset.remove_columns(answers)


def load_demonstrations(script_args: ScriptArguments, split: str, separator: str) -> Dataset:
    """Load a split for SFT: `prompt` and `completion`, joined by `separator` if plain, or TRL's `messages` or `text`.

    Raises:
        ValueError: See `load_split` and `check_columns`.
    """
    dataset = load_split(script_args, split)
    if "prompt" not in dataset.column_names:
        return dataset
    check_columns(dataset, ("prompt", "completion"), "dataset_name")
    return add_separator(dataset, separator)


def column_names(dataset: AnyDataset) -> list[str]:
    """Return the names of the columns, also of a stream that does not declare them."""
    return list(dataset.column_names or next(iter(dataset), {}))


def check_columns(dataset: AnyDataset | None, columns: tuple[str, ...], name: str) -> None:
    """Check that a dataset has rows, and text in the columns that a trainer needs.

    Args:
        dataset: What the user passed; `None` passes.
        columns: Names of the required columns.
        name: Name of the argument, for the message.

    Raises:
        ValueError: If it is empty, lacks a column, mixes text and messages, or has an empty prompt or completion.
    """
    if dataset is None:
        return
    if isinstance(dataset, dict):
        raise ValueError(f"`{name}` is a dictionary of {', '.join(map(repr, dataset))}: pass one of them.")
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"`{name}` is empty.")
    missing = [column for column in columns if column not in first]
    if missing:
        raise ValueError(
            f"`{name}` has no column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, first))}. Rename "
            "or convert the columns (`dataset.rename_column`)."
        )
    kinds = {column: "text" if isinstance(first[column], str) else "messages" for column in columns}
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"{column!r} is {kind}" for column, kind in kinds.items())
        raise ValueError(
            f"`{name}` mixes formats: {listed}. Convert all to one; if the messages of `chosen` and `rejected` hold "
            "the prompt too, drop the column `prompt`."
        )
    if isinstance(dataset, Dataset):
        for column in columns:
            for row, text in enumerate(dataset[column]):
                if _is_empty(text):
                    raise ValueError(f"`{name}` has an empty {column!r} in row {row}. Remove that row.")


def _is_empty(text: Any) -> bool:
    if isinstance(text, list):
        return not text or not text[-1].get("content")
    return not isinstance(text, str) or not text.strip()


def add_separator(dataset: MaybeDataset, separator: str) -> MaybeDataset:
    """End every plain-text prompt with `separator`; chat prompts have their template and stay as they are."""
    if dataset is None or separator == "" or is_conversational(next(iter(dataset))):
        return dataset

    def end_prompt(example: dict[str, Any]) -> dict[str, Any]:
        prompt = example["prompt"]
        return {"prompt": prompt if prompt.endswith(separator) else prompt + separator}

    return dataset.map(end_prompt)


def check_prompts_fit(
    dataset: AnyDataset, tokenizer: PreTrainedTokenizerBase, config: Any, max_new_tokens: int
) -> None:
    """Check that every prompt leaves room for a completion in the model's context.

    Args:
        dataset: Prompts, plain or chat. A stream cannot be checked beforehand.
        tokenizer: The policy's.
        config: The model's; one without a limit on positions takes any prompt.
        max_new_tokens: Tokens per completion.

    Raises:
        ValueError: If the longest prompt and a completion do not fit.
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is None or not isinstance(dataset, Dataset):
        return
    longest, row = max((prompt_length(prompt, tokenizer), row) for row, prompt in enumerate(dataset["prompt"]))
    if longest + max_new_tokens > limit:
        raise ValueError(
            f"The prompt in row {row} has {longest} tokens; with `max_completion_length` ({max_new_tokens}) it "
            f"exceeds the model's {limit} positions. Shorten or drop long prompts, or lower `max_completion_length`."
        )


def check_rollout_fits(dataset: AnyDataset | None, args: PPOConfig) -> None:
    """Check that a dataset fills at least one rollout; a sampler would drop the rest silently.

    Raises:
        ValueError: If it does not.
    """
    prompts = args.generation_batch_size // args.num_generations
    if isinstance(dataset, Dataset) and len(dataset) < prompts:
        raise ValueError(
            f"`train_dataset` has {len(dataset)} prompts, fewer than one rollout's {prompts} "
            "(`per_device_train_batch_size` x processes x `steps_per_generation` / `num_generations`). Add prompts "
            "or lower one of these."
        )


def prompt_length(prompt: str | list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of tokens of a prompt as the policy sees it."""
    if isinstance(prompt, str):
        return len(tokenizer(prompt)["input_ids"])
    return len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"])
