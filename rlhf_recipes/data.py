"""Datasets: loading, validation and the explicit boundary between prompt and response.

Layer L2. Formats are TRL's: `prompt`; `prompt`, `chosen`, `rejected`; `prompt`, `completion`; plain text or messages.
"""

from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from transformers import PreTrainedTokenizerBase
from trl import ScriptArguments, is_conversational

from rlhf_recipes.configs import PPOConfig

AnyDataset: TypeAlias = Dataset | IterableDataset


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
    if Path(path).exists() or not path.startswith((".", "/", "runs/")):
        return path
    parts = Path(path).parts
    command = "the recipe that writes it"
    if parts[0] == "runs" and len(parts) > 2:
        stage = f"recipes/configs/{parts[1]}/{parts[-1]}.yaml"
        command = f"`accelerate launch recipes/{parts[-1]}.py --config {stage}`"
        if parts[1] == "quickstart":
            command = f"`python recipes/quickstart.py --until {parts[-1]}`"
    raise FileNotFoundError(f"`{option}` is {path}, which does not exist. Run {command} first.")


def load_split(script_args: ScriptArguments, split: str) -> Dataset:
    """Load one split of the dataset that a recipe names: a Hub name, or a directory or file of JSON lines.

    Raises:
        ValueError: If no dataset is named, or it has no such split.
        FileNotFoundError: See `require_path`.
    """
    name = script_args.dataset_name
    dataset = load_dataset(require_path("dataset_name", name), script_args.dataset_config)
    assert isinstance(dataset, DatasetDict)
    if split not in dataset:
        raise ValueError(f"{name} has no split {split!r}, only {', '.join(map(repr, dataset))}.")
    return dataset[split]


def check_columns(dataset: AnyDataset, columns: tuple[str, ...], name: str) -> None:
    """Check that a dataset has rows, and text in the columns that a trainer needs.

    Args:
        dataset: What the user passed.
        columns: Names of the required columns.
        name: Name of the argument, for the message.

    Raises:
        ValueError: If it is empty, lacks a column, or has an empty prompt or completion.
    """
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"`{name}` is empty.")
    missing = [column for column in columns if column not in first]
    if missing:
        raise ValueError(
            f"`{name}` has no column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, first))}. Rename "
            "or convert the columns (`dataset.rename_column`)."
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


def add_separator(dataset: AnyDataset, separator: str) -> AnyDataset:
    """End every plain-text prompt with `separator`; chat prompts have their template and stay as they are."""
    if separator == "" or is_conversational(next(iter(dataset))):
        return dataset

    def end_prompt(example: dict[str, Any]) -> dict[str, Any]:
        prompt = example["prompt"]
        return {"prompt": prompt if prompt.endswith(separator) else prompt + separator}

    return dataset.map(end_prompt)


def check_prompts_fit(
    dataset: AnyDataset, tokenizer: PreTrainedTokenizerBase, limit: int, max_new_tokens: int
) -> None:
    """Check that every prompt leaves room for a completion in the model's context.

    Args:
        dataset: Prompts, plain or chat. A stream cannot be checked beforehand.
        tokenizer: The policy's.
        limit: Positions that the model has.
        max_new_tokens: Tokens per completion.

    Raises:
        ValueError: If the longest prompt and a completion do not fit.
    """
    if not isinstance(dataset, Dataset):
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
