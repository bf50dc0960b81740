"""PPO with a learned reward model, on `trl.GRPOTrainer`.

Layer L3: overrides only. Sampling, reward calls, the reference and the clipped surrogate are TRL's; every formula that
TRL lacks is in layers 0 and 1. The order of a rollout: sample, score, normalise, old log-probs and values, KL shaping,
GAE, whitening; then `num_iterations` epochs of policy and value updates.
"""

import copy
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import add_fused_lm_head

from rlhf_recipes.advantages import (
    explained_variance,
    generalized_advantage_estimation,
    is_truncated,
    shape_rewards,
)
from rlhf_recipes.configs import PPOConfig
from rlhf_recipes.data import add_separator, check_columns, check_prompts_fit, check_rollout_fits
from rlhf_recipes.distributed import global_means, global_moments, global_sum, global_var
from rlhf_recipes.kl import estimate_kl
from rlhf_recipes.kl_controller import AdaptiveKLController, FixedKLController
from rlhf_recipes.losses import aggregate_token_loss, is_value_clipped, per_token_value_loss
from rlhf_recipes.masked import masked_mean, masked_whiten
from rlhf_recipes.models import (
    add_to_modules_to_save,
    check_output_dir,
    check_policy,
    load_tokenizer,
    policy_loader,
)
from rlhf_recipes.normalization import RewardNormalizer
from rlhf_recipes.rewards import RewardModelScorer, as_reward_functions, weighted_scores
from rlhf_recipes.value_head import (
    VALUE_HEAD_NAME,
    CriticWarmupCallback,
    ValueHead,
    ValueRecorder,
    add_state_values,
    attach_value_head,
    load_value_head,
    save_value_head,
    values_after_completion,
    values_of_tokens,
    without_value_head,
)

STATE_FILE = "ppo_state.json"
# What TRL's log-probability method takes from a batch: the inputs of models that also read images.
LOGPS_ARGUMENTS = tuple(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)


