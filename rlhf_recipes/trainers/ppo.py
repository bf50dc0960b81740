"""PPO with a learned reward model, on `trl.GRPOTrainer`.

Overrides only. Sampling, reward calls and the clipped surrogate are TRL's; every formula that TRL lacks is in
`algorithm/`. `rollout.py` leads from sampled tokens to advantages, `update.py` from a micro-batch to the loss.
"""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import EarlyStoppingCallback, PreTrainedModel
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from rlhf_recipes.algorithm.kl_controller import make_kl_controller
from rlhf_recipes.algorithm.losses import aggregate_token_loss
from rlhf_recipes.algorithm.masked import masked_mean
from rlhf_recipes.algorithm.normalization import RewardNormalizer
from rlhf_recipes.evaluation.alarms import AlarmCallback
from rlhf_recipes.models.forward import CompletionForward, rows_by_length
from rlhf_recipes.options.changes import with_changes
from rlhf_recipes.options.ppo import PPOConfig
from rlhf_recipes.rewards.functions import score_statistics, weighted_scores
from rlhf_recipes.trainers.guard import CriticWarmupCallback, TrainingGuard
from rlhf_recipes.trainers.rollout import Rollout, rollout_metrics
from rlhf_recipes.trainers.run_identity import RunIdentity
from rlhf_recipes.trainers.setup import (
    REFERENCE_ADAPTER,
    add_networks,
    options_for_trl,
    prepare_parts,
    prepare_reference,
    takes_positions,
)
from rlhf_recipes.trainers.update import MicroBatch, critic_loss, group_by_length
from rlhf_recipes.trainers.value_head import ValueHeadTrainer

# Image inputs of TRL's log-probability method.
IMAGE_ARGUMENTS = set(list(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)[8:])


