"""Reward modelling: what `trl.RewardTrainer` lacks.

Overrides only. The Bradley-Terry loss and its margin are TRL's.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, TaskType
from torch import nn
from transformers import PreTrainedModel
from trl import RewardTrainer, is_conversational

from rlhf_recipes.algorithm.losses import l2_penalty
from rlhf_recipes.data.prompts import add_separator, check_columns, column_names
from rlhf_recipes.durability.trainer import DurableTrainer
from rlhf_recipes.evaluation.statistics import preference_metrics
from rlhf_recipes.models.loading import check_output_dir, from_pretrained_kwargs, load_tokenizer
from rlhf_recipes.models.quantization import keep_adapter_precision, keep_unpacked, save_quantization
from rlhf_recipes.models.reward_model import ScoreHead, load_reward_model_base, store_in_float32
from rlhf_recipes.options.reward_modeling import RewardModelConfig
from rlhf_recipes.rewards.card import RewardModelCard, chat_template_fingerprint, tokenizer_fingerprint


class RewardModelTrainer(DurableTrainer, RewardTrainer):
    """Train a reward model on preferences and write its card.

    Adds to `trl.RewardTrainer`: an explicit separator for plain text, the field's head initialisation, a float32 score
    head that is always trained and saved under LoRA, an L2 term, the metrics of
    `evaluation.statistics.preference_metrics` over the whole evaluation set, and `reward_model_card.json`.

    Args:
        model: Name or path of a causal LM (a new head is initialised) or of a reward model, or a classifier instance
            with one output (taken as it is).
        args: Options.
        train_dataset: `chosen`, `rejected` and, unless it is part of them, `prompt`; optionally `margin`.
        eval_dataset: The same, one dataset.
        processing_class: Tokenizer. Default: the model's.
        quantization_config: Passed on to `from_pretrained`.
        peft_config: LoRA or another PEFT method.
        kwargs: Passed on to TRL.

    Raises:
        ValueError: If a column is missing or empty, or the model has several outputs.
    """

    _name = "RewardModel"

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: RewardModelConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> None:
        if train_dataset is None:
            raise ValueError("`train_dataset` is not set.")
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            if dataset is not None:
                self._check_preferences(dataset, name)
        check_output_dir(args.output_dir, adapter=peft_config is not None)
        base_model = model if isinstance(model, str) else model.config._name_or_path
        if isinstance(model, str):
            torch.manual_seed(args.seed)  # TRL seeds too late for a head that is initialised here
            model = load_reward_model_base(model, **from_pretrained_kwargs(args, quantization_config))
        if processing_class is None:
            processing_class = load_tokenizer(base_model)
        if peft_config is not None:
            # For this task PEFT trains and saves the `score` head in full; with TRL's default it would be left frozen.
            peft_config = copy.deepcopy(peft_config)
            peft_config.task_type = TaskType.SEQ_CLS
        example = next(iter(train_dataset))
        self._card = {
            "base_model": base_model,
            "conversational": is_conversational(example),
            "response_separator": None if is_conversational(example) else args.response_separator,
        }
        self._eval_batches: list[torch.Tensor] = []
        own = copy.copy(args)
        own.__dict__.update(model_init_kwargs=None)  # TRL warns of these beside a model that is loaded
        super().__init__(
            model,
            own,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            **kwargs,
        )

        keep_unpacked(self.model)
        keep_adapter_precision(self.model)
        for module in self.model.modules():
            if isinstance(module, ScoreHead):
                store_in_float32(module)  # TRL casts what is trained of a quantised model to bfloat16

    @staticmethod
    def _check_preferences(dataset: Any, name: str) -> None:
        has_prompt = not isinstance(dataset, dict) and "prompt" in column_names(dataset)
        check_columns(dataset, ("prompt", "chosen", "rejected") if has_prompt else ("chosen", "rejected"), name)
        if not has_prompt and not is_conversational(next(iter(dataset))):
            raise ValueError(
                f"`{name}` is plain text without a column 'prompt', so that nothing says where the response begins. "
                "Split it, for example by `dataset.map(trl.extract_prompt)`."
            )

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        if {"prompt", "chosen"} <= set(column_names(dataset)):
            dataset = add_separator(dataset, args.response_separator)
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Add the L2 term, and keep the scores of an evaluation."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        scores = outputs.logits.squeeze(-1)
        if self.args.l2_coefficient:
            loss = loss + self.args.l2_coefficient * l2_penalty(scores)
        if not self.model.training:
            chosen, rejected = scores.detach().chunk(2)
            lengths = inputs["attention_mask"].sum(dim=1).to(chosen.dtype).chunk(2)
            batch = torch.stack([chosen, rejected, *lengths], dim=1)  # (pairs, 4)
            self._eval_batches.append(self.accelerator.gather_for_metrics(batch).cpu())
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate; the card keeps the result on the trainer's own evaluation set."""
        self._eval_batches.clear()
        metrics = super().evaluate(eval_dataset, *args, **kwargs)
        if eval_dataset is None:
            self._card |= {
                "score_mean": metrics["eval_score_mean"],
                "score_std": metrics["eval_score_std"],
                "eval_accuracy": metrics["eval_accuracy"],
            }
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics over all pairs of an evaluation."""
        if self._eval_batches:
            metrics = preference_metrics(*torch.cat(self._eval_batches).unbind(dim=1))
            self._eval_batches.clear()
            # TRL's own accuracy is a mean over batches; ours is over pairs, and replaces it.
            self._metrics["eval"].pop("accuracy", None)
            logs.update({f"eval_{name}": value for name, value in metrics.items()})
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict=state_dict)
        if self.args.should_save:
            self.card.save(Path(output_dir or self.args.output_dir))
            save_quantization(self.model, output_dir or self.args.output_dir)

    @property
    def card(self) -> RewardModelCard:
        """What the reward model was trained with, and its latest evaluation."""
        return RewardModelCard(
            **self._card,
            tokenizer_fingerprint=tokenizer_fingerprint(self.processing_class),
            chat_template_fingerprint=chat_template_fingerprint(self.processing_class)
            if self._card["conversational"]
            else None,
        )
