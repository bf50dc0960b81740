"""Check the rows that TRL has tokenised, before training."""

from typing import Any

from datasets import Dataset
from peft import PeftModel

from rlhf_recipes.data.prompts import column_names
from rlhf_recipes.data.tokens import check_rows
from rlhf_recipes.models.loading import position_limit
from rlhf_recipes.models.vocabulary import check_padding, inner_tokenizer


def check_prepared(trainer: Any, **given: Any) -> None:
    """Check that rows are left to train and to evaluate on, and that the model can read them.

    TRL leaves out pairs that are longer than `max_length`, and rows whose prompt alone is.

    Args:
        trainer: Trainer that has tokenised its data.
        given: Datasets of the user, by the name of the argument.

    Raises:
        ValueError: If no row of a dataset is left, or a row has a token or a position that the model does not have.
    """
    check_padding(trainer.processing_class, trainer.model.config)
    for name, dataset in given.items():
        prepared = getattr(trainer, name)
        splits = {f"{name}[{key!r}]": key for key in dataset} if isinstance(dataset, dict) else {name: None}
        for title, key in splits.items():
            _check_split(
                trainer, dataset if key is None else dataset[key], prepared if key is None else prepared[key], title
            )


def check_adapter_vocabulary(trainer: Any, tokens_before: int) -> None:
    """Refuse to train an adapter on new tokens whose embedding is the output layer too: TRL cannot run it.

    Args:
        trainer: Trainer, after TRL has taken over the template of `chat_template_path`.
        tokens_before: Number of tokens of the tokenizer before that.

    Raises:
        ValueError: If the template brought tokens.
    """
    tokenizer = inner_tokenizer(trainer.processing_class)
    added, config = len(tokenizer) - tokens_before, trainer.model.config.get_text_config()
    if added > 0 and config.tie_word_embeddings and isinstance(trainer.model, PeftModel):
        raise ValueError(
            f"`chat_template_path` {trainer.args.chat_template_path} adds {added} tokens, which an adapter cannot "
            "learn where input and output share their embedding. Train the whole model (`use_peft: false`), add the "
            "tokens to the base first (`trl.clone_chat_template`), or name a template file (`.jinja`)."
        )


def _check_split(trainer: Any, given: Any, prepared: Any, name: str) -> None:
    limit = trainer.args.max_length
    if prepared is not None and next(iter(prepared), None) is None:
        count = f"{len(given):,} of {len(given):,}" if isinstance(prepared, Dataset) else "All"
        raise ValueError(
            f"{count} {'pairs' if 'chosen' in column_names(given) else 'rows'} are longer than `max_length` ({limit}) "
            f"tokens, so row 0 of `{name}` and all others are left out. Raise `max_length`, or shorten the texts."
        )
    if not isinstance(prepared, Dataset):
        return
    positions = None if "seq_lengths" in prepared.column_names else position_limit(trainer.model)  # packed rows
    if positions is not None and limit is not None and limit <= positions:
        positions = None
    tokenizer = inner_tokenizer(trainer.processing_class)
    vocab_size = getattr(trainer.model.config.get_text_config(), "vocab_size", None)
    check_rows(prepared, tokenizer, vocab_size, positions, name)
