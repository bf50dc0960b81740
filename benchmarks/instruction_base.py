"""What a run in the world of instructions starts from: questions, and pairs of a chat model's answers."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from instructions import add_instructions, instruction_score

from rlhf_recipes.data.messages import answer_to
from rlhf_recipes.evaluation.policies import sample_answers
from rlhf_recipes.models.loading import load_policy, load_tokenizer
from rlhf_recipes.quickstart.build import sample_preferences

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
ANSWERS = 4  # of each prompt, for the pairs
LORA = {"use_peft": True, "lora_target_modules": "all-linear", "dtype": "bfloat16", "bf16": True}


@dataclass(frozen=True)
class Sizes:
    """The size of a base.

    Args:
        answered: Prompts whose answers are compared.
        held_out_answered: Held-out prompts of the pairs that test the reward model.
        longest: Characters of a question, at most.
        max_completion_length: Tokens of an answer.
        temperature: Temperature of sampling.
    """

    answered: int = 400
    held_out_answered: int = 64
    longest: int = 60
    max_completion_length: int = 40
    temperature: float = 0.7  # at 1, nearly all text of a model this small is noise


def build_base(folder: Path, seed: int, model: Path, data: Path, sizes: Sizes) -> None:
    """Write `sft` (a link to the model), `prompts` and `preferences`. Keep the parts that exist.

    Args:
        folder: Folder of the base.
        seed: Seed of everything.
        model: Instruct model with a chat template.
        data: Directory with `train.jsonl` and `eval.jsonl`, whose rows have chats in the column `prompt`.
        sizes: Sizes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "sft").exists():
        (folder / "sft").symlink_to(model)
    if not (folder / "prompts").exists():
        write_prompts(folder / "prompts", seed, data, sizes)
    if not (folder / "preferences").exists():
        write_preferences(folder, seed, sizes)


def questions(file: Path, longest: int) -> list[str]:
    """Return the last human turns of a file that are short and have one line, each once."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    turns = (row["prompt"][-1]["content"].strip() for row in rows)
    return list(dict.fromkeys(turn for turn in turns if 10 <= len(turn) <= longest and "\n" not in turn))


def write_prompts(folder: Path, seed: int, data: Path, sizes: Sizes) -> None:
    """Join instructions to the questions. No held-out question occurs in training."""
    rng = random.Random(seed)
    train = questions(data / "train.jsonl", sizes.longest)
    held_out = [each for each in questions(data / "eval.jsonl", sizes.longest) if each not in train]
    for split, asked in (("train", train), ("test", held_out)):
        rng.shuffle(asked)
        chats = [[{"role": "user", "content": add_instructions(each, rng)}] for each in asked]
        folder.mkdir(exist_ok=True)
        Dataset.from_dict({"prompt": chats}).to_json(str(folder / f"{split}.jsonl"))


def write_preferences(folder: Path, seed: int, sizes: Sizes) -> None:
    """Sample answers to the first prompts, and label pairs of them by their scores."""
    torch.manual_seed(seed)
    tokenizer = load_tokenizer(str(folder / "sft"), padding_side="left")
    policy = load_policy(str(folder / "sft"), dtype=LORA["dtype"]).eval()
    pairs = {}
    for split, count in (("train", sizes.answered), ("test", sizes.held_out_answered)):
        prompts = Dataset.from_json(str(folder / "prompts" / f"{split}.jsonl"))["prompt"][:count]
        asked = [prompt for prompt in prompts for _ in range(ANSWERS)]
        options = {"max_completion_length": sizes.max_completion_length, "temperature": sizes.temperature}
        _, texts, _ = sample_answers(policy, tokenizer, asked, batch_size=64, **options)
        chosen = differing_pairs(instruction_score(asked, texts), texts)
        columns = [[values[pair[side]] for pair in chosen] for values, side in ((asked, 0), (texts, 0), (texts, 1))]
        rows = sample_preferences(*columns, instruction_score, 1e-6, seed)  # so little noise turns no label
        pairs[split] = Dataset.from_list([{name: as_chat(row, name) for name in row} for row in rows])
    (folder / "preferences").mkdir()
    for split, dataset in pairs.items():
        dataset.to_json(str(folder / "preferences" / f"{split}.jsonl"))


def differing_pairs(scores: Sequence[float], texts: Sequence[str]) -> list[tuple[int, int]]:
    """Return two disjoint pairs of the answers to each prompt, where their scores differ.

    A pair of equal scores would teach nothing: its label is the toss of a coin.
    """
    found = []
    for start in range(0, len(scores), ANSWERS):
        free = list(range(start, start + ANSWERS))
        for first, second in combinations(range(start, start + ANSWERS), 2):
            if {first, second} <= {*free} and scores[first] != scores[second] and texts[first] and texts[second]:
                found.append((first, second))
                free = [each for each in free if each not in (first, second)]
    return found


def as_chat(row: dict[str, Any], column: str) -> Any:
    """Return the prompt of a pair as it is, and an answer as messages."""
    return row[column] if column == "prompt" else answer_to(row["prompt"], row[column])


def as_arguments(options: dict[str, Any]) -> list[str]:
    """Return options as a command line."""
    return [text for key, value in options.items() for text in (f"--{key}", str(value))]