class PPOTrainer(ValueHeadTrainer):
    """Train a policy against a reward model, reward functions, or both.

    Args:
        model: Policy: a name or path, a causal LM, or a `PeftModel` with an SFT adapter. It is also the reference: the
            policy without its adapter, a frozen copy of an adapter that it came with, or a copy of the whole model.
        reward_funcs: Reward models (paths, addresses of served ones, or classifiers with one output), reward functions
            of TRL's signature, sync or async, or a list of these, weighted by `args.reward_weights`. Their weighted
            sum is normalised.
        args: Options; they are copied, and not changed.
        train_dataset: `prompt`, plain text or messages.
        eval_dataset: `prompt`, plain text or messages.
        processing_class: The policy's tokenizer. Default: the model's.
        reward_processing_classes: Tokenizers of reward models given as instances. Default: the models'.
        peft_config: LoRA or another PEFT method, for a policy that is not a `PeftModel`.
        quantization_config: Passed on to `from_pretrained` when `model` is a path.
        judges: Functions that score the answers to `eval_dataset` but do not train, by name: reward functions of TRL's
            signature, or what `rlhf_recipes.rewards.judges.load_judges` returns.
        pairwise_judges: Functions that compare two answers to a prompt, by name; `swapped_preferences` in
            `rlhf_recipes.evaluation.statistics` gives their signature.
        kwargs: Passed on to TRL.

    Raises:
        ValueError: If data, reward model or batch sizes do not fit. The error comes before training.
    """

    rollout: Rollout | None = None  # the latest
    reward_funcs: list[Any]  # TRL calls these: the reward functions, with time limits and retries
    _name = "PPO"
    _tag_names = ["trl", "ppo", "rlhf-recipes"]
    _paper = {"title": "Proximal Policy Optimization Algorithms", "id": "1707.06347"}

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: Any,
        args: PPOConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        peft_config: PeftConfig | None = None,
        quantization_config: Any = None,
        judges: dict[str, Callable[..., Any]] | None = None,
        pairwise_judges: dict[str, Callable[..., Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        parts = prepare_parts(
            model,
            reward_funcs,
            args,
            datasets=(train_dataset, eval_dataset),
            tokenizers=(processing_class, reward_processing_classes),
            peft_config=peft_config,
            quantization_config=quantization_config,
        )
        # A copy, because the value head is added to the configuration of the adapter.
        kwargs |= {"peft_config": copy.deepcopy(peft_config), **parts.data}
        super().__init__(parts.model, parts.reward_funcs, options_for_trl(args), **kwargs)
        self.args, self.beta = with_changes(self.args, beta=args.beta), args.beta
        add_networks(self.model, parts, self.args)
        if parts.reference is not None:
            self.ref_model = prepare_reference(parts.reference, self.args, self.accelerator)
        # Regrouping cannot move images. These loss terms couple the rows of a micro-batch.
        couples_rows = self._entropy_bonus_enabled or self.top_entropy_quantile < 1.0 or self.aux_loss_enabled
        self._may_regroup = not (self._is_vlm or couples_rows)
        # A model for images counts its positions by itself.
        self._takes_positions = not self._is_vlm and takes_positions(self.model)
        self._build_rewards(judges, pairwise_judges)
        self._build_control(parts.facts)

    def _build_rewards(self, judges: Any, pairwise_judges: Any) -> None:
        """Prepare scorers and judges, the limits of their calls, and the normaliser of the scores."""
        functions = self.reward_funcs
        self.reward_funcs = self.prepare_rewards(functions, self.args, self.eos_token_ids, judges, pairwise_judges)
        self.reward_normalizer = RewardNormalizer(self.args.reward_norm_decay, self.args.reward_norm_clip)
        if (statistics := score_statistics(functions, self.reward_weights)) is not None:
            self.reward_normalizer.warm_start(*statistics)

    def _build_control(self, facts: dict[str, Any]) -> None:
        """Add guard, KL controller, early stopping and the identity of the run, and name the parts of a checkpoint."""
        args = self.args
        sharding = {"deepspeed": self.is_deepspeed_enabled, "fsdp": self.is_fsdp_enabled}
        self.guard = TrainingGuard(args, is_main=self.accelerator.is_main_process, **sharding)
        self.kl_controller = make_kl_controller(args.kl_controller, args.kl_coef, args.target_kl, args.kl_horizon)
        self._stateful = {
            "run": RunIdentity(facts, allow_changes=args.allow_changes_on_resume),
            "reward_normalizer": self.reward_normalizer,
            "kl_controller": self.kl_controller,
            "held_out": self.held_out,
            "guard": self.guard,
        }
        self._samples = []
        self.add_callback(self.guard.rollback)
        self.add_callback(AlarmCallback())
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
        if args.critic_warmup_steps:
            self.add_callback(CriticWarmupCallback(self.model, args.critic_warmup_steps))

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if not self.model.training or self._buffered_inputs is before or not self._may_regroup:
            return inputs
        self._buffered_inputs = group_by_length(self._buffered_inputs, self.args.gradient_accumulation_steps)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Sample, score, and estimate advantages: from prompts to the batch of the update."""
        rollout = self.rollout = Rollout(inputs)
        batch = super()._generate_and_score_completions(inputs)  # calls `_calculate_rewards`
        # If TRL has run the policy for old log-probabilities, reuse that forward.
        policy = rollout.first_forward if "old_per_token_logps" in batch else self._forward(self.model, batch)
        rollout.take_tokens(batch, policy, self._reference_logps(batch), self.eos_token_ids)
        normalizer = self.reward_normalizer if self.args.reward_norm else None
        rollout.normalize_scores(normalizer, update=self.model.training)
        rollout.estimate_advantages(self.args, kl_coef=self.kl_controller.kl_coef)
        self._report(rollout)
        return batch | rollout.columns()

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: list[list[int]]
    ) -> Tensor:
        rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._log_metrics({f"rewards/{name}": value for name, value in self.reward_calls.settle().items()})
        scores = weighted_scores(rewards_per_func, self.reward_weights.to(rewards_per_func.device))
        self._log_metrics({"objective/unscorable": scores.isnan().float().mean().item()})
        if self.model.training:
            self.reward_calls.check_any_scored(scores)
        rewards = dict(zip(self.reward_func_names, rewards_per_func.unbind(dim=1), strict=True))
        assert self.rollout is not None
        self.rollout.take_answers(prompts, completions, completion_ids_list, rewards, scores)
        return rewards_per_func

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run TRL's forward through a `CompletionForward`: on the tokens that count, and with the values kept."""
        forward = model if isinstance(model, CompletionForward) else self._completion_forward(model, logits_to_keep)
        # A micro-batch of the update keeps its order. Images are stored in the order of the rows.
        order, original = rows_by_length(attention_mask if batch_size and not self._is_vlm else None)
        per_token_logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(
            forward, input_ids[order], attention_mask[order], logits_to_keep, batch_size, **kwargs
        )
        per_token_logps = forward.finish(per_token_logps, original)
        if model is self.model and self.rollout is not None and not self.rollout.has("first_forward"):
            self.rollout.first_forward = forward
        return per_token_logps, None if entropies is None else entropies[original], aux_loss

    def _completion_forward(self, model: Any, completion_length: int) -> CompletionForward:
        padding, positions = self.pad_to_multiple_of, self._takes_positions
        return CompletionForward(model, completion_length, pad_to_multiple_of=padding, takes_positions=positions)

    def _forward(self, model: Any, batch: dict[str, Any]) -> CompletionForward:
        """Run a model over a whole rollout, without gradient, as TRL does."""
        args = self.args
        batch_size = args.per_device_train_batch_size if self.model.training else args.per_device_eval_batch_size
        forward = self._completion_forward(model, batch["completion_ids"].size(1))
        with torch.no_grad(), disable_gradient_checkpointing(self.model, args.gradient_checkpointing_kwargs):
            self._get_per_token_logps_and_entropies(
                forward,
                torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
                torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
                batch["completion_ids"].size(1),
                batch_size,
                **{key: batch[key] for key in IMAGE_ARGUMENTS if key in batch},
            )
        return forward

    def _reference_logps(self, batch: dict[str, Any]) -> Tensor:
        """Return the reference's log-probabilities of a rollout, `(B, T)`; TRL has them if its own KL term is on."""
        if "ref_per_token_logps" in batch:
            return batch["ref_per_token_logps"]
        if self.ref_model is not None:
            return self._forward(self.ref_model, batch).per_token_logps
        policy = self.accelerator.unwrap_model(self.model)
        with use_adapter(policy, REFERENCE_ADAPTER if REFERENCE_ADAPTER in policy.peft_config else None):
            return self._forward(self.model, batch).per_token_logps

    def _report(self, rollout: Rollout) -> None:
        """Let guard and controller look at a rollout, log its figures, and keep or judge its completions."""
        count, metrics = rollout_metrics(rollout)
        if self.model.training:
            self.guard.observe_rollout(metrics["objective/kl"], self.state.global_step)
        if self.args.reward_norm:
            metrics |= {"reward_norm/mean": self.reward_normalizer.mean, "reward_norm/std": self.reward_normalizer.std}
        self._log_metrics(metrics)
        self._log_advantages(masked_mean(rollout.advantages, rollout.mask, dim=1))
        if not self.model.training:
            answers = (rollout.prompts, rollout.completions, rollout.completion_id_lists)
            self.held_out.add(rollout.samples(), rollout.rows, *answers)
            return
        self._samples = rollout.samples(self.args.logged_samples)  # a rollout is large, and its table small
        if self.state.global_step >= self.args.critic_warmup_steps:
            self.kl_controller.update(metrics["objective/kl"], count)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Return TRL's policy loss plus the weighted value loss, from one forward."""
        forward = self._completion_forward(model, inputs["completion_ids"].size(1))
        policy_loss = super()._compute_loss(forward, inputs)
        value_loss, weight, metrics = critic_loss(
            MicroBatch.of(forward, inputs),
            self._average_like_policy_loss,
            cliprange=self.args.cliprange_value,
            micro_batches=self._micro_batches_per_rollout(),
        )
        self._log_metrics(metrics)
        if self.model.training:
            self.guard.observe_update(weight, metrics)
        if self.model.training and self.state.global_step < self.args.critic_warmup_steps:
            policy_loss = 0 * policy_loss
        return policy_loss + self.args.vf_coef * value_loss

    def _average_like_policy_loss(self, token_loss: Tensor, mask: Tensor, rollout_tokens: Tensor) -> Tensor:
        """Average a token loss as TRL averages the policy's: the share of this process in one optimiser step."""
        accumulation = self.current_gradient_accumulation_steps if self.model.training else 1
        loss = aggregate_token_loss(
            token_loss,
            mask,
            loss_type=self.loss_type,
            # "dapo" divides by the mean number of tokens per micro-batch and process.
            num_items=rollout_tokens / self.accelerator.num_processes / self._micro_batches_per_rollout(),
            max_completion_length=self.max_completion_length,
        )
        return loss / accumulation

    def _micro_batches_per_rollout(self) -> int:
        return self.args.steps_per_generation if self.model.training else 1
