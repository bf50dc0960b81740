"""TRL's RLOO, GRPO and DPO with the rewards, the evaluation and the checkpoints of PPO, to compare PPO with them.

Losses and defaults are TRL's, except that RLOO and GRPO have no dropout. The figures of an
evaluation have the names of PPO's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import nan
from typing import Any

import torch
import trl
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import is_conversational
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import use_adapter

from rlhf_recipes.algorithm.distributed import global_means, global_sum
from rlhf_recipes.algorithm.kl import estimate_kl
from rlhf_recipes.data.loading import first_of_each_prompt
from rlhf_recipes.data.rendering import for_training
from rlhf_recipes.data.rows import join_prefill
from rlhf_recipes.evaluation.policies import completion_logps, eos_token_ids, sample_answers
from rlhf_recipes.evaluation.samples import reward_columns, sample_rows
from rlhf_recipes.models.generation import check_generation_kwargs
from rlhf_recipes.options.baselines import DPOConfig
from rlhf_recipes.rewards.context import check_context
from rlhf_recipes.rewards.functions import weighted_scores
from rlhf_recipes.trainers.compared import RolloutTrainer
from rlhf_recipes.trainers.prepared import check_prepared
from rlhf_recipes.trainers.rollout import own_part
from rlhf_recipes.trainers.setup import REFERENCE_ADAPTER, check_rollout_fits
from rlhf_recipes.trainers.stock import Baseline, Scoring, checked_rewards, prepared

LOGGED_SAMPLES = 16  # completions of the latest rollout in the table of each log


class SamplingBaseline(Baseline, RolloutTrainer):
    """Score the completions of one of TRL's trainers, which is the next base, as PPO scores its own.

    Args:
        model: Directory or name of the policy.
        args: Options of TRL's trainer.
        scoring: Rewards and judges.
        train_dataset: `prompt`, plain text or messages.
        eval_dataset: `prompt`, plain text or messages.
        processing_class: Tokenizer of the policy.
        peft_config: LoRA or another PEFT method.
        callbacks: Callbacks.

    Raises:
        ValueError: If data, policy or reward model do not fit. The error comes before training.
    """

    beta: float
    eos_token_ids: list[int]
    reward_weights: Tensor
    _progress_file = "baseline_progress_{}.pt"

    def __init__(
        self,
        model: str,
        args: Any,
        scoring: Scoring,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        processing_class: Any = None,
        peft_config: Any = None,
        callbacks: Any = None,
    ) -> None:
        check_rollout_fits(train_dataset, args)
        check_generation_kwargs(args)
        options: dict[str, Any] = {"tokenizer": processing_class, "peft_config": peft_config}
        parts = prepared(model, args, scoring, train_dataset, eval_dataset, columns=("prompt",), **options)
        rewards = checked_rewards(scoring, args, parts["train_dataset"])
        self.identify_baseline(model, args, parts, rewards, scoring.limits)
        super().__init__(reward_funcs=list(rewards), callbacks=callbacks, **parts)
        # TRL calls these: the reward functions, with time limits and retries.
        self.reward_funcs = self.prepare_rewards(
            rewards, scoring.limits, self.eos_token_ids, scoring.judges, scoring.pairwise_judges
        )
        self._stateful = {"held_out": self.held_out}
        self._samples = []

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: list[list[int]]
    ) -> Tensor:
        rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._log_metrics({f"rewards/{name}": value for name, value in self.reward_calls.settle().items()})
        scores = weighted_scores(rewards_per_func, self.reward_weights.to(rewards_per_func.device))
        self._log_metrics({"objective/scores": scores.nanmean().item()})
        self._log_counts(int((~scores.isnan()).sum()), ["objective/scores"])
        if self.model.training:
            self.reward_calls.check_any_scored(scores)
        answers = (prompts, completions, completion_ids_list)
        rewards = dict(zip(self.reward_func_names, rewards_per_func.unbind(dim=1), strict=True))
        named = reward_columns(rewards) | {"score": scores}
        cut = torch.tensor([ids[-1] not in self.eos_token_ids for ids in completion_ids_list])
        rows = sample_rows(*answers, {name: own_part(values) for name, values in named.items()}, cut)
        if self.model.training:
            self._samples = rows[:LOGGED_SAMPLES]
        else:
            self.held_out.add(rows, inputs, *answers)
        return rewards_per_func


class RLOOTrainer(SamplingBaseline, trl.RLOOTrainer):
    """Train by TRL's RLOO."""

    stage = "rloo"
    _method = "RLOO"

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        return self.rendered(prompts, super()._tokenize_prompts)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        if self.beta != 0.0:
            tokens = batch["completion_mask"].sum(dim=1)
            total, count = global_sum(torch.stack([tokens.sum(), (tokens > 0).sum()])).tolist()
            # TRL has logged the mean of k1 over tokens. Ours is the mean over completions of its sum.
            per_token = self._metrics["train" if self.model.training else "eval"]["kl"][-1]
            self._log_metrics({"objective/kl": per_token * total / (count or 1)})
            self._log_counts(count, ["objective/kl"])
        return batch


