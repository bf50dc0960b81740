"""Sample several answers to each prompt, in parts: a part that is on disk is not sampled again."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from rlhf_recipes.console import print_lines
from rlhf_recipes.data.digest import dataset_digest
from rlhf_recipes.data.messages import answer_to
from rlhf_recipes.data.prompts import check_prompts_fit
from rlhf_recipes.data.rows import check_rendering
from rlhf_recipes.durability.notes import read_note, write_whole
from rlhf_recipes.evaluation.labelling import Asked
from rlhf_recipes.evaluation.policies import eos_token_ids, sample_answers
from rlhf_recipes.models.fingerprint import fingerprint
from rlhf_recipes.models.loading import load_policy, load_tokenizer
from rlhf_recipes.models.vocabulary import with_end_token
from rlhf_recipes.options.preferences import PreferenceArguments

FOLDER = "__answers"  # in the output directory; `datasets` takes no data from folders with such names
FACTS = "facts.json"
BATCHES = 16  # of a part: a stop loses little, and a large run has not too many files
# Options that change the answers, beside the policy and the prompts.
SAMPLING = ("max_completion_length", "temperature", "batch_size")


@dataclass(frozen=True)
class Answers:
    """Hold the answers to all prompts, those of a prompt beside each other.

    Args:
        ids: Token ids of each answer, with the EOS at its end unless it was cut off.
        texts: Text of each answer.
        end_ids: Token ids that end an answer.
        policy: Fingerprint of the policy.
    """

    ids: list[list[int]]
    texts: list[str]
    end_ids: list[int]
    policy: str

    @property
    def ended(self) -> float:
        """Return the share of answers that were not cut off."""
        return sum(bool(row) and row[-1] in self.end_ids for row in self.ids) / max(len(self.ids), 1)


def sampled_answers(
    script_args: PreferenceArguments, policy_path: str, prompts: Dataset, **init_kwargs: Any
) -> Answers:
    """Return `num_samples` answers to each prompt. Sample those that are not on disk.

    Each part has random numbers of its own, so a run that was stopped and goes on gives the same answers. Without a
    missing part, the policy is not loaded.

    Args:
        script_args: Options of the recipe.
        policy_path: Directory or Hub name of the policy.
        prompts: Column `prompt`: text that ends with the separator, or messages.
        init_kwargs: Options of `from_pretrained`.

    Raises:
        ValueError: If the output directory holds answers that were sampled otherwise, or if the policy cannot read a
            prompt.
    """
    folder, size = Path(script_args.output_dir, FOLDER), script_args.batch_size * BATCHES
    asked = [prompt for prompt in prompts["prompt"] for _ in range(script_args.num_samples)]
    parts = [asked[start : start + size] for start in range(0, len(asked), size)]
    files = [folder / f"{number:05}.jsonl" for number in range(len(parts))]
    due = [number for number, file in enumerate(files) if not file.exists()]
    # First of all: a model on the Hub has a fingerprint only when it is here.
    policy, tokenizer = _load(script_args, policy_path, prompts, init_kwargs) if due else (None, None)
    facts = _facts(script_args, policy_path, prompts, init_kwargs)
    known = _known_facts(folder, facts)
    if due:
        if len(due) < len(files):
            print_lines(f"{len(files) - len(due)} of {len(files)} parts of the answers are in {folder}: going on.")
        known = {**facts, "end_ids": eos_token_ids(policy, tokenizer)}
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / FACTS, json.dumps(known, indent=1))
        for number in tqdm(due, desc="Parts", disable=None):
            torch.manual_seed(int(np.random.SeedSequence([script_args.seed, number]).generate_state(1)[0]))
            options = {name: getattr(script_args, name) for name in SAMPLING}
            ids, texts, _ = sample_answers(policy, tokenizer, parts[number], **options)
            told = ({"text": text, "ids": row} for text, row in zip(texts, ids, strict=True))
            write_whole(files[number], "".join(json.dumps(each) + "\n" for each in told))
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return Answers(
        [row["ids"] for row in rows], [row["text"] for row in rows], known["end_ids"], facts["model_name_or_path"]
    )


def as_judges_see(answers: Answers, prompts: Dataset) -> Asked:
    """Return answers with their prompts and the other columns of the prompts."""
    samples = len(answers.texts) // len(prompts)
    columns = {name: [value for value in prompts[name] for _ in range(samples)] for name in prompts.column_names}
    asked = columns.pop("prompt")
    given = [answer_to(prompt, text) for prompt, text in zip(asked, answers.texts, strict=True)]
    return Asked(asked, given, answers.ids, columns, samples)


def _load(
    script_args: PreferenceArguments, policy_path: str, prompts: Dataset, init_kwargs: Mapping[str, Any]
) -> tuple[Any, Any]:
    """Return the policy and its tokenizer, which can read the prompts."""
    policy = load_policy(policy_path, **init_kwargs).eval()
    tokenizer = with_end_token(load_tokenizer(policy_path, padding_side="left"), policy)
    check_rendering(prompts, ("prompt",), "dataset_name", tokenizer)
    check_prompts_fit(prompts, tokenizer, policy.config, script_args.max_completion_length, "dataset_name")
    return policy, tokenizer


def _facts(
    script_args: PreferenceArguments, policy_path: str, prompts: Dataset, init_kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what the answers depend on, by the name of the option."""
    facts = {"model_name_or_path": fingerprint(policy_path), "dataset_name": dataset_digest(prompts)}
    facts |= {name: getattr(script_args, name) for name in ("num_samples", "seed", *SAMPLING)}
    loaded = ("dtype", "quantization_config", "attn_implementation")
    return facts | {name: str(init_kwargs[name]) for name in loaded if name in init_kwargs}


def _known_facts(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is known about the answers that are there; nothing without any."""
    known = read_note(folder / FACTS)
    if known is None and any(folder.glob("*.jsonl")):
        raise ValueError(
            f"{folder} has answers without a readable {FACTS}. Delete it, or choose another `output_dir`."
        )
    known = known or {}
    changed = [
        f"`{name}` was {known[name]}, is {value}" for name, value in facts.items() if known.get(name, value) != value
    ]
    if changed:
        raise ValueError(
            f"`output_dir` {folder.parent} holds answers that were sampled otherwise: {'; '.join(changed)}. Use the "
            "same options, or choose another `output_dir`."
        )
    return known
