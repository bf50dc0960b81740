"""The curve of best of n: how good, for a judge, is the best of n answers that a reward model chooses?"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from rlhf_recipes.algorithm.best_of_n import best_of_n_weights
from rlhf_recipes.data.loading import first_of_each_prompt, load_split, without_answers
from rlhf_recipes.data.messages import Text, answer_to
from rlhf_recipes.data.preferences import PreferenceSet, require_column
from rlhf_recipes.data.prompts import add_separator, check_prompts_fit
from rlhf_recipes.data.rows import check_rendering
from rlhf_recipes.evaluation.policies import eos_token_ids, sample_answers
from rlhf_recipes.evaluation.reward_models import interval_of
from rlhf_recipes.models.loading import load_policy, load_tokenizer
from rlhf_recipes.models.vocabulary import with_end_token
from rlhf_recipes.options.reward_model_evaluation import RewardModelEvaluationArguments

COLUMN = "completions"
OPTION = "best_of_dataset_name"


@dataclass(frozen=True)
class Candidates:
    """Hold P prompts with N answers each.

    Args:
        prompts: Dataset with the column `prompt`, without separator, and columns for judges.
        answers: Answers, `(P, N)`.
        token_ids: Token ids of each answer, if a policy has sampled it.
        end_ids: Ids that end an answer of that policy.
    """

    prompts: Dataset
    answers: list[list[Text]]
    token_ids: list[list[list[int]]] | None = None
    end_ids: list[int] | None = None

    @property
    def columns(self) -> dict[str, list[list[Any]]]:
        """Return what judges get beside prompts and answers."""
        given = {name: self.prompts[name] for name in self.prompts.column_names if name != "prompt"}
        repeated = {name: [[value] * len(self.answers[0]) for value in values] for name, values in given.items()}
        return repeated | ({} if self.token_ids is None else {"completion_ids": self.token_ids})


@dataclass(frozen=True)
class Curve:
    """Hold the judged scores of the best of n answers.

    Args:
        values: Mean score of each prompt under best of n, `(P,)`, by n.
        metrics: Mean over prompts with its interval, as `best_of_<n>/<judge>`, and the gain over one answer.
    """

    values: dict[int, np.ndarray]
    metrics: dict[str, float] = field(default_factory=dict)


def load_candidates(
    script_args: RewardModelEvaluationArguments,
    preferences: PreferenceSet,
    policy_path: str | None,
    separator: str,
    **init_kwargs: Any,
) -> Candidates | None:
    """Return the answers to choose from: those in a file, or those that a policy samples. `None` without a judge.

    Args:
        script_args: Options.
        preferences: Rows whose prompts are taken if no other ones are named.
        policy_path: Directory or Hub name of the policy.
        separator: Separator of the policy.
        init_kwargs: Options of `from_pretrained` for the policy.

    Raises:
        ValueError: If there is a judge and no answer, or a policy and no judge, or if answers cannot be read.
    """
    if not script_args.has_judges:
        if policy_path is not None:
            raise ValueError(
                "`model_name_or_path` names a policy for best of n, but nothing judges its answers: set "
                "`judge_functions` or `judge_models`."
            )
        return None
    if script_args.best_of_dataset_name is None:
        rows = first_of_each_prompt(preferences.prompts)
    else:
        rows = load_split(script_args, script_args.dataset_test_split, option=OPTION)
    rows = rows.select(range(min(len(rows), script_args.num_prompts or len(rows))))
    if policy_path is not None:
        return _sampled(script_args, rows, policy_path, separator, init_kwargs)
    if script_args.best_of_dataset_name is None:
        raise ValueError(
            "Judges need answers to choose from: set `best_of_dataset_name`, or name a policy as `model_name_or_path`."
        )
    return given_candidates(rows)


def given_candidates(rows: Dataset) -> Candidates:
    """Return the answers in the column `completions` of a dataset.

    Raises:
        ValueError: If the column is missing, if an answer is empty, or if rows have different numbers of answers.
    """
    require_column(rows, "prompt", OPTION)
    require_column(rows, COLUMN, OPTION, " with a list of answers (or name a policy as `model_name_or_path`)")
    lists, prompts = rows[COLUMN], without_answers(rows.remove_columns([COLUMN]), OPTION)
    for row, answers in enumerate(lists):
        texts = answers if isinstance(answers, list) else []
        if len(texts) < 2 or len(texts) != len(lists[0]) or not all(_is_answer(text) for text in texts):
            raise ValueError(
                f"`{OPTION}` has {len(texts)} answers as {COLUMN!r} in row {row}, and {len(lists[0] or [])} in row 0. "
                "Give each prompt the same number of texts, at least two and no empty one."
            )
    pairs = zip(prompts["prompt"], lists, strict=True)
    return Candidates(prompts, [[_as_answer(prompt, text) for text in texts] for prompt, texts in pairs])


def _is_answer(text: Any) -> bool:
    return isinstance(text, list) or (isinstance(text, str) and bool(text.strip()))


def _as_answer(prompt: Text, text: Any) -> Text:
    return answer_to(prompt, text) if isinstance(text, str) else text


def _sampled(
    script_args: RewardModelEvaluationArguments, rows: Dataset, path: str, separator: str, init_kwargs: dict[str, Any]
) -> Candidates:
    columns = [name for name in rows.column_names if name != COLUMN]
    option = OPTION if script_args.best_of_dataset_name else "dataset_name"
    raw = without_answers(rows.select_columns(columns), option)
    prompts, count = add_separator(raw, separator), script_args.num_samples
    policy, tokenizer = load_policy(path, **init_kwargs), load_tokenizer(path, padding_side="left")
    tokenizer = with_end_token(tokenizer, policy)
    check_rendering(prompts, ("prompt",), option, tokenizer)
    check_prompts_fit(prompts, tokenizer, policy.config, script_args.max_completion_length, option)
    torch.manual_seed(script_args.seed)
    ids, _, answers = sample_answers(
        policy.eval(),
        tokenizer,
        [prompt for prompt in prompts["prompt"] for _ in range(count)],
        max_completion_length=script_args.max_completion_length,
        temperature=script_args.temperature,
        batch_size=script_args.batch_size,
    )
    starts = range(0, len(ids), count)
    return Candidates(
        raw,
        [answers[start : start + count] for start in starts],
        [ids[start : start + count] for start in starts],
        eos_token_ids(policy, tokenizer),
    )


def curve_of(scores: np.ndarray, judged: Mapping[str, np.ndarray], *, seed: int = 0) -> dict[str, Curve]:
    """Return the curve of best of n for each judge: n is 1, 2, 4, .. and the number of answers.

    The figure of n is the mean over all choices of n of the answers (`best_of_n_weights`).

    Args:
        scores: Scores that choose, `(P, N)`.
        judged: Scores of the same answers by each judge, `(P, N)`. NaN is a missing score.
        seed: Seed of the bootstrap over prompts.
    """
    count = scores.shape[1]
    sizes = sorted({2**power for power in range(count.bit_length()) if 2**power <= count} | {count})
    weights = {n: best_of_n_weights(torch.from_numpy(scores), n).numpy() for n in sizes}
    return {judge: _curve(judge, values, weights, seed) for judge, values in judged.items()}


def _curve(judge: str, judged: np.ndarray, weights: Mapping[int, np.ndarray], seed: int) -> Curve:
    values: dict[int, np.ndarray] = {}
    metrics: dict[str, float] = {}
    for n, weight in weights.items():
        scored = weight * np.isfinite(judged)
        total = scored.sum(axis=1)
        # A prompt without a judged answer has no figure.
        known = np.where(total > 0, total, np.nan)
        values[n] = (scored * np.nan_to_num(judged)).sum(axis=1) / known
        name = f"best_of_{n}/{judge}"
        metrics |= dict(zip((name, f"{name}_low", f"{name}_high"), interval_of(values[n], seed), strict=True))
        if n > 1:
            name, gains = f"{name}_gain", values[n] - values[1]
            metrics |= dict(zip((name, f"{name}_low", f"{name}_high"), interval_of(gains, seed), strict=True))
    return Curve(values, metrics)
