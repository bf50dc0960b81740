"""Sample the reference answers with which `reward_shaping: par` compares the answers of PPO."""

from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_recipes.data.prompts import add_separator
from rlhf_recipes.evaluation.policies import sample_answers


def add_reference_answers(
    dataset: Dataset,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int = 4,
    response_separator: str = "\n\n",
    seed: int = 0,
    **generation: Any,
) -> Dataset:
    """Return the data with a column `reference_answers`: a list of answers of a policy to each prompt.

    Args:
        dataset: Prompts in the column `prompt`, text or messages.
        policy: SFT policy, from which PPO starts.
        tokenizer: Its tokenizer, which pads on the left.
        count: Answers per prompt.
        response_separator: Boundary between a plain-text prompt and its answer, the same as in PPO.
        seed: Seed of sampling.
        generation: Options of `rlhf_recipes.evaluation.policies.generate_completions`.
    """
    torch.manual_seed(seed)
    prompts = [prompt for prompt in add_separator(dataset, response_separator)["prompt"] for _ in range(count)]
    _, texts, _ = sample_answers(policy.eval(), tokenizer, prompts, **generation)
    answers = [texts[start : start + count] for start in range(0, len(texts), count)]
    return dataset.add_column("reference_answers", answers)
