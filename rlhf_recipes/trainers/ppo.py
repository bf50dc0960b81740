"""PPO with a learned reward model, on `trl.GRPOTrainer`.

Overrides only. Sampling, reward calls and the clipped surrogate are TRL's; every formula that TRL lacks is in
`algorithm/`. `rollout.py` leads from sampled tokens to advantages, `update.py` from a micro-batch to the loss.
"""

import copy
import functools
import json
from collections.abc import Callable
from typing import Any

from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import EarlyStoppingCallback, PreTrainedModel

from rlhf_recipes.algorithm.kl_controller import make_kl_controller
from rlhf_recipes.algorithm.losses import aggregate_token_loss, trust_region_mask
from rlhf_recipes.algorithm.masked import masked_mean
from rlhf_recipes.algorithm.normalization import RewardNormalizer
from rlhf_recipes.evaluation.alarms import AlarmCallback, DeclineStopping, current_alarms
from rlhf_recipes.models.vocabulary import inner_tokenizer
from rlhf_recipes.options.changes import with_changes
from rlhf_recipes.options.ppo import PPOConfig
from rlhf_recipes.options.relevance import defaults_of
from rlhf_recipes.rewards.dense import KeptAnswer
from rlhf_recipes.rewards.functions import score_statistics, weighted_scores
from rlhf_recipes.trainers.dense import weighted_parts
from rlhf_recipes.trainers.fitting import FittingTrainer
from rlhf_recipes.trainers.guard import CriticWarmupCallback, TrainingGuard
from rlhf_recipes.trainers.reference_answers import ReferenceAnswers
from rlhf_recipes.trainers.rollout import Rollout
from rlhf_recipes.trainers.rollout_metrics import DENSE_FIGURES, MEANS_OVER_COMPLETIONS, rollout_metrics
from rlhf_recipes.trainers.run_identity import RunIdentity
from rlhf_recipes.trainers.setup import add_networks, options_for_trl, prepare_parts, prepare_reference
from rlhf_recipes.trainers.update import MicroBatch, critic_loss, group_by_length, row_weight


