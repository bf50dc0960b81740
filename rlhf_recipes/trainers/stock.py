"""What TRL's stock trainers need to run as baselines: checked data, a safely loaded policy, rewards and judges."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from peft import PeftModel

from rlhf_recipes.data.loading import without_answers
from rlhf_recipes.data.margins import check_margins
from rlhf_recipes.data.prompts import add_separator, check_prompts_fit
from rlhf_recipes.data.rows import check_rendering, mend_transcripts, readable_rows
from rlhf_recipes.durability.earlier_run import check_output_dir
from rlhf_recipes.models.loading import only_active_adapter
from rlhf_recipes.models.vocabulary import with_end_token
from rlhf_recipes.options.changes import with_changes
from rlhf_recipes.options.followed_rewards import FollowedRewardConfig
from rlhf_recipes.options.training import check_training
from rlhf_recipes.rewards.functions import as_reward_functions, check_reward_functions
from rlhf_recipes.trainers.compared import ComparedTrainer
from rlhf_recipes.trainers.run_identity import IdentifiedTrainer
from rlhf_recipes.trainers.setup import check_policy, check_special_ids, policy_loader


@dataclass(frozen=True)
class Scoring:
    """What scores the answers of a baseline, and the text that it reads.

    Args:
        rewards: Reward models and functions. RLOO and GRPO train on them. They only judge DPO.
        response_separator: Separator between prompt and response.
        judges: Functions that score the answers of an evaluation, by name.
        pairwise_judges: Functions that compare two answers, by name.
        limits: Limits of the calls.
    """

    rewards: list[Any]
    response_separator: str
    judges: dict[str, Callable[..., Any]] = field(default_factory=dict)
    pairwise_judges: dict[str, Callable[..., Any]] = field(default_factory=dict)
    limits: FollowedRewardConfig = field(default_factory=FollowedRewardConfig)


def prepared(
    model: str,
    args: Any,
    scoring: Scoring,
    train_dataset: Dataset,
    eval_dataset: Dataset | None,
    *,
    columns: tuple[str, ...],
    tokenizer: Any,
    peft_config: Any,
) -> dict[str, Any]:
    """Check the arguments of a baseline, load its policy safely, and return the arguments of TRL's trainer.

    Args:
        model: Directory or name of the policy.
        args: Options of TRL's trainer.
        scoring: Rewards, judges and separator.
        train_dataset: Training rows.
        eval_dataset: Evaluation rows.
        columns: Columns that both must have, as text or messages.
        tokenizer: Tokenizer of the policy.
        peft_config: Adapter to add to the policy.

    Raises:
        ValueError: If data, policy or batch sizes do not fit.
    """
    check_training(args)
    train_dataset = mend_transcripts(readable_rows(train_dataset, columns, "train_dataset"))
    eval_dataset = mend_transcripts(readable_rows(eval_dataset, columns, "eval_dataset"))
    for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
        check_margins(dataset, name)
    policy = policy_loader(model, args, None)()
    check_policy(policy, peft_config, args)
    check_output_dir(args.output_dir, adapter=peft_config is not None or isinstance(policy, PeftModel))
    tokenizer = with_end_token(tokenizer, policy)
    check_special_ids(policy, tokenizer, args)
    train, evaluation = (add_separator(x, scoring.response_separator) for x in (train_dataset, eval_dataset))
    for name, dataset in (("train_dataset", train), ("eval_dataset", evaluation)):
        check_rendering(dataset, columns, name, tokenizer)
        check_prompts_fit(dataset, tokenizer, policy.config, args.max_completion_length, name)
    # The policy is loaded. TRL loads the reference by the same name, in the precision of the policy.
    given = {"revision": "main"} | (args.model_init_kwargs or {})
    wanted = {"revision": given["revision"] if given["revision"] != "main" else None}
    wanted["attn_implementation"] = given.get("attn_implementation")  # else the one that its files name
    loading = {name: value for name, value in wanted.items() if value is not None} or None
    # Later answers are compared with those of step 0.
    own = with_changes(args, model_init_kwargs=loading, eval_on_start=args.eval_strategy != "no")
    data = {"train_dataset": train, "eval_dataset": evaluation, "processing_class": tokenizer}
    return {"model": policy, "args": own, "peft_config": peft_config, **data}


def checked_rewards(scoring: Scoring, args: Any, dataset: Dataset) -> list[Any]:
    """Load the reward models, and check that their cards fit the run.

    Raises:
        ValueError: If there is no reward, or if a reward model was trained on another kind of text.
    """
    loading = {k: v for k, v in (args.model_init_kwargs or {}).items() if k in ("dtype", "attn_implementation")}
    rewards = as_reward_functions(scoring.rewards, **loading)
    check_reward_functions(rewards, dataset=dataset, response_separator=scoring.response_separator)
    return rewards


class Baseline(IdentifiedTrainer, ComparedTrainer):
    """Save a policy as PPO's trainer saves it: one adapter."""

    _state_file = "baseline_state.json"

    @classmethod
    def rows(cls, dataset: Dataset) -> Dataset:
        """Return the columns of a dataset that the trainer may see."""
        return without_answers(dataset)

    def identify_baseline(
        self, model: str, args: Any, parts: dict[str, Any], rewards: list[Any], limits: FollowedRewardConfig
    ) -> None:
        """Note the revision of the policy and the identity of the run. `parts` is the result of `prepared`."""
        self.note_source(model, args)
        # Checkpoints of earlier versions know no rule, and their runs had the mean.
        rule = [limits.reward_heads, limits.reward_heads_coef]
        others = {} if limits.reward_heads == "mean" else {"`reward_heads`": rule}
        known = {"network": parts["model"], "peft_config": parts["peft_config"]}
        self.identify(args, model=model, **known, train_dataset=parts["train_dataset"], rewards=rewards, others=others)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy."""
        with only_active_adapter(self.model):
            super().save_model(output_dir, _internal_call)
