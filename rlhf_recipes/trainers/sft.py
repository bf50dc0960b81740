"""Supervised fine-tuning: overrides of `trl.SFTTrainer`."""

from typing import Any

from trl import SFTConfig
from trl import SFTTrainer as TRLSFTTrainer

from rlhf_recipes.durability.trainer import DurableTrainer
from rlhf_recipes.models.quantization import keep_unpacked, save_quantization
from rlhf_recipes.models.vocabulary import with_special_tokens
from rlhf_recipes.options.changes import with_changes
from rlhf_recipes.trainers.prepared import check_adapter_vocabulary, check_prepared

TEXT_COLUMNS = ("completion", "text")  # plain text, to which TRL adds the EOS token


class SFTTrainer(DurableTrainer, TRLSFTTrainer):
    """Train as TRL does, but write a checkpoint whole or not at all, also on a quantised base."""

    def __init__(self, model: Any, args: SFTConfig, *more: Any, **kwargs: Any) -> None:
        given = dict(zip(("data_collator", "train_dataset", "eval_dataset"), more, strict=False)) | kwargs
        tokenizer, tokens = given.get("processing_class"), None
        if tokenizer is not None:
            first: dict[str, Any] = next(iter(given.get("train_dataset") or []), {})
            is_plain = any(isinstance(first.get(column), str) for column in TEXT_COLUMNS)
            kwargs["processing_class"] = with_special_tokens(tokenizer, model, args, is_plain=is_plain)
            tokens = len(getattr(tokenizer, "tokenizer", tokenizer))
        super().__init__(model, with_changes(args), *more, **kwargs)  # a copy: TRL writes into options
        if tokens is not None:
            check_adapter_vocabulary(self, tokens)
        check_prepared(self, **{name: given.get(name) for name in ("train_dataset", "eval_dataset")})
        keep_unpacked(self.model)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict=state_dict)
        if self.args.should_save:
            save_quantization(self.model, output_dir or self.args.output_dir)