class PPOTrainer(FittingTrainer):
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
        critic_dataset: `prompt`, `chosen` and `rejected`: answers that exist already. `critic: reward` and
            `critic: adapter` are fitted to the reward model's scores of them before the first rollout.
        judges: Functions that score the answers to `eval_dataset` but do not train, by name: reward functions of TRL's
            signature, or what `rlhf_recipes.rewards.judges.load_judges` returns.
        pairwise_judges: Functions that compare two answers to a prompt, by name; `swapped_preferences` in
            `rlhf_recipes.evaluation.statistics` gives their signature.
        kwargs: Passed on to TRL.

    Raises:
        ValueError: If data, reward model or batch sizes do not fit. The error comes before training.
    """

    reward_funcs: list[Any]  # TRL calls these: the reward functions, with time limits and retries
    stage = "ppo"
    _name = "PPO"
    _method = "PPO"
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
        critic_dataset: Any = None,
        judges: dict[str, Callable[..., Any]] | None = None,
        pairwise_judges: dict[str, Callable[..., Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        parts = prepare_parts(
            model,
            reward_funcs,
            args,
            datasets=(train_dataset, eval_dataset, critic_dataset),
            tokenizers=(processing_class, reward_processing_classes),
            peft_config=peft_config,
            quantization_config=quantization_config,
        )
        self.note_source(model, args)
        # A copy, because the value head is added to the configuration of the adapter.
        kwargs |= {"peft_config": copy.deepcopy(peft_config), **parts.data}
        super().__init__(parts.model, parts.reward_funcs, options_for_trl(args), **kwargs)
        own = ("beta", "importance_sampling_level", "off_policy_mask_threshold")
        self.args, self.beta = with_changes(self.args, **{name: getattr(args, name) for name in own}), args.beta
        self.rows_at_once = self.args.generation_batch_rows
        add_networks(self.model, parts, self.args)
        if parts.reference is not None:
            self.ref_model = prepare_reference(parts.reference, self.args, self.accelerator)
        # Regrouping cannot move images, and each number of rows is compiled anew. These terms couple the rows.
        couples_rows = self._entropy_bonus_enabled or self.top_entropy_quantile < 1.0 or self.aux_loss_enabled
        self._may_regroup = not (self._is_vlm or couples_rows or self.args.torch_compile)
        self.critic_dataset = parts.critic_dataset
        self._build_rewards(parts.facts, judges, pairwise_judges)
        self.build_critic(parts.directory, parts.facts)
        self._build_control(parts.facts)
        if args.check_numerics and not self._is_vlm:
            self.watch_numbers(parts.start)

    def _build_rewards(self, facts: dict[str, Any], judges: Any, pairwise_judges: Any) -> None:
        """Prepare scorers and judges, the limits of their calls, and what normalises or shapes the scores."""
        functions = self.reward_funcs
        self.reward_funcs = self.prepare_rewards(functions, self.args, self.eos_token_ids, judges, pairwise_judges)
        self.reward_normalizer = RewardNormalizer(self.args.reward_norm_decay, self.args.reward_norm_clip)
        statistics = score_statistics(functions, self.reward_weights, self.args.reward_heads)
        if statistics is not None:
            self.reward_normalizer.warm_start(*statistics)
        if self.args.reward_shaping == "par":
            source = json.dumps(self.identity_of_scores(facts))
            self.references = ReferenceAnswers(self.reward_funcs[0], self.reward_weights[0].item(), source)

    def _build_control(self, facts: dict[str, Any]) -> None:
        """Add guard, KL controller, early stopping and the identity of the run, and name the parts of a checkpoint."""
        args = self.args
        sharding = {"deepspeed": self.is_deepspeed_enabled, "fsdp": self.is_fsdp_enabled}
        self.guard = TrainingGuard(args, is_main=self.accelerator.is_main_process, **sharding)
        self.kl_controller = make_kl_controller(args.kl_controller, args.kl_coef, args.target_kl, args.kl_horizon)
        allow = {"allow_changes": args.allow_changes_on_resume, "defaults": defaults_of(args)}
        self._stateful = {
            "run": RunIdentity(facts, **allow),
            "reward_normalizer": self.reward_normalizer,
            "kl_controller": self.kl_controller,
            "held_out": self.held_out,
            "guard": self.guard,
        }
        self._stateful |= {} if self.references is None else {"reference_answers": self.references}
        self._samples = []
        self.add_callback(self.guard.rollback)
        self.add_callback(AlarmCallback())
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
        if args.stop_on_decline:
            if not self.held_out.judges:
                raise ValueError("`stop_on_decline` needs a held-out judge: set `judge_functions` or `judge_models`.")
            self.add_callback(DeclineStopping())
        if args.critic_warmup_steps:
            self.add_callback(CriticWarmupCallback(self.model, args.critic_warmup_steps))

    def card_alarms(self) -> list[str]:
        """Return the alarms of the run."""
        return current_alarms(self.args, self.state)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if not self.model.training or self._buffered_inputs is before or not self._may_regroup:
            return inputs
        window, multiple = self.args.gradient_accumulation_steps, self.pad_to_multiple_of
        self._buffered_inputs = group_by_length(self._buffered_inputs, window, multiple)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        return self.rendered(prompts, super()._tokenize_prompts)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Sample, score, and estimate advantages: from prompts to the batch of the update."""
        rollout = self.rollout = Rollout(inputs)
        batch = super()._generate_and_score_completions(inputs)  # calls `_calculate_rewards`
        # If TRL has run the policy for old log-probabilities, reuse that forward.
        policy = rollout.first_forward if "old_per_token_logps" in batch else self._forward(self.model, batch)
        rows = [] if self.critic is None else self.critic.rows(rollout, batch)
        length = batch["completion_ids"].size(1)
        values = policy.state_values if self.critic is None else self.critic_values(rows, length)
        rollout.take_tokens(batch, policy.per_token_logps, self._reference_logps(batch), values, self.eos_token_ids)
        rollout.full_kl = self._full_kl(policy, rollout, batch)
        normalizer = self.reward_normalizer if self.args.reward_norm else None
        rollout.normalize_scores(normalizer, update=self.model.training)
        group_size = self.num_generations if self.model.training else 1
        rollout.estimate_advantages(self.args, kl_coef=self.kl_controller.kl_coef, group_size=group_size)
        self._report(rollout, group_size)
        self.fit_critic(rows, rollout)
        rollout.forget("critic_states")  # they are large, and the update does not read them
        return batch | rollout.columns()

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: list[list[int]]
    ) -> Tensor:
        rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        assert self.rollout is not None
        scores = weighted_scores(rewards_per_func, self.reward_weights.to(rewards_per_func.device))
        if self.references is not None:  # it calls the reward model, so it comes before the calls are settled
            scores = self.rollout.shape_scores(self.references, scores)
        self._log_metrics({f"rewards/{name}": value for name, value in self.reward_calls.settle().items()})
        self._log_metrics({"objective/unscorable": scores.isnan().float().mean().item()})
        if self.model.training:
            self.reward_calls.check_any_scored(scores)
        rewards = dict(zip(self.reward_func_names, rewards_per_func.unbind(dim=1), strict=True))
        self.rollout.take_answers(prompts, completions, completion_ids_list, rewards, scores)
        return rewards_per_func

    def decoder(self) -> Callable[[Any], str]:
        """Return a function that returns the text of token ids."""
        return functools.partial(inner_tokenizer(self.processing_class).decode, skip_special_tokens=True)

    def take_parts(self, answers: list[KeptAnswer | None], ids: list[list[int]]) -> None:
        """Give the rewards of steps and tokens to the rollout."""
        assert self.rollout is not None
        self.rollout.token_rewards = weighted_parts(answers, self.reward_weights.tolist(), ids)

    def _report(self, rollout: Rollout, group_size: int) -> None:
        """Let guard and controller look at a rollout, log its figures, and keep or judge its completions."""
        count, metrics = rollout_metrics(rollout, group_size)
        if self.model.training:
            self.guard.observe_rollout(metrics["objective/kl"], self.state.global_step)
        if self.args.reward_norm:
            metrics |= {"reward_norm/mean": self.reward_normalizer.mean, "reward_norm/std": self.reward_normalizer.std}
        self._log_metrics(metrics)
        self._log_counts(count, [name for name in (*MEANS_OVER_COMPLETIONS, *DENSE_FIGURES) if name in metrics])
        self._log_counts(int(rollout.scores.isfinite().sum()), ["objective/scores"])
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
        forward = self._completion_forward(model, inputs["completion_ids"].size(1), inputs.get("columns"))
        if self.args.importance_sampling_level != "token":
            # `get_off_policy_mask` compares with the policy of the rollout.
            inputs = {name: x for name, x in inputs.items() if name != "sampling_per_token_logps"}
        policy_loss = super()._compute_loss(forward, inputs)
        batch = MicroBatch.of(forward, inputs, has_value_head=self.critic is None)
        value_loss, sums = critic_loss(
            batch,
            self._average_like_policy_loss,
            cliprange=self.args.cliprange_value,
            inside=self._inside_trust_region(
                batch.per_token_logps - batch.old_per_token_logps, batch.advantages, batch.mask
            ),
        )
        self.note_update(sums)
        if self.model.training and self.state.global_step < self.args.critic_warmup_steps:
            policy_loss = 0 * policy_loss
        weight = row_weight(inputs, self.loss_type, self.args.gradient_accumulation_steps)
        return weight * (policy_loss + self.args.vf_coef * value_loss)

    def get_off_policy_mask(
        self,
        advantages: Tensor,
        per_token_logps: Tensor,
        sampling_per_token_logps: Tensor,
        mask: Tensor,
        off_policy_threshold: float,
    ) -> Tensor:
        """Return the mask of TRL's policy loss: TRL's own, or that of the trust region."""
        if self.args.importance_sampling_level == "token":
            ours = (advantages, per_token_logps, sampling_per_token_logps, mask, off_policy_threshold)
            return super().get_off_policy_mask(*ours)
        return self._inside_trust_region(per_token_logps - sampling_per_token_logps, advantages, mask)

    def _inside_trust_region(self, log_ratio: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        level, epsilons = self.args.importance_sampling_level, (self.epsilon_low, self.epsilon_high)
        return trust_region_mask(
            log_ratio, advantages, mask, level=level, epsilon_low=epsilons[0], epsilon_high=epsilons[1]
        )

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
