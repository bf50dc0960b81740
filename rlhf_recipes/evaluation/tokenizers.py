"""Check that two policies read and write the same tokens, so that one can score the answers of the other."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rlhf_recipes.data.messages import as_text
from rlhf_recipes.models.loading import load_tokenizer

COMPARED = 32  # prompts that both tokenise


def check_baseline(tokenizer: PreTrainedTokenizerBase, path: str, config: Any, dataset: Dataset) -> None:
    """Check that a baseline has the tokenizer of the policy, which reads and writes for both.

    Args:
        tokenizer: Tokenizer of the policy.
        path: Directory or name of the baseline. Without a tokenizer beside it, there is nothing to compare.
        config: Configuration of the baseline.
        dataset: Prompts, which both must tokenise in the same way.

    Raises:
        ValueError: If they differ. The message names a token or a text.
    """
    if Path(path).is_dir() and not any(Path(path).glob("tokenizer*")):
        return
    baseline = load_tokenizer(path)
    difference = differing_token(tokenizer, baseline, config.get_text_config().vocab_size) or differing_text(
        tokenizer, baseline, [as_text(prompt) for prompt in dataset[:COMPARED]["prompt"]]
    )
    if difference is not None:
        raise ValueError(
            f"`baseline_path` {path} has another tokenizer than the policy: {difference}. The KL between them cannot "
            "be measured. Name a baseline with the policy's tokenizer, usually the model that its training began with."
        )


def differing_token(policy: PreTrainedTokenizerBase, baseline: PreTrainedTokenizerBase, rows: int) -> str | None:
    """Return a token that the baseline does not have, or has by another id, as a clause. It has `rows` tokens."""
    ours, theirs = policy.get_vocab(), baseline.get_vocab()
    names = {token_id: token for token, token_id in theirs.items()}
    for token, token_id in sorted(ours.items(), key=lambda entry: entry[1]):  # their order changes
        other = names.get(token_id, token)
        if other != token:
            return f"token {token_id} is {token!r} for the policy and {other!r} for the baseline"
        if token not in theirs and token_id >= rows:
            return f"the baseline has no token {token_id} ({token!r})"
    return None


def differing_text(policy: PreTrainedTokenizerBase, baseline: PreTrainedTokenizerBase, texts: list[str]) -> str | None:
    """Return a text that has other tokens for each, as a clause."""
    for text in texts:
        ours, theirs = (x(text, add_special_tokens=False)["input_ids"] for x in (policy, baseline))
        if ours != theirs:
            return f"they split {text[:40]!r} into other tokens"
    return None
