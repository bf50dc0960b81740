"""Sample the reference answers with which `reward_shaping: par` compares the answers of PPO."""

import logging
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_recipes.data.prompts import add_separator
from rlhf_recipes.evaluation.policies import eos_token_ids, sample_answers

logger = logging.getLogger(__name__)


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

    PPO reads a reference answer as a whole one, so those that the length limit has cut are left out, unless a prompt
    has no other.

    Args:
        dataset: Prompts in the column `prompt`, text or messages.
        policy: SFT policy, from which PPO starts.
        tokenizer: Its tokenizer, which pads on the left.
        count: Answers per prompt at most.
        response_separator: Boundary between a plain-text prompt and its answer, the same as in PPO.
        seed: Seed of sampling.
        generation: Options of `rlhf_recipes.evaluation.policies.generate_completions`.
    """
    torch.manual_seed(seed)
    prompts = [prompt for prompt in add_separator(dataset, response_separator)["prompt"] for _ in range(count)]
    ids, texts, _ = sample_answers(policy.eval(), tokenizer, prompts, **generation)
    ends = eos_token_ids(policy, tokenizer)
    starts = range(0, len(texts), count)
    whole = [[texts[i] for i in range(start, start + count) if ids[i][-1] in ends] for start in starts]
    if without := whole.count([]):
        logger.warning(
            f"{without} of {len(whole)} prompts have only reference answers that the length limit has cut, and keep "
            "them: raise `max_completion_length` or `count`."
        )
    answers = [kept or texts[start : start + count] for kept, start in zip(whole, starts, strict=True)]
    return dataset.add_column("reference_answers", answers)
