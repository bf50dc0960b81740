"""PPO with a learned reward model, on `trl.GRPOTrainer`.

Overrides only. Sampling, reward calls, the reference and the clipped surrogate are TRL's; every formula that
TRL lacks is in layers 0 and 1. The order of a rollout: sample, score, normalise, old log-probs and values, KL shaping,
GAE, whitening; then `num_iterations` epochs of policy and value updates.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import EarlyStoppingCallback, PreTrainedModel
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import add_fused_lm_head

from rlhf_recipes.algorithm.advantages import is_truncated
from rlhf_recipes.algorithm.distributed import global_sum
from rlhf_recipes.algorithm.kl import estimate_kl
from rlhf_recipes.algorithm.kl_controller import make_kl_controller
from rlhf_recipes.algorithm.losses import aggregate_token_loss, per_token_value_loss
from rlhf_recipes.algorithm.masked import masked_mean
from rlhf_recipes.algorithm.normalization import RewardNormalizer
from rlhf_recipes.data.prompts import add_separator, check_columns, check_prompts_fit
from rlhf_recipes.evaluation.alarms import AlarmCallback
from rlhf_recipes.evaluation.held_out import HeldOutComparison
from rlhf_recipes.evaluation.samples import sample_rows
from rlhf_recipes.models.critic import attach_value_head
from rlhf_recipes.models.forward import CompletionForward, add_completion_forward, rows_by_length
from rlhf_recipes.models.loading import check_output_dir, load_tokenizer, prepare_frozen
from rlhf_recipes.models.quantization import keep_adapter_precision
from rlhf_recipes.options.ppo import PPOConfig
from rlhf_recipes.rewards.adapter import RewardAdapterScorer
from rlhf_recipes.rewards.calls import RewardCalls
from rlhf_recipes.rewards.functions import (
    as_reward_functions,
    check_reward_functions,
    score_statistics,
    weighted_scores,
)
from rlhf_recipes.rewards.protocol import ScoringRun, scorer_of
from rlhf_recipes.trainers.actor_critic import ActorCriticTrainer
from rlhf_recipes.trainers.guard import CriticWarmupCallback, TrainingGuard
from rlhf_recipes.trainers.rollout import estimate_advantages, loss_mask, rollout_metrics, values_of_tokens
from rlhf_recipes.trainers.run_identity import RunIdentity, facts_of_run
from rlhf_recipes.trainers.setup import check_policy, check_rollout_fits, policy_loader, round_reference_adapter
from rlhf_recipes.trainers.update import group_by_length, update_metrics

# What TRL's log-probability method takes from a batch: the inputs of models that also read images.
IMAGE_ARGUMENTS = set(list(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)[8:])


class PPOTrainer(ActorCriticTrainer):
    """Train a policy against a reward model, reward functions, or both.

    Args:
        model: Policy: a name or path, a causal LM, or a `PeftModel` with an SFT adapter. It is also the reference: the
            adapter is switched off (or a frozen copy of a given one switched on), or the whole model is copied.
        reward_funcs: Reward models (paths, addresses of served ones, or classifiers with one output), reward functions
            of TRL's signature, sync or async, or a list of these, weighted by `args.reward_weights`. Their weighted
            sum is normalised.
        args: Options.
        train_dataset: `prompt`, plain text or messages.
        eval_dataset: The same.
        processing_class: The policy's tokenizer. Default: the model's.
        reward_processing_classes: Tokenizers of reward models given as instances. Default: the models'.
        peft_config: LoRA or another PEFT method, for a policy that is not a `PeftModel`.
        quantization_config: Passed on to `from_pretrained` when `model` is a path.
        judges: Score the answers to `eval_dataset` too, without being trained on, by name: reward functions of TRL's
            signature, or what `rlhf_recipes.rewards.judges.load_judges` returns.
        pairwise_judges: Likewise, but see both answers: `evaluation.swapped_preferences` gives their signature.
        kwargs: Passed on to TRL.

    Raises:
        ValueError: If data, reward model or batch sizes do not fit; before anything is trained.
    """

    _buffered_inputs: Any  # TRL's: the micro-batches of the current rollout
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
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            check_columns(dataset, ("prompt",), name)
        check_rollout_fits(train_dataset, args)
        shared = {k: v for k, v in (args.model_init_kwargs or {}).items() if k in ("dtype", "attn_implementation")}
        load = policy_loader(model, args, quantization_config)
        start, model = model, load()
        directory = start if isinstance(start, str) else model.config._name_or_path
        check_policy(model, peft_config, args)
        uses_peft = peft_config is not None or isinstance(model, PeftModel)
        check_output_dir(args.output_dir, adapter=uses_peft)
        if processing_class is None:
            processing_class = load_tokenizer(directory, padding_side="left")
        train_dataset = add_separator(train_dataset, args.response_separator)
        eval_dataset = add_separator(eval_dataset, args.response_separator)
        check_prompts_fit(train_dataset, processing_class, model.config, args.max_completion_length)
        reward_funcs = as_reward_functions(reward_funcs, reward_processing_classes, **shared)
        facts = facts_of_run(args, policy=start, rewards=reward_funcs, train_dataset=train_dataset)
        if args.reward_adapter is not None:
            reward_funcs.append(RewardAdapterScorer(args.reward_adapter))
        check_reward_functions(reward_funcs, dataset=train_dataset, response_separator=args.response_separator)

        reference = None if uses_peft else load(frozen=True)
        # With a non-zero beta TRL keeps a copy of a given adapter; with zero it does not load a reference by itself.
        with _setting(args, "beta", 1.0 if uses_peft else 0.0):
            super().__init__(
                model,
                reward_funcs,
                args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                peft_config=copy.deepcopy(peft_config),  # the value head is added to it
                **kwargs,
            )
        self.beta = args.beta
        round_reference_adapter(self.model)
        keep_adapter_precision(self.model)
        size, activation = args.value_head_size, args.value_head_activation
        attach_value_head(self.model, directory, head_size=size, activation=activation, seed=args.seed)
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        add_completion_forward(base, value_gradient_to_backbone=args.value_gradient_to_backbone)
        # Images could not be moved, and these terms are means over a micro-batch or its most uncertain tokens.
        couples_rows = self._entropy_bonus_enabled or self.top_entropy_quantile < 1.0 or self.aux_loss_enabled
        self._may_regroup = not (self._is_vlm or couples_rows)
        # A model that reads images too counts its positions itself.
        self._takes_positions = not self._is_vlm and "position_ids" in inspect.signature(base.forward).parameters
        if reference is not None:
            self.ref_model = self._prepare_reference(reference)
        limits = (args.reward_timeout, args.reward_retries, args.failed_rewards)
        self.reward_calls = RewardCalls(*limits)
        self.held_out = HeldOutComparison(judges, pairwise_judges, seed=args.seed, calls=RewardCalls(*limits))
        self._prepare_reward_models()

        self.reward_normalizer = RewardNormalizer(args.reward_norm_decay, args.reward_norm_clip)
        if (statistics := score_statistics(self.reward_funcs, self.reward_weights)) is not None:
            self.reward_normalizer.warm_start(*statistics)
        self.guard = TrainingGuard(
            args,
            is_main=self.accelerator.is_main_process,
            deepspeed=self.is_deepspeed_enabled,
            fsdp=self.is_fsdp_enabled,
        )
        self.kl_controller = make_kl_controller(args.kl_controller, args.kl_coef, args.target_kl, args.kl_horizon)
        self._stateful = {
            "run": RunIdentity(facts, allow_changes=args.allow_changes_on_resume),
            "reward_normalizer": self.reward_normalizer,
            "kl_controller": self.kl_controller,
            "held_out": self.held_out,
            "guard": self.guard,
        }
        self._recorded: list[tuple[Tensor, Tensor]] = []  # log-probs and state values of the latest forwards
        self._scores = torch.empty(0)  # raw scores of the latest rollout, all ranks
        self._answers: Any = None  # of this rank's latest rollout: dataset rows, prompts, completions, ids, scores
        self._samples = []
        self.add_callback(self.guard)
        self.add_callback(AlarmCallback())
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
        if args.critic_warmup_steps:
            self.add_callback(CriticWarmupCallback(self.model, args.critic_warmup_steps))

    def _prepare_reference(self, reference: PreTrainedModel) -> Any:
        reference.eval()  # no dropout: an instance may come in training mode
        add_fused_lm_head(reference, temperature=self.temperature, cast_lm_head_to_fp32=self.args.cast_lm_head_to_fp32)
        add_completion_forward(reference)
        return prepare_frozen(reference, self.accelerator)

    def _prepare_reward_models(self) -> None:
        run = ScoringRun(
            policy=self.model,
            policy_eos_token_ids=self.eos_token_ids,
            batch_size=self.args.per_device_train_batch_size,
            timeout=self.args.reward_timeout,
            prepare_frozen=functools.partial(prepare_frozen, accelerator=self.accelerator),
        )
        for function in (*self.reward_funcs, *self.held_out.judges.values()):
            scorer_of(function).prepare(run)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if not self.model.training or self._buffered_inputs is before or not self._may_regroup:
            return inputs
        self._buffered_inputs = group_by_length(self._buffered_inputs, self.args.gradient_accumulation_steps)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: list[list[int]]
    ) -> Tensor:
        with _setting(self, "reward_funcs", [self.reward_calls.guard(function) for function in self.reward_funcs]):
            rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._log_metrics({f"rewards/{name}": value for name, value in self.reward_calls.settle().items()})
        self._scores = weighted_scores(rewards_per_func, self.reward_weights.to(rewards_per_func.device))
        self._log_metrics({"objective/unscorable": self._scores.isnan().float().mean().item()})
        if self.model.training:
            self.reward_calls.check_any_scored(self._scores)
        start = self.accelerator.process_index * len(prompts)
        own = rewards_per_func[start : start + len(prompts)]
        scores = dict(zip(self.reward_func_names, own.unbind(dim=1), strict=True))
        scores["score"] = self._scores[start : start + len(prompts)]
        self._answers = (inputs, prompts, completions, completion_ids_list, scores)
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
        forward = CompletionForward(
            model, logits_to_keep, pad_to_multiple_of=self.pad_to_multiple_of, takes_positions=self._takes_positions
        )
        # A step's micro-batch keeps its order, and images have one of their own.
        order, original = rows_by_length(attention_mask if batch_size and not self._is_vlm else None)
        per_token_logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(
            forward, input_ids[order], attention_mask[order], logits_to_keep, batch_size, **kwargs
        )
        per_token_logps = per_token_logps[original]
        if forward.state_values:
            self._recorded.append((per_token_logps, torch.cat(forward.state_values)[original]))
        return per_token_logps, None if entropies is None else entropies[original], aux_loss

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._recorded.clear()
        # TRL computes the reference's log-probabilities if beta is not 0. The KL is paid in the reward, so the loss
        # sees the user's beta again.
        with _setting(self, "beta", 1.0):
            batch = super()._generate_and_score_completions(inputs)
        if "old_per_token_logps" in batch:
            _, state_values = self._recorded[0]  # the policy comes before the reference
        else:
            batch["old_per_token_logps"], state_values = self._forward_policy(batch)
        self._recorded.clear()
        self._add_advantages(batch, state_values)
        return batch

    def _forward_policy(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Run the rollout's one no-grad forward of the policy, where TRL did not need it."""
        args = self.args
        batch_size = args.per_device_train_batch_size if self.model.training else args.per_device_eval_batch_size
        with torch.no_grad(), disable_gradient_checkpointing(self.model, args.gradient_checkpointing_kwargs):
            self._get_per_token_logps_and_entropies(
                self.model,
                torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
                torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
                batch["completion_ids"].size(1),
                batch_size,
                **{key: batch[key] for key in IMAGE_ARGUMENTS if key in batch},
            )
        return self._recorded[-1]

    def _add_advantages(self, batch: dict[str, Any], state_values: Tensor) -> None:
        """Turn scores, log-probabilities and values of a rollout into `advantages`, `returns` and `old_values`."""
        scores = self._normalized_scores(batch)
        batch["completion_mask"] = batch["completion_mask"] * scores.isfinite().unsqueeze(1)
        mask = loss_mask(batch)
        batch["num_items_in_batch"] = global_sum(mask.sum())
        for name in ("old_per_token_logps", "ref_per_token_logps"):  # as the update will find them there
            batch[name] = batch[name].masked_fill(mask == 0, 0)

        truncated = is_truncated(batch["completion_ids"], batch["completion_mask"], self.eos_token_ids)
        kl_coef = self.kl_controller.kl_coef
        estimates = estimate_advantages(batch, mask, state_values, scores, truncated, self.args, kl_coef=kl_coef)
        batch |= {"advantages": estimates.advantages, "returns": estimates.returns, "old_values": estimates.values}
        count, metrics = rollout_metrics(batch, mask, estimates, scores=self._scores, kl_coef=kl_coef)
        if self.model.training:
            self.guard.observe_rollout(metrics["objective/kl"], self.state.global_step)
        self._log_rollout(metrics, masked_mean(estimates.advantages, mask, dim=1))
        self._keep_samples(batch, mask, truncated)
        if self.model.training and self.state.global_step >= self.args.critic_warmup_steps:
            self.kl_controller.update(metrics["objective/kl"], count)

    def _normalized_scores(self, batch: dict[str, Any]) -> Tensor:
        """Update the normaliser with the scores of all ranks, and return this rank's on its scale."""
        if self.mask_truncated_completions:  # what does not train does not count either
            trains = self.accelerator.gather(batch["completion_mask"].any(dim=1))
            self._scores = self._scores.masked_fill(~trains, torch.nan)
        if self.args.reward_norm and self.model.training:
            self.reward_normalizer.update(self._scores)
        scores = self.reward_normalizer.normalize(self._scores) if self.args.reward_norm else self._scores
        return scores.view(-1, batch["completion_ids"].size(0))[self.accelerator.process_index]

    def _log_rollout(self, metrics: dict[str, float], mean_advantages: Tensor) -> None:
        if self.args.reward_norm:
            metrics |= {"reward_norm/mean": self.reward_normalizer.mean, "reward_norm/std": self.reward_normalizer.std}
        self._log_metrics(metrics)
        # GRPO's group statistic says nothing about PPO, and its advantages are not the ones that train.
        self._metrics["train" if self.model.training else "eval"].pop("frac_reward_zero_std", None)
        advantages = self.accelerator.gather(mean_advantages).tolist()
        log = self._logs["advantages"]  # holds one rollout: of a larger evaluation batch only the end is left in it
        for _ in range(min(len(log), len(advantages))):
            log.pop()
        log.extend(advantages)

    def _keep_samples(self, batch: dict[str, Any], mask: Tensor, truncated: Tensor) -> None:
        k1 = estimate_kl(batch["old_per_token_logps"], batch["ref_per_token_logps"], "k1") * mask
        inputs, prompts, completions, completion_ids, scores = self._answers
        scores = scores | {"kl": k1.sum(dim=1)}
        if self.model.training:
            shown = slice(self.args.logged_samples)  # a rollout is large, and its table small
            scores, truncated = {name: values[shown] for name, values in scores.items()}, truncated[shown]
        rows = sample_rows(prompts, completions, completion_ids, scores, truncated)
        if self.model.training:
            self._samples = rows
        else:
            self.held_out.add(rows, inputs, prompts, completions, completion_ids)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self._recorded.clear()
        policy_loss = super()._compute_loss(model, inputs)
        per_token_logps, state_values = self._recorded.pop()
        mask = loss_mask(inputs)
        values = values_of_tokens(state_values)
        # The fill precedes the square: what lies in the padding must not reach the gradient.
        values, old_values, returns = (
            x.masked_fill(mask == 0, 0) for x in (values, inputs["old_values"], inputs["returns"])
        )
        token_loss = per_token_value_loss(values, old_values, returns, cliprange=self.args.cliprange_value)
        value_loss = self._average_like_policy_loss(token_loss, mask, inputs["num_items_in_batch"])
        limits = {"cliprange": self.args.cliprange_value, "micro_batches": self._micro_batches_per_rollout()}
        weight, metrics = update_metrics(per_token_logps, inputs, values, token_loss, mask, **limits)
        self._log_metrics(metrics)
        if self.model.training:
            self.guard.observe_update(weight, metrics)
        if self.model.training and self.state.global_step < self.args.critic_warmup_steps:
            policy_loss = 0 * policy_loss
        return policy_loss + self.args.vf_coef * value_loss

    def _average_like_policy_loss(self, token_loss: Tensor, mask: Tensor, num_items: Tensor) -> Tensor:
        """Average a token loss as TRL does the policy's: this process's share of one optimiser step."""
        accumulation = self.current_gradient_accumulation_steps if self.model.training else 1
        # For "dapo", `num_items` spans the whole rollout of all ranks.
        window = num_items / self.accelerator.num_processes / self._micro_batches_per_rollout()
        length = self.max_completion_length
        loss = aggregate_token_loss(
            token_loss, mask, loss_type=self.loss_type, num_items=window, max_completion_length=length
        )
        return loss / accumulation

    def _micro_batches_per_rollout(self) -> int:
        return self.args.steps_per_generation if self.model.training else 1


@contextmanager
def _setting(target: Any, name: str, value: Any) -> Iterator[None]:
    """Give an attribute another value for a while."""
    original = getattr(target, name)
    setattr(target, name, value)
    try:
        yield
    finally:
        setattr(target, name, original)
