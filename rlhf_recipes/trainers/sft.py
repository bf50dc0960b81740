"""Supervised fine-tuning: overrides of `trl.SFTTrainer`."""

from typing import Any

from trl import SFTConfig, is_conversational
from trl import SFTTrainer as TRLSFTTrainer

from rlhf_recipes.data.messages import ends_in_prefill
from rlhf_recipes.data.prompts import check_columns, column_names, rows_of
from rlhf_recipes.data.rendering import for_training
from rlhf_recipes.data.rows import check_rendering, readable_rows
from rlhf_recipes.evaluation.figures import evaluation_of
from rlhf_recipes.models.loading import from_pretrained_kwargs, load_causal_lm
from rlhf_recipes.models.quantization import keep_unpacked
from rlhf_recipes.models.safe_loading import safe_loading
from rlhf_recipes.models.vocabulary import inner_tokenizer, with_special_tokens
from rlhf_recipes.options.changes import with_changes
from rlhf_recipes.options.training import check_training
from rlhf_recipes.trainers.prepared import check_adapter_vocabulary, check_prepared
from rlhf_recipes.trainers.run_identity import IdentifiedTrainer

TEXT_COLUMNS = ("completion", "text")  # plain text, to which TRL adds the EOS token


class SFTTrainer(IdentifiedTrainer, TRLSFTTrainer):
    """Train as TRL does, but write a checkpoint whole or not at all, also on a quantised base."""

    stage, ends_with_evaluation = "sft", True
    _tag_names = ["trl", "sft", "rlhf-recipes"]
    _method = "supervised fine-tuning"

    def __init__(self, model: Any, args: SFTConfig, *more: Any, **kwargs: Any) -> None:
        check_training(args)
        self.note_source(model, args)
        given = dict(zip(("data_collator", "train_dataset", "eval_dataset"), more, strict=False)) | kwargs
        self.given_data = given.get("train_dataset"), given.get("eval_dataset")
        tokenizer, tokens = given.get("processing_class"), None
        if tokenizer is not None:
            first: dict[str, Any] = next(iter(given.get("train_dataset") or []), {})
            is_plain = any(isinstance(first.get(column), str) for column in TEXT_COLUMNS)
            kwargs["processing_class"] = with_special_tokens(tokenizer, model, args, is_plain=is_plain)
            tokens = len(inner_tokenizer(tokenizer))
        own, start = with_changes(args), model  # a copy: TRL writes into options
        if isinstance(model, str):
            with safe_loading(model):
                model = load_causal_lm(model, from_pretrained_kwargs(args, kwargs.pop("quantization_config", None)))
            own = with_changes(own, model_init_kwargs=None)  # TRL warns about them beside a loaded model
        rows, peft_config = given.get("train_dataset"), given.get("peft_config")
        self.identify(args, model=start, network=model, peft_config=peft_config, train_dataset=rows)
        super().__init__(model, own, *more, **kwargs)
        self.args = with_changes(self.args, model_init_kwargs=args.model_init_kwargs)
        if tokens is not None:
            check_adapter_vocabulary(self, tokens)
        check_prepared(self, **{name: given.get(name) for name in ("train_dataset", "eval_dataset")})
        keep_unpacked(self.model)

    def conclude(self) -> dict[str, float]:
        """Save the trained model, and return its evaluation: that of the training, if it has made one of it."""
        latest = evaluation_of(self.state.log_history, self.best_step or self.state.global_step)
        if not latest:
            return super().conclude()
        self.save_model(self.args.output_dir)
        return {name: value for name, value in latest.items() if name.startswith("eval_")}

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        if formatting_func is None and "input_ids" not in column_names(dataset):
            dataset = _readable_demonstrations(
                dataset, processing_class, f"{dataset_name}_dataset", args.dataset_text_field
            )
            if not is_conversational(next(iter(dataset))):
                processing_class = for_training(processing_class)
        return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)


def _readable_demonstrations(dataset: Any, tokenizer: Any, name: str, text: str) -> Any:
    """Return demonstrations as text or plain messages, and check that the tokenizer renders them whole."""
    names = column_names(dataset)
    if "conversations" in names and "messages" not in names:
        dataset = dataset.rename_column("conversations", "messages")  # TRL does the same
    known = (("prompt", "completion"), ("messages",))
    columns = next((c for c in known if set(c) <= set(column_names(dataset))), ())
    if not columns:
        if text not in names:
            raise ValueError(
                f"`{name}` has neither 'prompt' and 'completion', nor 'messages', nor {text!r}; it has "
                f"{', '.join(map(repr, names))}. Rename the columns (`dataset.rename_column`)."
            )
        check_columns(dataset, (text,), name)
        return dataset
    sees_images = hasattr(tokenizer, "tokenizer")  # a processor holds a tokenizer
    dataset = readable_rows(dataset, columns, name, keep_parts=sees_images)
    if not sees_images:
        check_rendering(dataset, columns, name, tokenizer, reads_options=True)
    prompts = rows_of(dataset, ("prompt",)) if "prompt" in columns else ()
    row = next((row for row, (prompt,) in enumerate(prompts) if ends_in_prefill(prompt)), None)
    if row is not None:
        raise ValueError(
            f"`{name}` has a 'prompt' in row {row} that ends with a message of the assistant, and TRL would begin "
            "another one. Move the message to the beginning of `completion`."
        )
    return dataset
