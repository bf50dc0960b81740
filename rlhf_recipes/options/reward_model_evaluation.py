"""Options of `recipes/evaluate_reward_model.py`."""

from dataclasses import dataclass, field

from rlhf_recipes.options.recipes import JudgeArguments
from rlhf_recipes.options.reward_calls import RewardCallConfig


@dataclass
class RewardModelEvaluationArguments(RewardCallConfig, JudgeArguments):
    """Reward models, the preferences that they rank, and judges of the answers that they choose."""

    reward_models: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Reward models: directories, Hub names, `models:/..` or addresses. Several are compared on the "
            "same rows."
        },
    )
    category_column: str | None = field(
        default=None, metadata={"help": "Column with the category of each row. Default: `subset`, if there is one."}
    )
    best_of_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Prompts for the curve of best of n: a directory or a Hub name. Column `completions`: a list of "
            "answers, as many for each prompt, unless `model_name_or_path` names a policy that writes them. Default: "
            "the prompts of `dataset_name`."
        },
    )
    num_prompts: int | None = field(default=None, metadata={"help": "Number of prompts of that curve. Default: all."})
    num_samples: int = field(default=16, metadata={"help": "Answers of the policy to each of those prompts."})
    max_completion_length: int = field(default=256, metadata={"help": "Tokens per answer of the policy."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature of the policy."})
    batch_size: int = field(
        default=32,
        metadata={
            "help": "Prompts per generation batch, and answers per forward pass of a reward model in this process."
        },
    )
    response_separator: str | None = field(
        default=None,
        metadata={
            "help": "Separator between prompt and answer of plain text. Default: that in the card of each reward "
            "model, and two line breaks without a card. Policy and judges take the first one in a card."
        },
    )
    output_dir: str = field(
        default="runs/reward_model_evaluation", metadata={"help": "Directory for results and report."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of sampling and of the bootstrap."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.reward_models:
            raise ValueError(
                "`reward_models` is not set: name the reward models to evaluate. (`model_name_or_path` is a policy, "
                "whose answers they choose from.)"
            )
        repeated = next((path for path in self.reward_models if self.reward_models.count(path) > 1), None)
        if repeated is not None:
            raise ValueError(f"`reward_models` names {repeated} twice. Leave one out.")
        if self.pairwise_judges:
            raise ValueError(
                "`pairwise_judges` compare two answers, but the best of n is judged alone: use `judge_functions` or "
                "`judge_models`."
            )
        if self.best_of_dataset_name is not None and not self.has_judges:
            raise ValueError("`best_of_dataset_name` needs a judge: set `judge_functions` or `judge_models`.")

    @property
    def has_judges(self) -> bool:
        """Return whether anything judges the best of n."""
        return bool(self.judge_functions or self.judge_models)
