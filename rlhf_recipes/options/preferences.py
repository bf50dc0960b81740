"""Options of `recipes/sample_preferences.py`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rlhf_recipes.options.recipes import JudgeArguments
from rlhf_recipes.options.reward_calls import RewardCallConfig

FILES_FOR_PEOPLE = (".csv", ".jsonl")


@dataclass
class PreferenceArguments(RewardCallConfig, JudgeArguments):
    """A policy that answers, who labels its answers, and earlier pairs."""

    reward_model_path: str | None = field(
        default=None,
        metadata={
            "help": "Reward model that labels: a directory, a Hub name or an address. With `judge_models`: all."
        },
    )
    label_file: str | None = field(
        default=None,
        metadata={
            "help": "File for people who label, `.csv` or `.jsonl`. The first run writes it. After people have filled "
            "the column `better`, the same command reads it."
        },
    )
    num_samples: int = field(default=4, metadata={"help": "Answers per prompt."})
    pair_answers: Literal["disjoint", "best_and_worst", "all"] = field(
        default="disjoint",
        metadata={
            "help": "Pairs of the answers to a prompt. `disjoint`: at random, and each answer in one pair. "
            "`best_and_worst`: one pair, by the scores. `all`: each answer with each other one."
        },
    )
    only_agreed: bool = field(
        default=False,
        metadata={"help": "Leave out pairs in which two judges, or two heads of one, prefer other answers."},
    )
    earlier_pairs: list[str] = field(
        default_factory=list,
        metadata={"help": "Earlier preferences, directories or Hub names, that are written before the new pairs."},
    )
    max_completion_length: int = field(default=256, metadata={"help": "Tokens per answer. Use that of the training."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature. Use that of the training."})
    batch_size: int = field(default=32, metadata={"help": "Answers per generation batch."})
    response_separator: str = field(default="\n\n", metadata={"help": "The same as in training; for plain text only."})
    num_prompts: int | None = field(default=None, metadata={"help": "Number of prompts. Default: all."})
    output_dir: str = field(default="runs/preferences", metadata={"help": "Directory for answers and pairs."})
    seed: int = field(default=42, metadata={"help": "Seed of sampling and of the choice of pairs."})

    def __post_init__(self) -> None:
        super().__post_init__()
        judges = [self.reward_model_path, *self.judge_models, *self.judge_functions, *self.pairwise_judges]
        if any(judges) == (self.label_file is not None):
            raise ValueError(
                "Set either `label_file`, for people who label, or judges: `reward_model_path`, `judge_models`, "
                "`judge_functions` or `pairwise_judges`."
            )
        if self.label_file is not None and Path(self.label_file).suffix not in FILES_FOR_PEOPLE:
            raise ValueError(f"`label_file` must end with {' or '.join(FILES_FOR_PEOPLE)}, got {self.label_file!r}.")
        if self.pair_answers == "best_and_worst" and (self.label_file is not None or self.pairwise_judges):
            raise ValueError(
                "`pair_answers: best_and_worst` needs a score of each answer, so it does not go with `label_file` or "
                "`pairwise_judges`. Set `disjoint` or `all`."
            )
        if self.num_samples < 2 or (self.pair_answers == "disjoint" and self.num_samples % 2):
            raise ValueError(
                f"`num_samples` is {self.num_samples}: it must be at least 2, and even with `pair_answers: disjoint`, "
                "or an answer would have no partner."
            )
        inputs = (self.dataset_name, *self.earlier_pairs)
        if clash := next(
            (path for path in inputs if path and Path(path).resolve() == Path(self.output_dir).resolve()), None
        ):
            raise ValueError(
                f"`output_dir` is {clash}, which this run reads: it would replace these files. Choose another one."
            )
