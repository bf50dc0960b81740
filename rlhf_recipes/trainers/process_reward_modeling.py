"""Process reward modelling: overrides of `trl.RewardTrainer`, whose loss of pairs is replaced by one of steps.

TRL has had no trainer for this since it removed `PRMTrainer`. Its trainer of reward models has all the rest.
"""

from typing import Any

import torch
from datasets import Dataset, Features, List, Value
from peft import PeftConfig, TaskType
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import RewardTrainer
from trl.trainer.utils import pad

from rlhf_recipes.algorithm.steps import UNLABELLED, agreements, log_odds_of, step_loss, step_rewards
from rlhf_recipes.data.prompts import add_separator, column_names
from rlhf_recipes.data.rows import check_rendering
from rlhf_recipes.data.steps import StepRule, step_token_ids
from rlhf_recipes.data.stepwise import check_steps, readable_steps
from rlhf_recipes.evaluation.steps import step_metrics
from rlhf_recipes.models.process_reward_model import check_step_head, load_process_reward_model_base, with_one_output
from rlhf_recipes.options.changes import with_changes
from rlhf_recipes.options.process_reward_modeling import ProcessRewardModelConfig
from rlhf_recipes.rewards.steps import ProcessRewardModelCard
from rlhf_recipes.trainers.scoring_models import ScoringModelTrainer

# Without this, `map` gives the labels of tokens the type of the labels of steps: often that of truth values.
TOKENISED = Features({"input_ids": List(Value("int64")), "labels": List(Value("float32"))})


