"""What became of each option of TRL 1.12's PPO, as data: `rlhf migrate` and the documentation read it."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rule:
    """What becomes of an old option.

    Args:
        new: Its name here; `None` if there is none.
        note: The difference; empty if there is none.
        default: The old default, where the new one differs: it is then written down.
    """

    new: str | None
    note: str = ""
    default: Any = None


_COMPUTED = Rule(None, "TRL computed it itself. A value in a file had no effect.")
_PYTHIA = "EleutherAI/pythia-160m"

# Every field that TRL 1.12's `PPOConfig` has beyond `TrainingArguments`, in its order.
RULES = {
    "learning_rate": Rule("learning_rate", default=3e-6),
    "dataset_num_proc": Rule(None, "Prompts are tokenised when they are sampled."),
    "num_mini_batches": Rule(
        "steps_per_generation",
        "`rlhf migrate` computes it with `gradient_accumulation_steps`, see below.",
    ),
    "total_episodes": Rule("max_steps", "Counted in optimiser steps, see below."),
    "local_rollout_forward_batch_size": Rule(
        None, "As many rows as fit are sampled together. `generation_batch_rows` sets a limit."
    ),
    "num_sample_generations": Rule(
        None,
        "Tables of completions come with each log (`logged_samples`), those of held-out prompts with `eval_steps`.",
    ),
    "response_length": Rule("max_completion_length", "A completion ends at EOS, and is not sampled further.", 53),
    "stop_token": Rule(
        None, "A completion always ends at EOS. Without `stop_token: eos`, TRL's went on to `response_length`."
    ),
    "stop_token_id": Rule(
        None, "A completion ends at the EOS ids of the model's generation config. Add the id there."
    ),
    "temperature": Rule("temperature", default=0.7),
    "missing_eos_penalty": Rule(
        "missing_eos_penalty",
        "In units of the score that the advantages see: with `reward_norm: true`, in standard deviations.",
    ),
    "sft_model_path": Rule(
        "model_name_or_path", "The policy, and the reference: the policy before training.", _PYTHIA
    ),
    "world_size": _COMPUTED,
    "num_total_batches": _COMPUTED,
    "micro_batch_size": _COMPUTED,
    "local_batch_size": _COMPUTED,
    "batch_size": _COMPUTED,
    "local_mini_batch_size": _COMPUTED,
    "mini_batch_size": _COMPUTED,
    "push_to_hub": Rule("push_to_hub", "The Hub gets the policy and its card, without the critic."),
    "reward_model_path": Rule(
        "reward_model_path",
        "It only scores. TRL's script also started the value model from it; `critic: reward` is nearest to that.",
        _PYTHIA,
    ),
    "model_adapter_name": Rule(None, "The adapter that the policy comes with, or the one of `use_peft`, is trained."),
    "ref_adapter_name": Rule(
        None, "The reference is the policy before training: without a new adapter, or a frozen copy of its own."
    ),
    "num_ppo_epochs": Rule("num_iterations"),
    "whiten_rewards": Rule(
        None, "Rewards are not whitened. `reward_norm: true` scales the scores by their moving mean and deviation."
    ),
    "kl_coef": Rule("kl_coef", "The price of a nat in units of the score: with `reward_norm: true`, of a deviation."),
    "kl_estimator": Rule("kl_estimator", "`k3` in the reward has nearly no gradient near the reference."),
    "cliprange": Rule("epsilon", "`epsilon_high` sets another upper end."),
    "vf_coef": Rule(
        "vf_coef", "The value loss trains the value head only, unless `value_gradient_to_backbone` is set."
    ),
    "cliprange_value": Rule("cliprange_value"),
    "gamma": Rule("gamma"),
    "lam": Rule("lam"),
    "ds3_gather_for_generation": Rule("ds3_gather_for_generation"),
}

# Options of TRL's script, of transformers and of older versions that need more than their own name.
OTHER_RULES = {
    "adam_epsilon": Rule("adam_epsilon", "The default here is 1e-5. With 1e-8 the policy drifts early.", 1e-8),
    "exp_name": Rule("run_name"),
    "model_name_or_path": Rule(None, "TRL's script read only the tokenizer from it. The policy is `sft_model_path`."),
    "overwrite_output_dir": Rule(None, "A run does not overwrite another one."),
    "warmup_ratio": Rule("warmup_steps", "A number below 1 is a share of the steps."),
    "value_model_path": Rule(None, "The critic is a head on the policy's own states (`critic`)."),
}

# What has no option in TRL 1.12, and must be set to keep its behaviour: the value, and the reason.
KEPT = {
    "reward_norm": (False, "TRL 1.12 used scores as they are. `true` makes `kl_coef` independent of their scale"),
    "loss_type": ("dapo", "a mean over tokens, as in TRL 1.12; the default is a mean per completion"),
    "response_separator": ("", "TRL 1.12 put nothing between prompt and answer; for plain text only"),
}

# TRL 1.12 counts these in rollouts, transformers in optimiser steps. Below 1 they are shares.
IN_ROLLOUTS = ("save_steps", "logging_steps", "eval_steps", "warmup_steps")