class GRPOTrainer(SamplingBaseline, trl.GRPOTrainer):
    """Train by TRL's GRPO."""

    stage = "grpo"
    _method = "GRPO"

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        return self.rendered(prompts, super()._tokenize_prompts)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        mask = batch["completion_mask"]
        if "ref_per_token_logps" in batch and (logps := self._sampled_logps(batch)) is not None:
            k1 = estimate_kl(logps, batch["ref_per_token_logps"], "k1")
            count, (kl,) = global_means(mask.any(dim=1), (k1 * mask).sum(dim=1))
            self._log_metrics({"objective/kl": kl})
            self._log_counts(count, ["objective/kl"])
        return batch

    def _sampled_logps(self, batch: dict[str, Any]) -> Tensor | None:
        """Return the log-probabilities of the policy that sampled; `None` if only a further forward could tell them.

        An evaluation has that forward.
        """
        if "old_per_token_logps" in batch or self.model.training:
            return batch.get("old_per_token_logps")
        ids, mask = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], dim=1) for x in ("ids", "mask"))
        count, size = batch["completion_ids"].size(1), self.args.per_device_eval_batch_size
        return self._get_per_token_logps_and_entropies(self.model, ids, mask, count, size)[0]


class DPOTrainer(Baseline, trl.DPOTrainer):
    """Train by TRL's DPO on preference pairs. Answer the prompts of the evaluation pairs, which TRL's DPO never does.

    Args:
        model: Directory or name of the policy.
        args: Options of TRL's trainer, and the length of an answer.
        scoring: Rewards and judges of the evaluation.
        train_dataset: `prompt`, `chosen`, `rejected`, plain text or messages.
        eval_dataset: The same columns.
        processing_class: Tokenizer of the policy.
        peft_config: LoRA or another PEFT method.
        callbacks: Callbacks.

    Raises:
        ValueError: If data, policy or reward model do not fit, or if nothing scores the answers of an evaluation.
    """

    stage = "dpo"
    _method = "DPO"

    @classmethod
    def rows(cls, dataset: Dataset) -> Dataset:
        """Return the pairs as they are."""
        return dataset

    def __init__(
        self,
        model: str,
        args: DPOConfig,
        scoring: Scoring,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        processing_class: Any = None,
        peft_config: Any = None,
        callbacks: Any = None,
    ) -> None:
        self.given_data = train_dataset, eval_dataset
        columns = ("prompt", "chosen", "rejected")
        options: dict[str, Any] = {"tokenizer": processing_class, "peft_config": peft_config}
        parts = prepared(model, args, scoring, train_dataset, eval_dataset, columns=columns, **options)
        evaluates = args.eval_strategy != "no"
        if (
            evaluates
            and args.precompute_ref_log_probs
            and not isinstance(parts["model"], PeftModel)
            and not peft_config
        ):
            raise ValueError(
                "`precompute_ref_log_probs` removes the reference, to which an evaluation measures the KL: leave it "
                "out, or set `eval_strategy: no`."
            )
        if evaluates and (is_deepspeed_zero3_enabled() or args.fsdp):
            raise ValueError(
                "DPO's evaluation needs whole weights on each process: use DDP or ZeRO-2, or set `eval_strategy: no` "
                "and judge the trained policy by `rlhf evaluate`."
            )
        rewards = checked_rewards(scoring, args, parts["train_dataset"]) if evaluates or scoring.rewards else []
        self._held_out_prompts = first_of_each_prompt(parts["eval_dataset"]) if evaluates else None
        self.identify_baseline(model, args, parts, rewards, scoring.limits)
        super().__init__(callbacks=callbacks, **parts)
        check_prepared(self, train_dataset=parts["train_dataset"], eval_dataset=parts["eval_dataset"])
        self._end_ids = eos_token_ids(parts["model"], processing_class)
        judges = (scoring.judges, scoring.pairwise_judges)
        functions = self.prepare_rewards(rewards, scoring.limits, self._end_ids, *judges)
        self._functions = [self.reward_calls.readable(call) for call in functions]
        self._stateful = {"held_out": self.held_out}

    def _check_context(self, reward_overflow: str) -> None:
        functions, answered = [*self.scorers, *self.held_out.judges.values()], {"eval_dataset": self._held_out_prompts}
        check_context(functions, answered, self.args.max_completion_length, reward_overflow)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        dataset = join_prefill(dataset)
        if not is_conversational(next(iter(dataset))):
            processing_class = for_training(processing_class)
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)

    def answer_held_out(self) -> None:
        """Answer the held-out prompts, and score the answers. Each process does its share."""
        tokenizer, inputs = self.processing_class, self._own_prompts()
        prompts = [row["prompt"] for row in inputs]
        limits = {"max_completion_length": self.args.max_completion_length}
        batch_size = self.args.per_device_eval_batch_size
        with unwrap_model_for_generation(self.model_wrapped, self.accelerator) as policy:
            with self.accelerator.autocast():  # same as in the forward of training
                ids, _, completions = sample_answers(policy, tokenizer, prompts, batch_size=batch_size, **limits)
            logps = completion_logps(policy, tokenizer, prompts, ids, batch_size=batch_size)
            with self._reference(policy) as reference:
                ref_logps = completion_logps(reference, tokenizer, prompts, ids, batch_size=batch_size)
        cut = torch.tensor([row[-1] not in self._end_ids for row in ids])
        scores = self._scores(inputs, prompts, completions, ids)
        kl = torch.stack([estimate_kl(*pair, "k1").sum() for pair in zip(logps, ref_logps, strict=True)])
        rows = sample_rows(prompts, completions, ids, {"score": scores, "kl": kl}, cut)
        self.held_out.add(rows, inputs, prompts, completions, ids)
        figures = {
            "objective/kl": kl,
            "objective/scores": scores,
            "completions/mean_length": torch.tensor([len(row) for row in ids]),
            "completions/clipped_ratio": cut,
        }
        table = torch.stack([values.float() for values in figures.values()], dim=1).tolist()
        means = torch.tensor(gather_object(table)).nanmean(dim=0).tolist()
        self._log_metrics(dict(zip(figures, means, strict=True)))

    def _own_prompts(self) -> list[dict[str, Any]]:
        """Return the rows of this process. All processes get equally many, so some rows may be there twice."""
        rows, state = self._held_out_prompts, self.accelerator
        assert rows is not None
        count = -(-len(rows) // state.num_processes)
        return [rows[(state.process_index * count + i) % len(rows)] for i in range(count)]

    def _scores(self, inputs: list[dict[str, Any]], prompts: Any, completions: Any, ids: list[list[int]]) -> Tensor:
        """Return the sum of the rewards of each answer, `(B,)`."""
        known = {name: [row[name] for row in inputs] for name in inputs[0] if name not in ("prompt", "completion")}
        answers = {"prompts": prompts, "completions": completions, "completion_ids": ids}
        rewards = [[nan if x is None else x for x in function(**answers, **known)] for function in self._functions]
        self._log_metrics({f"rewards/{name}": value for name, value in self.reward_calls.settle().items()})
        return weighted_scores(torch.tensor(rewards).T, torch.ones(len(rewards)))

    @contextmanager
    def _reference(self, policy: Any) -> Iterator[Any]:
        """Yield the policy that training started from, as TRL's DPO keeps it."""
        if self.ref_model is not None:
            yield self.ref_model
            return
        with use_adapter(policy, REFERENCE_ADAPTER if REFERENCE_ADAPTER in policy.peft_config else None):
            yield policy


TRAINERS: dict[str, Any] = {"rloo": RLOOTrainer, "grpo": GRPOTrainer, "dpo": DPOTrainer}
