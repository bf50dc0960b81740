"""The rule for the token at which a reward model's score is read: the last one that is not its padding token.

transformers' classifiers and TRL's training follow this rule with the `pad_token_id` of the model's configuration. A
model without one reads the last token of each row. The reward model's tokenizer has no say, because it can pad with
another token.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_recipes.rewards.card import RewardModelCard


def trained_pad_id(model: Any, tokenizer: PreTrainedTokenizerBase, card: RewardModelCard | None) -> int | None:
    """Return the padding token that the score head of a classifier passes over; `None` if it reads the last token.

    Args:
        model: Classifier.
        tokenizer: Its tokenizer.
        card: Its card, if there is one.

    Raises:
        ValueError: If the card contradicts the model, or if the model says nothing and the tokenizer pads with EOS.
    """
    said = getattr(model.config.get_text_config(), "pad_token_id", None)
    name = model.config._name_or_path or type(model).__name__
    if card is not None and card.pad_token_id not in (None, said):
        raise ValueError(
            f"The score head of {name} was trained with `pad_token_id` {card.pad_token_id}, says its card, but its "
            f"configuration says {said}, so another token would be read. Write the card's number into `config.json`."
        )
    if said is None and tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ValueError(
            f"Nothing says at which token {name} reads its score: its configuration has no `pad_token_id`, and its "
            "tokenizer pads with EOS. Write `pad_token_id` into its `config.json`: "
            f"{tokenizer.eos_token_id} if it was trained to read the token before EOS, else the id of a token that no "
            "text ends with."
        )
    return said


def adapter_pad_id(
    base_config: Any, tokenizer: PreTrainedTokenizerBase, card: RewardModelCard | None, path: str
) -> int | None:
    """Return the same as `trained_pad_id` for a LoRA reward model, whose directory has no model configuration.

    Args:
        base_config: Configuration of the base.
        tokenizer: Tokenizer that was saved beside the adapter.
        card: Its card, if there is one.
        path: Directory of the adapter.

    Raises:
        ValueError: If there is no card, and base and tokenizer name different tokens of which one is EOS.
    """
    ours = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if card is not None:  # TRL's trainer gives the model the padding token of the tokenizer that it saves
        return ours if card.pad_token_id is None else card.pad_token_id
    base = getattr(base_config.get_text_config(), "pad_token_id", None)
    if ours != base and tokenizer.eos_token_id in (ours, base):
        raise ValueError(
            f"Nothing says at which token {path} reads its score: it has no card, its tokenizer pads with {ours}, and "
            f"`pad_token_id` of its base is {base}. Merge the adapter into its base, and write `pad_token_id` into "
            "`config.json`."
        )
    return base


def read_position(token_ids: list[int], pad_id: int | None) -> int:
    """Return the index of the last token that is not `pad_id`. It is 0 if there is none, as in transformers."""
    return next((index for index in range(len(token_ids) - 1, -1, -1) if token_ids[index] != pad_id), 0)


def padded(rows: list[list[int]], filler: int) -> dict[str, Tensor]:
    """Return rows of token ids as the inputs of a model, padded on the right."""
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [filler] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    }


def vocabulary_size(model: Any) -> int:
    """Return the number of tokens for which a model has an embedding."""
    embeddings = getattr(model.get_input_embeddings(), "num_embeddings", None)
    return int(embeddings or model.config.get_text_config().vocab_size)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, size: int, name: str) -> None:
    """Check that a reward model has an embedding for every token of its tokenizer, except the padding token.

    Args:
        tokenizer: Tokenizer of the reward model.
        size: Number of its embeddings.
        name: Name of the reward model.

    Raises:
        ValueError: If it has not.
    """
    vocabulary = tokenizer.get_vocab().items()
    unknown = sorted(token for token, i in vocabulary if i >= size and i != tokenizer.pad_token_id)
    if unknown:
        raise ValueError(
            f"The tokenizer of the reward model {name} has {len(unknown)} tokens for which the model's {size} "
            f"embeddings have none, for example {unknown[0]!r}. Use the tokenizer saved beside the reward model."
        )


def cut_front(row: list[int], limit: int | None, bos_id: int | None) -> list[int]:
    """Return the last `limit` tokens of a row. A BOS token at its beginning stays there."""
    if limit is None or len(row) <= limit:
        return row
    opening = row[:1] if row[0] == bos_id else []
    return opening + row[len(row) - limit + len(opening) :]
