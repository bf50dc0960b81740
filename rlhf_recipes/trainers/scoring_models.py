"""What the trainers of models that score have in common: their beginning, their heads in float32, and their cards."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from transformers import PreTrainedModel
from trl import is_conversational

from rlhf_recipes.durability.earlier_run import check_output_dir
from rlhf_recipes.models.adapter_base import check_is_merged
from rlhf_recipes.models.loading import from_pretrained_kwargs, load_tokenizer
from rlhf_recipes.models.quantization import keep_adapter_precision, keep_unpacked
from rlhf_recipes.models.reward_model import ScoreHead, store_in_float32
from rlhf_recipes.models.vocabulary import with_special_tokens
from rlhf_recipes.options.changes import with_changes
from rlhf_recipes.rewards.card import RewardModelCard, chat_template_fingerprint, tokenizer_fingerprint
from rlhf_recipes.trainers.prepared import check_adapter_vocabulary, check_prepared
from rlhf_recipes.trainers.run_identity import IdentifiedTrainer


class ScoringModelTrainer(IdentifiedTrainer):
    """Train a model with a `ScoreHead`, and write its card. A subclass reads the rows and has the loss.

    Args:
        model: Name or path of the model to start from, or a loaded one.
        args: Options; the trainer works with a copy.
        train_dataset: Rows.
        eval_dataset: One dataset with the same columns.
        processing_class: Tokenizer. Default: the model's.
        quantization_config: Passed on to `from_pretrained`.
        peft_config: LoRA or another PEFT method.
        kwargs: Passed on to TRL.
    """

    ends_with_evaluation = True
    _card_type: type[RewardModelCard] = RewardModelCard

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: Any,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> None:
        if train_dataset is None:
            raise ValueError("`train_dataset` is not set.")
        train_dataset = self._readable(train_dataset, "train_dataset")
        eval_dataset = self._readable(eval_dataset, "eval_dataset")
        self.given_data = train_dataset, eval_dataset
        check_output_dir(args.output_dir, adapter=peft_config is not None)
        check_is_merged(peft_config, "`peft_config`")
        self.note_source(model, args)
        options, start = args, model
        args = with_changes(args)  # a copy: TRL writes into options
        if isinstance(model, str):
            torch.manual_seed(args.seed)  # TRL seeds too late for a head that is initialised here
            model = self._load_base(model, args, **from_pretrained_kwargs(args, quantization_config))
            args = with_changes(args, model_init_kwargs=None)  # TRL warns about them beside a loaded model
        self._prepare_head(model, args)
        if processing_class is None:
            processing_class = load_tokenizer(self._source)
        texts = {name: x for name, x in next(iter(train_dataset)).items() if name in ("prompt", "chosen")}
        is_plain = not is_conversational(texts)
        processing_class = with_special_tokens(processing_class, model, args, is_plain=is_plain)
        tokens = len(processing_class)
        if peft_config is not None:
            peft_config = self._adapter_of_head(peft_config)
        self.identify(options, model=start, network=model, peft_config=peft_config, train_dataset=train_dataset)
        self._card: dict[str, Any] = {
            "base_model": self._source,
            "conversational": not is_plain,
            "response_separator": args.response_separator if is_plain else None,
        }
        self._eval_batches: list[Any] = []
        data = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        super().__init__(model, args, **data, processing_class=processing_class, peft_config=peft_config, **kwargs)
        check_adapter_vocabulary(self, tokens)
        check_prepared(self, **data)
        keep_unpacked(self.model)
        keep_adapter_precision(self.model)
        for module in self.model.modules():
            if isinstance(module, ScoreHead):
                store_in_float32(module)  # TRL casts the trained weights of a quantised model to bfloat16

    def _readable(self, dataset: Any, name: str) -> Any:
        """Return a dataset of the user in the form that `_prepare_dataset` takes, after a check. `None` is accepted.

        Args:
            dataset: Dataset.
            name: Name of the argument, for messages.
        """
        raise NotImplementedError

    def _load_base(self, path: str, args: Any, **kwargs: Any) -> PreTrainedModel:
        """Load the model from which the training starts.

        Args:
            path: Directory or Hub name.
            args: Options.
            kwargs: Options of `from_pretrained`.
        """
        raise NotImplementedError

    def _prepare_head(self, model: Any, args: Any) -> None:
        """Check the head of the loaded model, and let TRL take it."""
        raise NotImplementedError

    def _adapter_of_head(self, peft_config: PeftConfig) -> PeftConfig:
        """Return a configuration by which PEFT trains and saves the whole head."""
        raise NotImplementedError

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate; the card keeps the result of the trainer's own evaluation set."""
        self._eval_batches.clear()
        if eval_dataset is not None and not isinstance(eval_dataset, str | dict):
            eval_dataset = self._readable(eval_dataset, "eval_dataset")
        metrics: dict[str, float] = super().evaluate(eval_dataset, *args, **kwargs)
        if eval_dataset is None:
            self._card |= self._figures_of_card(metrics)
        return metrics

    def _figures_of_card(self, metrics: dict[str, float]) -> dict[str, Any]:
        """Return what the card keeps of an evaluation, by the fields of the card."""
        fields = ("score_mean", "score_std", "eval_accuracy", "calibration_error")
        return {name: metrics[f"eval_{name.removeprefix('eval_')}"] for name in fields}

    @property
    def card(self) -> RewardModelCard:
        """Return the facts of the training and the latest evaluation, for users of the model."""
        template = chat_template_fingerprint(self.processing_class) if self._card["conversational"] else None
        return self._card_type(
            **self._card,
            pad_token_id=self.model.config.get_text_config().pad_token_id,
            tokenizer_fingerprint=tokenizer_fingerprint(self.processing_class),
            chat_template_fingerprint=template,
        )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict=state_dict)
        if self.args.should_save:
            self.card.save(Path(output_dir or self.args.output_dir))

    def save_card(self) -> None:
        """Write both cards again, beside the saved model, with the result of the latest evaluation."""
        if self.args.should_save:
            self.card.save(self.args.output_dir)
        super().save_card()