class ProcessRewardModelTrainer(ScoringModelTrainer, RewardTrainer):
    """Train a model that judges the steps of an answer, and write its card.

    The model is a token classifier with one output, the log-odds that a step is right. It is read at the last token of
    the separator after each step. The loss is the mean binary cross-entropy over all labelled steps of an optimiser
    step, however the batch is cut. TRL's former trainer had two outputs and took hard labels only. Their difference is
    the same log-odds and has the same loss.

    Args:
        model: Name or path of a causal LM, which gets a new head, or of a process reward model; or a token classifier.
        args: Options; the trainer works with a copy.
        train_dataset: Columns `prompt` (text or messages), `completions` (the steps of an answer) and `labels` (for
            each step true, false or the probability that it is right).
        eval_dataset: One dataset with the same columns.
        processing_class: Tokenizer. Default: the model's.
        quantization_config: Passed on to `from_pretrained`.
        peft_config: LoRA or another PEFT method.
        kwargs: Passed on to TRL.

    Raises:
        ValueError: If a column is missing or wrong, or the model does not judge tokens.

    Source: Lightman et al. 2023, arXiv:2305.20050; Wang et al. 2024, arXiv:2312.08935, eq. 2.
    """

    stage, model_type = "process_reward_modeling", "process_reward_model"
    loss_is_scaled_for_ga = True  # `step_loss` divides by the steps of all micro-batches
    _tag_names = ["trl", "process-reward-trainer", "rlhf-recipes"]
    _method = "process reward modelling on labelled steps"
    _card_type = ProcessRewardModelCard

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: ProcessRewardModelConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> None:
        self.rule = StepRule(args.step_separator, args.step_boundary)
        given = (train_dataset, eval_dataset, processing_class, quantization_config, peft_config)
        super().__init__(model, args, *given, data_collator=StepCollator(args.pad_to_multiple_of), **kwargs)
        self.compute_loss_func = self._step_loss
        self._card |= {name: getattr(args, name) for name in ("step_separator", "step_boundary", "step_reward")}

    def _readable(self, dataset: Any, name: str) -> Any:
        return readable_steps(dataset, name, self.rule)

    def _load_base(self, path: str, args: ProcessRewardModelConfig, **kwargs: Any) -> PreTrainedModel:
        return load_process_reward_model_base(path, **kwargs)

    def _prepare_head(self, model: Any, args: ProcessRewardModelConfig) -> None:
        check_step_head(model)
        with_one_output(model)

    def _adapter_of_head(self, peft_config: PeftConfig) -> PeftConfig:
        return for_tokens(peft_config)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        names, name = column_names(dataset), f"{dataset_name}_dataset"
        if "input_ids" in names:
            return dataset
        check_rendering(dataset, ("prompt",), name, processing_class)
        dataset = add_separator(dataset, args.response_separator)

        def tokenize(example: dict[str, Any], row: int) -> dict[str, Any]:
            steps, labels = example["completions"], example["labels"]
            check_steps(steps, labels, row, name)  # of a stream, only the first row was checked before
            ids, ends = step_token_ids(processing_class, example["prompt"], steps, args.step_separator)
            of_tokens = [float(UNLABELLED)] * len(ids)
            for end, label in zip(ends, labels, strict=True):
                if not (args.train_on_last_step_only and dataset_name == "train") or end == ends[-1]:
                    of_tokens[end] = float(label)
            return {"input_ids": ids, "labels": of_tokens}

        options = {"num_proc": args.dataset_num_proc} if isinstance(dataset, Dataset) else {}
        dataset = dataset.map(tokenize, with_indices=True, remove_columns=names, features=TOKENISED, **options)
        if args.max_length is None:
            return dataset
        return dataset.filter(lambda example: len(example["input_ids"]) <= args.max_length, **options)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "labels"]

    def _step_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """Return the loss, in the form in which transformers takes one."""
        return step_loss(log_odds_of(outputs.logits), labels, num_items_in_batch)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of steps, by the method of transformers: that of TRL is about pairs."""
        labels, given = inputs["labels"], {**inputs, "use_cache": False}
        loss, outputs = super(RewardTrainer, self).compute_loss(model, given, True, num_items_in_batch)
        odds = log_odds_of(outputs.logits.detach())
        if self.model.training:
            agreeing, labelled = self.accelerator.gather(agreements(odds, labels)).view(-1, 2).sum(0)
            self._metrics["train"]["accuracy"].append((agreeing / labelled).item())
        else:
            labels = self.accelerator.pad_across_processes(labels, dim=1, pad_index=UNLABELLED)
            odds = self.accelerator.pad_across_processes(odds, dim=1)
            odds, labels = self.accelerator.gather_for_metrics((odds, labels))
            self._eval_batches.append((odds.cpu(), labels.cpu()))
        return (loss, outputs) if return_outputs else loss

    def _figures_of_card(self, metrics: dict[str, float]) -> dict[str, Any]:
        return super()._figures_of_card(metrics) | {"first_error_f1": metrics.get("eval_first_error_f1")}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics over all steps of an evaluation. Its loss is over all steps too, and not over batches."""
        if self._eval_batches:
            rows = [row for odds, labels in self._eval_batches for row in zip(odds, labels, strict=True)]
            self._eval_batches.clear()
            odds = [odds[labels != UNLABELLED].float() for odds, labels in rows]
            scores = [step_rewards(row, self.args.step_reward).sum().item() for row in odds]
            labels = [labels[labels != UNLABELLED].numpy() for _, labels in rows]
            metrics = step_metrics([row.numpy() for row in odds], labels, scores)
            logs.update({f"eval_{name}": value for name, value in metrics.items()})
        super().log(logs, start_time)

    def card_facts(self) -> dict[str, str]:
        """Add the text that the model expects, and where it judges a step."""
        card, boundary = self._card, {"separator": "at every", "sentence": "behind a sentence, at a"}
        prompt = "chat messages" if card["conversational"] else f"the prompt, then {card['response_separator']!r}"
        return super().card_facts() | {
            "reads": f"{prompt}, then each step, with {self.rule.separator!r} after it",
            "splits an answer": f"{boundary[self.rule.boundary]} {self.rule.separator!r}",
            "judges a step": "at the last token of the separator after it, by the log-odds that it is right",
        }


def for_tokens(peft_config: PeftConfig) -> PeftConfig:
    """Return a configuration by which PEFT trains and saves the whole head, and adds no adapter to it."""
    changes: dict[str, Any] = {"task_type": TaskType.TOKEN_CLS}
    if getattr(peft_config, "target_modules", None) == "all-linear":  # PEFT leaves out only heads of whole texts
        others = peft_config.exclude_modules or []
        is_pattern = isinstance(others, str)
        changes["exclude_modules"] = rf"({others})|(.*\.)?score" if is_pattern else [*others, "score"]
    return with_changes(peft_config, **changes)


class StepCollator:
    """Pad tokenised rows on the right.

    Args:
        multiple: Number of which the length of a batch is a multiple, if there is one.
    """

    def __init__(self, multiple: int | None) -> None:
        self.multiple = multiple

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the inputs of the model, and the labels of the tokens."""
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        labels = [torch.tensor(row["labels"], dtype=torch.float32) for row in rows]
        masks = [torch.ones_like(row) for row in ids]
        return {
            "input_ids": pad(ids, 0, pad_to_multiple_of=self.multiple),
            "attention_mask": pad(masks, 0, pad_to_multiple_of=self.multiple),
            "labels": pad(labels, UNLABELLED, pad_to_multiple_of=self.multiple),
        }