class PPOTrainer(GRPOTrainer):
    """Train a policy against a reward model, reward functions, or both.

    Args:
        model: Policy: a name or path, a causal LM, or a `PeftModel` with an SFT adapter. It is also the reference: the
            adapter is switched off (or a frozen copy of a given one switched on), or the whole model is copied.
        reward_funcs: Reward models (paths or classifiers with one output), reward functions of TRL's signature, sync
            or async, or a list of these, weighted by `args.reward_weights`. Their weighted sum is normalised.
        args: Options.
        train_dataset: `prompt`, plain text or messages.
        eval_dataset: The same.
        processing_class: The policy's tokenizer. Default: the model's.
        reward_processing_classes: Tokenizers of reward models given as instances. Default: the models'.
        peft_config: LoRA or another PEFT method, for a policy that is not a `PeftModel`.
        quantization_config: Passed on to `from_pretrained` when `model` is a path.
        kwargs: Passed on to TRL.

    Raises:
        ValueError: If data, reward model or batch sizes do not fit; before anything is trained.
    """

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
        **kwargs: Any,
    ) -> None:
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            check_columns(dataset, ("prompt",), name)
        check_rollout_fits(train_dataset, args)
        load = policy_loader(model, args, quantization_config)
        start, model = model, load()
        check_policy(model, peft_config)
        uses_peft = peft_config is not None or isinstance(model, PeftModel)
        check_output_dir(args.output_dir, adapter=uses_peft)
        if processing_class is None:
            path = start if isinstance(start, str) else model.config._name_or_path
            processing_class = load_tokenizer(path, padding_side="left")
        train_dataset = add_separator(train_dataset, args.response_separator)
        eval_dataset = add_separator(eval_dataset, args.response_separator)
        check_prompts_fit(train_dataset, processing_class, model.config, args.max_completion_length)
        reward_funcs = as_reward_functions(
            reward_funcs, reward_processing_classes, dataset=train_dataset, response_separator=args.response_separator
        )

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
        self._add_value_head(start if isinstance(start, str) else model.config._name_or_path)
        if reference is not None:
            self.ref_model = self._prepare_reference(reference)
        self._prepare_reward_models()

        self.reward_normalizer = RewardNormalizer(args.reward_norm_decay, args.reward_norm_clip)
        self._warm_start_normalizer()
        self.kl_controller = (
            AdaptiveKLController(args.kl_coef, args.target_kl, args.kl_horizon)
            if args.kl_controller == "adaptive"
            else FixedKLController(args.kl_coef)
        )
        self._recorded: list[tuple[Tensor, Tensor]] = []  # log-probs and state values of the latest forwards
        self._scores = torch.empty(0)  # raw scores of the latest rollout, all ranks
        if args.critic_warmup_steps:
            self.add_callback(CriticWarmupCallback(self.model, args.critic_warmup_steps))

    def _add_value_head(self, path: str) -> None:
        """Attach the critic, or the one saved in `path`, after PEFT, which would adapt its layers as the policy's."""
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        hidden_size = base.config.get_text_config().hidden_size
        with torch.random.fork_rng():
            torch.manual_seed(self.args.seed)  # TRL has seeded each rank differently
            head = ValueHead(hidden_size, self.args.value_head_size, self.args.value_head_activation)
        load_value_head(head, path)
        attach_value_head(base, head)
        if isinstance(self.model, PeftModel):
            add_to_modules_to_save(self.model, VALUE_HEAD_NAME)
        add_state_values(base, value_gradient_to_backbone=self.args.value_gradient_to_backbone)

    def _prepare_reference(self, reference: PreTrainedModel) -> Any:
        reference.eval()  # no dropout: an instance may come in training mode
        add_fused_lm_head(reference, temperature=self.temperature, cast_lm_head_to_fp32=self.args.cast_lm_head_to_fp32)
        return self._prepare_frozen(reference)

    def _prepare_reward_models(self) -> None:
        for scorer in self.reward_funcs:
            if isinstance(scorer, RewardModelScorer):
                scorer.batch_size = self.args.per_device_train_batch_size
                scorer.policy_eos_token_ids = self.eos_token_ids
                scorer.model = self._prepare_frozen(scorer.model)

    def _prepare_frozen(self, model: PreTrainedModel) -> Any:
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(model, self.accelerator)
        if self.is_fsdp_enabled:
            return prepare_fsdp(model, self.accelerator)
        return self.accelerator.prepare_model(model, evaluation_mode=True)

    def _warm_start_normalizer(self) -> None:
        """Begin at the reward model's own mean and deviation, where one reward model is all the reward there is."""
        if len(self.reward_funcs) != 1 or not isinstance(self.reward_funcs[0], RewardModelScorer):
            return
        card, weight = self.reward_funcs[0].card, self.reward_weights[0].item()
        if card is not None and card.score_mean is not None and card.score_std:
            self.reward_normalizer.warm_start(weight * card.score_mean, abs(weight) * card.score_std)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        with without_value_head(self.model):  # vLLM's weight synchronisation sees a plain policy
            return super()._generate_single_turn(*args, **kwargs)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        rewards_per_func = super()._calculate_rewards(*args, **kwargs)
        self._scores = weighted_scores(rewards_per_func, self.reward_weights.to(rewards_per_func.device))
        return rewards_per_func

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        recorder = ValueRecorder(model)
        per_token_logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(recorder, *args, **kwargs)
        if recorder.state_values:
            self._recorded.append((per_token_logps, torch.cat(recorder.state_values)))
        return per_token_logps, entropies, aux_loss

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
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            self._get_per_token_logps_and_entropies(
                self.model,
                torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
                torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
                batch["completion_ids"].size(1),
                batch_size=self.args.per_device_train_batch_size
                if self.model.training
                else self.args.per_device_eval_batch_size,
                **{key: batch[key] for key in LOGPS_ARGUMENTS if key in batch},
            )
        return self._recorded[-1]

    def _add_advantages(self, batch: dict[str, Any], state_values: Tensor) -> None:
        """Turn scores, log-probabilities and values of a rollout into `advantages`, `returns` and `old_values`."""
        scores = self._normalized_scores(batch)
        batch["completion_mask"] = batch["completion_mask"] * scores.isfinite().unsqueeze(1)
        mask = _loss_mask(batch)
        batch["num_items_in_batch"] = global_sum(mask.sum())
        for name in ("old_per_token_logps", "ref_per_token_logps"):  # as the update will find them there
            batch[name] = batch[name].masked_fill(mask == 0, 0)

        truncated = is_truncated(batch["completion_ids"], batch["completion_mask"], self.eos_token_ids)
        if self.args.missing_eos_penalty is not None:
            scores = scores - self.args.missing_eos_penalty * truncated
        kl = estimate_kl(batch["old_per_token_logps"], batch["ref_per_token_logps"], self.args.kl_estimator)
        rewards = shape_rewards(scores, kl, mask, kl_coef=self.kl_controller.kl_coef)

        values = values_of_tokens(state_values, mask.size(1))
        bootstrap = None
        if self.args.truncated_completions == "bootstrap":
            bootstrap = values_after_completion(state_values, batch["completion_mask"]) * truncated
        estimate = {"gamma": self.args.gamma, "bootstrap_values": bootstrap}
        advantages, returns = generalized_advantage_estimation(rewards, values, mask, lam=self.args.lam, **estimate)
        if self.args.value_lam is not None:
            _, returns = generalized_advantage_estimation(rewards, values, mask, lam=self.args.value_lam, **estimate)
        if self.args.whiten_advantages:
            _, mean, var = global_moments(advantages, mask)
            advantages = masked_whiten(advantages, mask, mean=mean, var=var)
        batch |= {"advantages": advantages, "returns": returns, "old_values": values}
        count, k1 = self._log_rollout(batch, mask, rewards, kl)
        if self.model.training and self.state.global_step >= self.args.critic_warmup_steps:
            self.kl_controller.update(k1, count)

    def _normalized_scores(self, batch: dict[str, Any]) -> Tensor:
        """Update the normaliser with the scores of all ranks, and return this rank's on its scale."""
        if self.mask_truncated_completions:  # what does not train does not count either
            trains = self.accelerator.gather(batch["completion_mask"].any(dim=1))
            self._scores = self._scores.masked_fill(~trains, torch.nan)
        if self.args.reward_norm and self.model.training:
            self.reward_normalizer.update(self._scores)
        scores = self.reward_normalizer.normalize(self._scores) if self.args.reward_norm else self._scores
        return scores.view(-1, batch["completion_ids"].size(0))[self.accelerator.process_index]

    def _log_rollout(self, batch: dict[str, Any], mask: Tensor, rewards: Tensor, kl: Tensor) -> tuple[int, float]:
        """Log what was sampled; return the number of completions that train and their mean KL (k1)."""
        mode = "train" if self.model.training else "eval"
        k1 = estimate_kl(batch["old_per_token_logps"], batch["ref_per_token_logps"], "k1")
        sums = ((x.masked_fill(mask == 0, 0)).sum(dim=1) for x in (k1, kl, rewards))
        count, (mean_k1, paid, rlhf_reward) = global_means(mask.any(dim=1), *sums)
        explained = explained_variance(batch["old_values"], batch["returns"], mask, variance=global_var)
        metrics = {
            "objective/kl": mean_k1,
            "objective/scores": self._scores[self._scores.isfinite()].mean().item(),
            "objective/rlhf_reward": rlhf_reward,
            "objective/non_score_reward": -self.kl_controller.kl_coef * paid,
            "objective/excluded": 1 - count / self._scores.numel(),
            "val/explained_variance": explained.item(),
            "kl_coef": self.kl_controller.kl_coef,
        }
        if self.args.reward_norm:
            metrics |= {"reward_norm/mean": self.reward_normalizer.mean, "reward_norm/std": self.reward_normalizer.std}
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)
        # GRPO's group statistic says nothing about PPO, and its advantages are not the ones that train.
        self._metrics[mode].pop("frac_reward_zero_std", None)
        mean_advantages = self.accelerator.gather(masked_mean(batch["advantages"], mask, dim=1)).tolist()
        log = self._logs["advantages"]  # holds one rollout: of a larger evaluation batch only the end is left in it
        for _ in range(min(len(log), len(mean_advantages))):
            log.pop()
        log.extend(mean_advantages)
        return int(count), mean_k1

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self._recorded.clear()
        policy_loss = super()._compute_loss(model, inputs)
        per_token_logps, state_values = self._recorded.pop()
        mask = _loss_mask(inputs)
        values = values_of_tokens(state_values, mask.size(1))
        # The fill precedes the square: what lies in the padding must not reach the gradient.
        values, old_values, returns = (
            x.masked_fill(mask == 0, 0) for x in (values, inputs["old_values"], inputs["returns"])
        )
        token_loss = per_token_value_loss(values, old_values, returns, cliprange=self.args.cliprange_value)
        value_loss = self._average_like_policy_loss(token_loss, mask, inputs["num_items_in_batch"])
        self._log_update(per_token_logps, inputs["old_per_token_logps"], values, old_values, token_loss, mask)
        if self.model.training and self.state.global_step < self.args.critic_warmup_steps:
            policy_loss = 0 * policy_loss
        return policy_loss + self.args.vf_coef * value_loss

    def _average_like_policy_loss(self, token_loss: Tensor, mask: Tensor, num_items: Tensor) -> Tensor:
        """Average a token loss as TRL does the policy's: this process's share of one optimiser step."""
        accumulation = self.current_gradient_accumulation_steps if self.model.training else 1
        # For "dapo", `num_items` spans the whole rollout of all ranks.
        window = num_items / self.accelerator.num_processes
        if self.model.training:
            window = window / self.args.steps_per_generation
        length = self.max_completion_length
        loss = aggregate_token_loss(
            token_loss, mask, loss_type=self.loss_type, num_items=window, max_completion_length=length
        )
        return loss / accumulation

    def _log_update(
        self, logps: Tensor, old_logps: Tensor, values: Tensor, old_values: Tensor, token_loss: Tensor, mask: Tensor
    ) -> None:
        mode = "train" if self.model.training else "eval"
        _, (approx_kl, value_loss, clip_fraction) = global_means(
            mask,
            estimate_kl(old_logps, logps.detach(), "k3"),
            token_loss.detach(),
            is_value_clipped(values.detach(), old_values, cliprange=self.args.cliprange_value),
        )
        metrics = {"policy/approx_kl": approx_kl, "loss/value": value_loss, "val/clip_fraction": clip_fraction}
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save a plain policy with the value head beside it; checkpoints carry the head inside."""
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
            return
        with without_value_head(self.model):
            super().save_model(output_dir)
        if self.args.should_save:
            save_value_head(self.model, output_dir or self.args.output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            state = {name: part.state_dict() for name, part in self._stateful_parts().items()}
            (folder / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint, STATE_FILE)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: PPOTrainer did not write {checkpoint}, or not to the end.")
        state = json.loads(path.read_text(encoding="utf-8"))
        for name, part in self._stateful_parts().items():
            part.load_state_dict(state[name])

    def _stateful_parts(self) -> dict[str, Any]:
        return {"reward_normalizer": self.reward_normalizer, "kl_controller": self.kl_controller}


@contextmanager
def _setting(target: Any, name: str, value: Any) -> Iterator[None]:
    """Give an attribute another value for a while."""
    original = getattr(target, name)
    setattr(target, name, value)
    try:
        yield
    finally:
        setattr(target, name, original)


def _loss_mask(batch: dict[str, Any]) -> Tensor:
    """Return the policy's own tokens, `(B, T)`: completion tokens without tool output."""
    mask = batch["completion_mask"]
    return mask * batch["tool_mask"] if "tool_mask" in batch else mask
