"""Reward modelling: overrides of `trl.RewardTrainer`. The Bradley-Terry loss and its margin are TRL's."""

from typing import Any

import torch
from peft import PeftConfig, TaskType
from torch import nn
from transformers import PreTrainedModel
from trl import RewardTrainer, is_conversational

from rlhf_recipes.algorithm.losses import l2_penalty
from rlhf_recipes.data.margins import check_margins
from rlhf_recipes.data.preferences import readable_preferences
from rlhf_recipes.data.prompts import add_separator, column_names
from rlhf_recipes.data.rendering import for_training
from rlhf_recipes.data.rows import check_rendering, join_prefill
from rlhf_recipes.evaluation.statistics import head_metrics, preference_metrics
from rlhf_recipes.models.reward_model import check_score_layer, load_reward_model_base
from rlhf_recipes.options.changes import with_changes
from rlhf_recipes.options.reward_modeling import RewardModelConfig
from rlhf_recipes.trainers.debiasing import with_length_margins
from rlhf_recipes.trainers.score_heads import COLUMN, DealtPairs, HeadsAsPairs
from rlhf_recipes.trainers.scoring_models import ScoringModelTrainer


class RewardModelTrainer(ScoringModelTrainer, RewardTrainer):
    """Train a reward model on preferences and write its card.

    Adds to `trl.RewardTrainer`: an explicit separator for plain text, the usual initialisation of the head, a float32
    score head that LoRA trains and saves too, an L2 term, the metrics of `evaluation.statistics.preference_metrics`
    over the whole evaluation set, and `reward_model_card.json`.

    Args:
        model: Name or path of a causal LM, which gets a new head, or of a reward model; or a classifier with one
            output, which is used unchanged.
        args: Options; the trainer works with a copy.
        train_dataset: Columns `chosen`, `rejected`, `prompt` unless it is part of them, and optionally `margin`.
        eval_dataset: One dataset with the same columns.
        processing_class: Tokenizer. Default: the model's.
        quantization_config: Passed on to `from_pretrained`.
        peft_config: LoRA or another PEFT method.
        kwargs: Passed on to TRL.

    Raises:
        ValueError: If a column is missing or empty, or the model has several outputs.
    """

    stage, model_type = "reward_modeling", "reward_model"
    _tag_names = ["trl", "reward-trainer", "rlhf-recipes"]
    _method = "reward modelling on pairs of answers"
    _too_large = "`learning_rate` or `l2_coefficient`"
    _head_means: list[float] | None = None  # of the latest evaluation, with several heads

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
        given = (train_dataset, eval_dataset, processing_class, quantization_config, peft_config)
        super().__init__(model, args, *given, **kwargs)
        self._card["score_heads"] = self.model.config.num_labels = args.score_heads
        if args.score_heads > 1:
            self.data_collator: Any = DealtPairs(self.data_collator, args.score_heads, args.seed)

    def _readable(self, dataset: Any, name: str) -> Any:
        return check_margins(readable_preferences(dataset, name), name)

    def _load_base(self, path: str, args: RewardModelConfig, **kwargs: Any) -> PreTrainedModel:
        return load_reward_model_base(path, heads=args.score_heads, **kwargs)

    def _prepare_head(self, model: Any, args: RewardModelConfig) -> None:
        check_score_layer(model)
        if model.config.num_labels != args.score_heads:
            raise ValueError(
                f"The model has `num_labels` {model.config.num_labels}, and `score_heads` is {args.score_heads}: set "
                "`score_heads` to that number, or name the model by its path."
            )
        model.config.num_labels = 1  # TRL accepts no other number

    def _adapter_of_head(self, peft_config: PeftConfig) -> PeftConfig:
        return with_changes(peft_config, task_type=TaskType.SEQ_CLS)  # with TRL's default the head stays frozen

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        names = set(column_names(dataset))
        if "chosen_ids" not in names:  # tokens need none of this
            columns = ("prompt", "chosen", "rejected") if "prompt" in names else ("chosen",)
            check_rendering(dataset, columns, f"{dataset_name}_dataset", processing_class)
            if "prompt" in names:
                dataset = join_prefill(add_separator(dataset, args.response_separator))
            if not is_conversational(next(iter(dataset))):
                processing_class = for_training(processing_class)
        prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        return with_length_margins(prepared) if args.remove_length_bias and dataset_name == "train" else prepared

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Let each head learn from its pairs, add the L2 term, and keep the scores of an evaluation."""
        pairs = HeadsAsPairs(model, self._heads_of(inputs))
        inputs = pairs.inputs(inputs)
        loss, _ = super().compute_loss(pairs, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        scores = pairs.outputs.logits  # (2 pairs, K)
        if self.args.l2_coefficient:
            loss = loss + self.args.l2_coefficient * l2_penalty(scores)
        if not self.model.training:
            chosen, rejected = scores.detach().chunk(2)
            lengths = inputs["attention_mask"].sum(dim=1).to(chosen.dtype).chunk(2)
            batch = torch.cat([chosen, rejected, torch.stack(lengths, dim=1)], dim=1)  # (pairs, 2 K + 2)
            self._eval_batches.append(self.accelerator.gather_for_metrics(batch).cpu())
        return (loss, pairs.outputs) if return_outputs else loss

    def _heads_of(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Return the heads that count for each pair, `(B, M)`: in an evaluation all, because none has learned it."""
        dealt = inputs.get(COLUMN)
        if dealt is not None and self.model.training:
            return dealt
        pairs, device = len(inputs["input_ids"]) // 2, inputs["input_ids"].device
        return torch.arange(self.args.score_heads, device=device).expand(pairs, -1)

    def _figures_of_card(self, metrics: dict[str, float]) -> dict[str, Any]:
        of_heads = {"disagreement": metrics.get("eval_disagreement"), "head_means": self._head_means}
        return super()._figures_of_card(metrics) | of_heads

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics over all pairs of an evaluation."""
        if self._eval_batches:
            heads = self.args.score_heads
            chosen, rejected, lengths = torch.cat(self._eval_batches).split([heads, heads, 2], dim=1)
            metrics = preference_metrics(chosen.mean(dim=1), rejected.mean(dim=1), *lengths.unbind(dim=1))
            if heads > 1:
                metrics |= head_metrics(chosen, rejected)
                self._head_means = torch.cat([chosen, rejected]).mean(dim=0).tolist()
            self._eval_batches.clear()
            # TRL's accuracy is a mean over batches. Ours, over pairs, replaces it.
            self._metrics["eval"].pop("accuracy", None)
            logs.update({f"eval_{name}": value for name, value in metrics.items()})
        super().log(logs, start_time)

    def card_facts(self) -> dict[str, str]:
        """Add the text that the reward model expects."""
        card = self._card
        return super().card_facts() | {
            "reads": "chat messages, in the chat template of the tokenizer"
            if card["conversational"]
            else f"plain text: the prompt, then {card['response_separator']!r}, then the answer"
        }
