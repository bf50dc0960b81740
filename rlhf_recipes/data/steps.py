"""Steps: where those of an answer end, and the tokens at which a model judges each of them."""

import re
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from rlhf_recipes.data.messages import Text
from rlhf_recipes.data.rendering import prompt_ids

StepBoundary = Literal["separator", "sentence"]
SENTENCE_ENDS = ".!?"


@dataclass(frozen=True)
class StepRule:
    """Say where a step of a text ends.

    Args:
        separator: Text between two steps. The model judges a step at the last token of the separator after it.
        boundary: `separator`: every separator ends a step. `sentence`: only one after ".", "!" or "?".
    """

    separator: str = "\n"
    boundary: StepBoundary = "separator"

    def bounds(self, text: str) -> list[tuple[int, int]]:
        """Return the first character of each step and the one after its last one, without the separators.

        A piece of white space alone is no step. The text after the last separator is one, also if it is unfinished.
        """
        before = f"(?<=[{SENTENCE_ENDS}])" if self.boundary == "sentence" else ""
        breaks = [found.span() for found in re.finditer(before + re.escape(self.separator), text)]
        starts, ends = [0, *(end for _, end in breaks)], [*(start for start, _ in breaks), len(text)]
        return [(start, end) for start, end in zip(starts, ends, strict=True) if text[start:end].strip()]

    def splits(self, steps: list[str]) -> bool:
        """Return whether the joined steps would be split into the same steps again."""
        text = self.separator.join(steps)
        return [text[start:end] for start, end in self.bounds(text)] == steps


def step_token_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Text, steps: list[str], separator: str
) -> tuple[list[int], list[int]]:
    """Return the tokens of a prompt with steps, and the index of the token at which each step is judged.

    Each step and each separator has tokens of its own, so no token lies across an end. A separator follows the last
    step too. TRL's former `PRMTrainer` made the same tokens.

    Args:
        tokenizer: Tokenizer of the model that reads.
        prompt: Text that ends with the separator of the response, or messages.
        steps: Texts of the steps.
        separator: Text between two steps.
    """
    ids, ends = prompt_ids(tokenizer, [prompt])[0], []
    *written, boundary = tokenizer([*steps, separator], add_special_tokens=False)["input_ids"]
    for step in written:
        ids += [*step, *boundary]
        ends.append(len(ids) - 1)
    return ids, ends
