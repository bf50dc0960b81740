"""Options of `PPOTrainer`: TRL's, and those that TRL lacks.

All checks that need neither a model nor a dataset are here. They run before anything is loaded.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from trl import GRPOConfig

from rlhf_recipes.options.checks import check_options
from rlhf_recipes.options.critic import CriticConfig
from rlhf_recipes.options.dropout import DropoutConfig
from rlhf_recipes.options.followed_rewards import ShapedRewardConfig
from rlhf_recipes.options.guard import GuardConfig
from rlhf_recipes.options.resume import ResumeConfig
from rlhf_recipes.options.secrets import holds_credentials
from rlhf_recipes.options.training import check_training


class _SingleGeneration(int):
    """The number 1, but not smaller than 2: GRPO refuses `num_generations < 2`, and PPO needs 1."""

    def __lt__(self, other: Any) -> bool:
        return False


@dataclass
class PPOConfig(CriticConfig, GuardConfig, ShapedRewardConfig, DropoutConfig, ResumeConfig, GRPOConfig):
    """Options of `PPOTrainer`: those of `trl.GRPOConfig`, some with another default, and new ones.

    A rollout has `per_device_train_batch_size * processes * steps_per_generation` completions. PPO trains on it for
    `num_iterations` epochs of `steps_per_generation / gradient_accumulation_steps` mini-batches each.
    """

    # TRL's fields, with PPO's defaults.
    num_generations: int = field(
        default=1, metadata={"help": "Completions per prompt. PPO needs no group; with one, see `group_baseline`."}
    )
    num_iterations: int = field(default=4, metadata={"help": "PPO epochs over each rollout."})
    loss_type: Literal["grpo", "dapo", "dr_grpo"] = field(
        default="grpo",
        metadata={
            "help": "Mean over token losses. `grpo` is PPO's mean per sequence. None of the three depends on the size "
            "of the micro-batches."
        },
    )
    importance_sampling_level: Literal["token", "sequence", "prefix"] = field(
        default="token",
        metadata={
            "help": "Ratio that `epsilon` keeps near 1. `token`: that of each token, PPO's clip. `sequence`: also "
            "that of the whole completion, the product over its tokens. `prefix`: also that of the tokens so far."
        },
    )
    scale_rewards: str = field(
        default="none", metadata={"help": "`none`: PPO scales scores by their moving statistics; see `reward_norm`."}
    )
    adam_epsilon: float = field(
        default=1e-5,
        metadata={"help": "With 1e-8 the policy drifts six times as fast in the first updates (arXiv:2403.17031)."},
    )
    generation_batch_rows: int | None = field(
        default=None,
        metadata={
            "help": "Completions that a process samples at the same time, at most. Default: as many as fit into the "
            "free memory of its GPU, and on a CPU all of them. Batches with images are not cut. vLLM and continuous "
            "batching do not need it."
        },
    )
    # Advantages.
    gamma: float = field(default=1.0, metadata={"help": "Discount per token."})
    lam: float = field(default=0.95, metadata={"help": "GAE's lambda for the policy."})
    value_lam: float | None = field(
        default=None, metadata={"help": "GAE's lambda for the value targets. Default: `lam`."}
    )
    group_baseline: bool = field(
        default=True,
        metadata={
            "help": "With several completions per prompt, subtract from each score the mean score of the others. The "
            "critic learns the rest."
        },
    )
    whiten_advantages: bool = field(
        default=True, metadata={"help": "Scale advantages to mean 0 and variance 1 over the tokens of all ranks."}
    )
    # Reward.
    response_separator: str = field(
        default="\n\n",
        metadata={
            "help": "Boundary between a plain-text prompt and its response. The reward model must have the same. Chat "
            "prompts use the assistant header of the chat template instead."
        },
    )
    reward_adapter: str | None = field(
        default=None,
        metadata={
            "help": "LoRA reward model on the policy's base. It runs on the policy's backbone, without a second model "
            "in memory. Its score is added to the other rewards."
        },
    )
    reward_norm: bool = field(
        default=True, metadata={"help": "Normalise scores by their moving mean and standard deviation."}
    )
    reward_norm_decay: float = field(default=0.99, metadata={"help": "Weight of the past, per rollout."})
    reward_norm_clip: float = field(
        default=5.0, metadata={"help": "Largest absolute value of a normalised score, in standard deviations."}
    )
    truncated_completions: Literal["terminal", "bootstrap", "mask"] = field(
        default="terminal",
        metadata={
            "help": "Completions that the length limit cut. `terminal`: they count as finished. `bootstrap`: the "
            "value of their last state is added. `mask`: they are not in the loss."
        },
    )
    missing_eos_penalty: float | None = field(
        default=None,
        metadata={"help": "Deduction from the normalised score of a truncated completion, in standard deviations."},
    )
    # KL to the reference policy.
    kl_coef: float = field(
        default=0.05,
        metadata={"help": "Price of one nat of KL, in normalised score; the first one if it is adaptive."},
    )
    kl_estimator: Literal["k1", "k2", "k3", "full"] = field(
        default="k1",
        metadata={
            "help": "Estimator in the reward. k1 has the gradient of the KL. `full`, the sum over the vocabulary, has "
            "it with less noise, and needs the hidden states of a rollout in memory. k2 and k3 do not have it."
        },
    )
    kl_controller: Literal["fixed", "adaptive"] = field(
        default="fixed", metadata={"help": "`adaptive` steers the KL per sequence towards `target_kl`."}
    )
    target_kl: float = field(default=6.0, metadata={"help": "KL per sequence that the controller aims at, in nats."})
    kl_horizon: int = field(
        default=10_000,
        metadata={"help": "Number of sequences in which the controller can change `kl_coef` by a fifth."},
    )
    # Evaluation during training: on held-out prompts, against the policy before training.
    metric_for_best_model: str | None = field(
        default=None,
        metadata={
            "help": "Metric that chooses the best checkpoint. Default: `win_rate_low`, the lower end of the 95 %% "
            "interval of the win rate, by the first judge, or without judges by the trained score."
        },
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Number of evaluations in a row without a better one after which training ends."},
    )
    stop_on_decline: bool = field(
        default=False,
        metadata={
            "help": "End the training when a held-out judge of single answers falls from its own best gain: when the "
            "intervals of the two evaluations no longer overlap. Without it this is an alarm."
        },
    )
    check_numerics: bool = field(
        default=True,
        metadata={
            "help": "Before the first step, compare log-probabilities of a few short rows between training and "
            "evaluation, plain transformers, the reference and other batches. A difference is an error."
        },
    )
    logged_samples: int = field(
        default=16, metadata={"help": "Completions of the latest rollout in the table of each log. 0: no table."}
    )

    def __post_init__(self) -> None:
        check_options(self)
        self._check_owned_by_ppo()
        _check_addresses(self)
        self.temperature: float = float(self.temperature)  # transformers refuses to sample with the whole number 1
        if self.eval_strategy != "no" and self.metric_for_best_model is None:
            self.metric_for_best_model = "win_rate_low"
        # TRL masks truncated completions itself.
        self.mask_truncated_completions = self.truncated_completions == "mask"
        if self.num_generations == 1:
            self.num_generations = _SingleGeneration(1)
        super().__post_init__()
        self.num_generations = int(self.num_generations)
        check_training(self)
        self.eval_on_start = self.eval_strategy != "no"  # later answers are compared with those of step 0
        self.set_critic_learning_rate(self.learning_rate)
        self.check_critic()
        self.check_shaping(reward_norm=self.reward_norm)
        self._check_combinations()
        self._check_reward_calls()
        self._check_batches()
        self._check_sampling()

    def _check_owned_by_ppo(self) -> None:
        """Refuse options of TRL that PPO replaces."""
        if self.mask_truncated_completions and self.truncated_completions != "mask":
            raise ValueError("Use `truncated_completions: mask` instead of `mask_truncated_completions`.")
        if self.sync_ref_model:
            raise ValueError("`sync_ref_model` is not available: PPO's reference is the policy it started from.")
        if self.scale_rewards not in ("none", False):
            raise ValueError("`scale_rewards` must be 'none': PPO has no groups; see `reward_norm`.")
        if self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError("`multi_objective_aggregation` must be 'sum_then_normalize': the sum is what PPO scales.")
        if self.importance_sampling_level != "token" and self.off_policy_mask_threshold is not None:
            raise ValueError(
                "`off_policy_mask_threshold` needs `importance_sampling_level: token`: each of the two stops "
                "completions that have moved too far, so choose one."
            )

    def _check_combinations(self) -> None:
        if self.early_stopping_patience is not None and self.eval_strategy == "no":
            raise ValueError(
                "`early_stopping_patience` needs evaluations: set `eval_strategy: steps` and `eval_steps`."
            )
        if self.stop_on_decline and self.eval_strategy == "no":
            raise ValueError("`stop_on_decline` needs evaluations: set `eval_strategy: steps` and `eval_steps`.")
        if self.kl_estimator == "full" and (self.beta != 0 or self.cast_lm_head_to_fp32):
            raise ValueError("`kl_estimator: full` needs `beta: 0` and `cast_lm_head_to_fp32: false`.")
        if self.kl_controller == "adaptive" and self.kl_coef == 0:
            raise ValueError("`kl_coef` must be positive with `kl_controller: adaptive`, which scales it.")
        if self.critic == "adapter" and self.fp16:
            raise ValueError("`critic: adapter` has no loss scale, which `fp16` needs: train in `bf16` or float32.")
        if self.critic == "adapter" and not self.disable_dropout:
            raise ValueError(
                "`critic: adapter` shares the policy's backbone and has no dropout: leave out "
                "`disable_dropout: false`."
            )
        if self.critic == "adapter" and self.neftune_noise_alpha and self.gradient_checkpointing:
            raise ValueError(
                "`neftune_noise_alpha` would also disturb what `critic: adapter` reads with `gradient_checkpointing`: "
                "leave out one of the three."
            )
        if self.missing_eos_penalty is not None and self.truncated_completions != "terminal":
            raise ValueError(
                f"`missing_eos_penalty` needs `truncated_completions: terminal`, got {self.truncated_completions!r}: "
                "a completion that is bootstrapped or masked is not penalised as well."
            )

    def _check_reward_calls(self) -> None:
        if self.reward_timeout is not None and self.world_size > 1 and self.longest_call() >= self.ddp_timeout:
            raise ValueError(
                f"`reward_timeout` and `reward_retries` let a reward function take {self.longest_call():g} s, "
                f"and the other processes wait for {self.ddp_timeout} s only: lower these, or raise `ddp_timeout`."
            )

    def _check_batches(self) -> None:
        if self.steps_per_generation % self.gradient_accumulation_steps != 0:
            raise ValueError(
                f"`steps_per_generation` ({self.steps_per_generation}) must be a multiple of "
                f"`gradient_accumulation_steps` ({self.gradient_accumulation_steps}), so that every optimiser step "
                "stays inside one rollout."
            )

    def _check_sampling(self) -> None:
        """Refuse a way of sampling for which TRL casts the trained weights in place."""
        precision = "bf16" if self.bf16 else "fp16" if self.fp16 else None
        if self.use_transformers_continuous_batching and not self.use_vllm and precision is not None:
            raise ValueError(
                f"`use_transformers_continuous_batching` cannot be used with `{precision}`: TRL would round the "
                f"trained weights to 16 bits in the first rollout. Set `{precision}: false`, or sample with "
                "`use_vllm: true`."
            )

    @property
    def held_kl(self) -> float | None:
        """Return the KL per sequence that the controller aims at, in nats; `None` with a fixed coefficient."""
        return self.target_kl if self.kl_controller == "adaptive" else None


def _check_addresses(config: "PPOConfig") -> None:
    """Refuse a password that TRL's message about a silent server would show."""
    if holds_credentials(config.vllm_server_base_url):
        raise ValueError(
            "`vllm_server_base_url` holds a password, which messages would show. Write it into `~/.netrc`, where "
            "the client looks for it by the name of the host."
        )
