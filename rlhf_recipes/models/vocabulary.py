"""The tokens of a model and of its tokenizer: the rows of the embedding, and the token that ends an answer."""

import copy
from itertools import chain
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase


def fit_to_adapter(base: PreTrainedModel, adapter: str) -> PreTrainedModel:
    """Give a base the rows that its adapter was saved with, in place.

    Tokens that were added before the training of an adapter are rows of its embedding, which PEFT saves beside it. The
    base on the disk does not have them.

    Args:
        base: Model that was loaded from the base of the adapter.
        adapter: Directory of the adapter.

    Raises:
        ValueError: If the directory does not hold the weights of the adapter.
    """
    weights = Path(adapter, SAFETENSORS_WEIGHTS_NAME)
    if not weights.is_file():
        raise ValueError(f"{adapter} is an adapter without its weights ({weights.name}): copy the whole directory.")
    tables = [table for table in (base.get_input_embeddings(), base.get_output_embeddings()) if table is not None]
    owners = [f"base_model.model.{name}" for name, module in base.named_modules() if module in tables]
    names = {f"{owner}{inside}.weight" for owner in owners for inside in ("", ".token_adapter.base_layer")}
    with safe_open(weights, framework="pt") as file:
        rows = max((file.get_slice(name).get_shape()[0] for name in names & set(file.keys())), default=0)
    if rows > base.config.get_text_config().vocab_size:
        base.resize_token_embeddings(rows, mean_resizing=False)  # the adapter brings the values
    return base


def with_end_token(tokenizer: Any, model: Any) -> Any:
    """Return a tokenizer whose EOS token ends an answer: if it has none, a copy with that of the model.

    Args:
        tokenizer: Tokenizer, or processor that holds one.
        model: Model, or its directory or name.
    """
    inner = inner_tokenizer(tokenizer)
    if inner.eos_token_id is not None or (token := _end_token(inner, model)) is None:
        return tokenizer
    own = copy.deepcopy(tokenizer)
    inner_tokenizer(own).eos_token = token
    if inner_tokenizer(own).pad_token is None:
        inner_tokenizer(own).pad_token = token
    return own


def _end_token(tokenizer: PreTrainedTokenizerBase, model: Any) -> str | None:
    """Return the first EOS token of a model's configuration that the tokenizer knows."""
    if isinstance(model, str):
        try:
            configs = [AutoConfig.from_pretrained(model, trust_remote_code=False)]
        except (OSError, ValueError):
            return None
    else:
        configs = [getattr(model, "generation_config", None), model.config.get_text_config()]
    ids = chain(*(_as_list(getattr(config, "eos_token_id", None)) for config in configs))
    return next((tokenizer.convert_ids_to_tokens(token) for token in ids if token < len(tokenizer)), None)


def _as_list(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def inner_tokenizer(tokenizer: Any) -> PreTrainedTokenizerBase:
    """Return the tokenizer that a processor holds, and any other tokenizer as it is."""
    return getattr(tokenizer, "tokenizer", tokenizer)


def with_special_tokens(tokenizer: Any, model: Any, args: Any, *, is_plain: bool) -> Any:
    """Return a tokenizer by which a text can end and be padded, see `with_end_token`.

    Args:
        tokenizer: Tokenizer, or processor that holds one.
        model: Model, or its directory or name.
        args: Options of a trainer, which may name the tokens (`eos_token`, `pad_token`).
        is_plain: Whether the rows are plain text, to which the trainer adds the EOS token. A chat template needs none.

    Raises:
        ValueError: If a token is missing.
    """
    needs_padding = inner_tokenizer(tokenizer).pad_token is None and args.pad_token is None
    if args.eos_token is not None or not (is_plain or needs_padding):
        return tokenizer
    tokenizer = with_end_token(tokenizer, model)
    if inner_tokenizer(tokenizer).eos_token is None:
        name, what = ("EOS", "end") if is_plain else ("padding", "be padded")
        raise ValueError(
            f"The tokenizer has no {name} token, so no text can {what}. Set `{'eos' if is_plain else 'pad'}_token` to "
            "a token of its vocabulary."
        )
    return tokenizer


def check_padding(tokenizer: Any, config: Any) -> None:
    """Check that a model has a row for the padding token.

    Raises:
        ValueError: If it has none.
    """
    inner, vocab_size = inner_tokenizer(tokenizer), getattr(config.get_text_config(), "vocab_size", None)
    if vocab_size is not None and inner.pad_token_id is not None and inner.pad_token_id >= vocab_size:
        raise ValueError(
            f"The padding token {inner.pad_token!r} (id {inner.pad_token_id}) is outside the model's vocabulary of "
            f"{vocab_size} tokens. Use a token of the vocabulary (`tokenizer.pad_token = tokenizer.eos_token`), or "
            "resize the model (`model.resize_token_embeddings(len(tokenizer))`)."
        )
