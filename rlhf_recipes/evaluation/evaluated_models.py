"""Evaluate reward models one after the other, so that one of them is in memory at a time."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from rlhf_recipes.data.messages import Text, as_text
from rlhf_recipes.data.preferences import PreferenceSet, in_form_of
from rlhf_recipes.data.prompts import add_separator
from rlhf_recipes.data.rows import check_reward_columns
from rlhf_recipes.evaluation.best_of_answers import Candidates, Curve, curve_of, load_candidates
from rlhf_recipes.evaluation.reward_models import Comparison, Ranking, compare, interval_of, rank, scores_of, winner
from rlhf_recipes.evaluation.verdicts import Judgement, reward_model_verdict
from rlhf_recipes.models.process_reward_model import refuse_process_reward_model, steps_refused
from rlhf_recipes.options.paths import is_address
from rlhf_recipes.options.reward_model_evaluation import RewardModelEvaluationArguments
from rlhf_recipes.rewards.calls import RewardCalls
from rlhf_recipes.rewards.card import RewardModelCard
from rlhf_recipes.rewards.functions import as_scorer, check_reward_functions, distinct_names
from rlhf_recipes.rewards.heads import KeptHeads
from rlhf_recipes.rewards.judges import load_judges

SEPARATOR = "\n\n"  # that of reward models without a card
ITSELF = "oracle"  # the chooser whose curve is the highest that a reward model can reach


@dataclass(frozen=True)
class Evaluated:
    """Hold what was measured of one reward model.

    Args:
        path: Value of the option.
        ranking: How it ranks the preferences.
        curves: Its curve of best of n, by judge.
    """

    path: str
    ranking: Ranking
    curves: dict[str, Curve] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, float]:
        """Return all figures by name."""
        return self.ranking.metrics | {
            name: value for curve in self.curves.values() for name, value in curve.metrics.items()
        }


@dataclass(frozen=True)
class Evaluation:
    """Hold what was measured of all reward models.

    Args:
        models: Measurements by the name of the model.
        comparisons: Differences of every two models.
        best: Curves of the best of n that each judge itself chooses, by judge.
    """

    models: dict[str, Evaluated]
    comparisons: list[Comparison]
    best: dict[str, Curve] = field(default_factory=dict)

    @property
    def winner(self) -> str | None:
        """Return the reward model that is better than every other one; `None` if there is none."""
        return winner(self.comparisons)

    @property
    def winner_path(self) -> str | None:
        """Return the path of the winner, or of the only reward model; `None` if it is not decided."""
        only = next(iter(self.models)) if len(self.models) == 1 else None
        name = self.winner or only
        return None if name is None else self.models[name].path

    @property
    def results(self) -> dict[str, float]:
        """Return all figures: `<model>/<figure>`, `<model>/over_<model>/<figure>` and `oracle/<figure>`."""
        found = {f"{name}/{key}": x for name, model in self.models.items() for key, x in model.metrics.items()}
        for compared in self.comparisons:
            prefix = f"{compared.first}/over_{compared.second}"
            found |= {f"{prefix}/{key}": value for key, value in compared.metrics.items()}
        return found | {f"{ITSELF}/{key}": x for curve in self.best.values() for key, x in curve.metrics.items()}


def names_of(paths: list[str]) -> list[str]:
    """Return short names of reward models: the last part of each path, and as many parts as tell them apart."""
    parts = [path.split("//")[-1].rstrip("/").split("/") if is_address(path) else _parts(path) for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["-".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return distinct_names(names)


def _parts(path: str) -> list[str]:
    return [part for part in Path(path.removeprefix("models:/")).parts if part not in (os.sep, ".", "..")] or [path]


def run_separator(separator: str | None, paths: list[str]) -> str:
    """Return the separator of policy and judges: the option, or the first one in a card. Servers tell their cards.

    Raises:
        ValueError: If a model judges steps, or if no reward model answers at an address.
    """
    for path in paths:
        if not is_address(path):
            refuse_process_reward_model(path, "`reward_models`")
    if separator is not None:
        return separator
    cards = (as_scorer(path).card if is_address(path) else RewardModelCard.load(path) for path in paths)
    known = (None if card is None else card.response_separator for card in cards)
    return next((each for each in known if each is not None), SEPARATOR)


def evaluate_reward_models(
    script_args: RewardModelEvaluationArguments,
    paths: list[str],
    preferences: PreferenceSet,
    policy_path: str | None,
    calls: RewardCalls,
    **init_kwargs: Any,
) -> Evaluation:
    """Measure how reward models rank preferences, and what they choose from several answers.

    Args:
        script_args: Options.
        paths: Directories, Hub names or addresses, in the order of `reward_models`.
        preferences: Rows to rank.
        policy_path: Directory or Hub name of the policy whose answers they choose from. See `load_candidates`.
        calls: Limits of served models and of judges.
        init_kwargs: Options of `from_pretrained`.

    Raises:
        ValueError: If a reward model judges steps, cannot be loaded or cannot read the rows, or if nothing can be
            measured.
    """
    seed, found = script_args.seed, {}
    separator = run_separator(script_args.response_separator, paths)
    for path in filter(is_address, paths):
        if as_scorer(path).gives_steps:
            raise steps_refused(path, "`reward_models`")
    candidates = load_candidates(script_args, preferences, policy_path, separator, **init_kwargs)
    judged = {} if candidates is None else _judged(script_args, separator, candidates, calls, init_kwargs)
    given = zip(names_of(script_args.reward_models), script_args.reward_models, paths, strict=True)
    for name, option, path in given:
        reader = _Reader.load(name, path, script_args, calls, init_kwargs)
        scores, heads = reader.scores(preferences.prompts, preferences.answers, "dataset_name")
        curves: dict[str, Curve] = {}
        if candidates is not None:
            reader.scorer.policy_eos_token_ids = candidates.end_ids
            ids = {} if candidates.token_ids is None else {"completion_ids": candidates.token_ids}
            chosen, _ = reader.scores(candidates.prompts, candidates.answers, "best_of_dataset_name", **ids)
            curves = curve_of(np.stack(chosen), judged, seed=seed)
        del reader  # before the next one is loaded
        found[name] = Evaluated(option, rank(preferences, scores, heads=heads, seed=seed), curves)
    compared = compare({name: model.ranking for name, model in found.items()}, seed=seed)
    best = {judge: curve_of(values, {judge: values}, seed=seed)[judge] for judge, values in judged.items()}
    return Evaluation(found, [_with_curves(each, found, seed) for each in compared], best)


def _with_curves(compared: Comparison, found: Mapping[str, Evaluated], seed: int) -> Comparison:
    """Return a comparison with the difference of the best of all answers, too."""
    metrics = dict(compared.metrics)
    ours, theirs = (found[name].curves for name in (compared.first, compared.second))
    for judge, curve in ours.items():
        n = max(curve.values)
        name, ends = f"best_of_{n}/{judge}", interval_of(curve.values[n] - theirs[judge].values[n], seed)
        metrics |= dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
    return Comparison(compared.first, compared.second, metrics)


def _judged(
    script_args: RewardModelEvaluationArguments,
    separator: str,
    candidates: Candidates,
    calls: RewardCalls,
    init_kwargs: dict[str, Any],
) -> dict[str, np.ndarray]:
    """Return the scores of all candidates by each judge, `(P, N)`."""
    prompts = add_separator(candidates.prompts, separator)
    check_reward_columns(prompts, "best_of_dataset_name")
    judges, _ = load_judges(
        script_args,
        prompts,
        policy_eos_token_ids=candidates.end_ids,
        response_separator=separator,
        of_two_policies=False,
        **init_kwargs,
    )
    return {
        name: np.stack(scores_of(judge, prompts["prompt"], candidates.answers, **candidates.columns))
        for name, judge in calls.guard_judges(judges).items()
    }


@dataclass(frozen=True)
class _Reader:
    """Give a reward model prompts and answers in the form that it reads."""

    name: str
    scorer: Any
    judge: Callable[..., Any]
    separator: str
    overflow: str

    @classmethod
    def load(
        cls,
        name: str,
        path: str,
        script_args: RewardModelEvaluationArguments,
        calls: RewardCalls,
        init_kwargs: dict[str, Any],
    ) -> "_Reader":
        """Load a reward model, or connect to its server."""
        scorer = as_scorer(path, **init_kwargs)
        if scorer.model is not None:  # a server has limits of its own
            scorer.batch_size = script_args.batch_size
        of_card = None if scorer.card is None else scorer.card.response_separator
        separator = next(x for x in (script_args.response_separator, of_card, SEPARATOR) if x is not None)
        judge = calls.guard_judges({name: scorer})[name]
        return cls(name, scorer, judge, separator, script_args.reward_overflow)

    @property
    def reads_chats(self) -> bool:
        """Return whether it reads chats: by its card, and without one by its chat template."""
        if self.scorer.card is not None:
            return bool(self.scorer.card.conversational)
        return getattr(self.scorer.tokenizer, "chat_template", None) is not None

    def scores(
        self, prompts: Dataset, answers: list[list[Text]], option: str, **columns: list[list[Any]]
    ) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
        """Return the scores of the answers to each prompt, and with several heads those of each head.

        Raises:
            ValueError: If the model cannot read them. The message names it.
        """
        prompts, answers = in_form_of(prompts, answers, self.separator, conversational=self.reads_chats)
        try:
            check_reward_functions([self.scorer], dataset=prompts, response_separator=self.separator)
            self._check_lengths(prompts["prompt"], answers, option)
        except ValueError as error:
            raise ValueError(f"`reward_models`, {self.name}, does not suit `{option}`. {error}") from error
        kept = KeptHeads(self.judge)
        self.scorer.combine = kept.combine
        try:
            scores = scores_of(kept, prompts["prompt"], answers, **columns)
        finally:
            del self.scorer.combine  # it leads back to the scorer, which would stay in memory
        heads = kept.by_answer()
        if heads is None or heads.shape[1] == 1:
            return scores, None
        return scores, np.split(heads, np.cumsum([len(row) for row in answers])[:-1])

    def _check_lengths(self, prompts: list[Text], answers: list[list[Text]], option: str) -> None:
        """Refuse rows that the model cannot read whole, if it has a limit and runs here."""
        limit = self.scorer.position_limit
        if limit is None or self.scorer.model is None or self.overflow == "cut":
            return
        for row, (prompt, texts) in enumerate(zip(prompts, answers, strict=True)):
            token_ids = self.scorer.token_ids([prompt] * len(texts), texts, [True] * len(texts))
            if (longest := max(map(len, token_ids))) > limit:
                raise ValueError(
                    f"Row {row} of `{option}` has {longest} tokens, and the model reads {limit}. Remove or shorten "
                    "such rows, or set `reward_overflow: cut` to let it read only the last tokens."
                )


def reward_models_verdict(evaluation: Evaluation) -> list[Judgement]:
    """Judge which of several reward models ranks best, and the best or first one by itself, in at most three lines."""
    name = evaluation.winner or next(iter(evaluation.models))
    metrics, outcomes = evaluation.models[name].metrics, evaluation.models[name].ranking.outcomes
    judged: list[Judgement] = []
    if "calibration_error" in metrics:
        figures = metrics | {"accuracy": metrics.get("pair_accuracy", metrics["accuracy"])}
        read = {f"eval_{figure}": value for figure, value in figures.items()}
        judged = reward_model_verdict(read, int(np.isfinite(outcomes).sum()))
    if "pair_accuracy" in metrics:
        judged = [Judgement(each.level, f"chosen against rejected, {each.text}") for each in judged]
    if not evaluation.comparisons:
        return judged
    named = [Judgement(each.level, f"{name}: {each.text}") for each in judged[:2]]
    if evaluation.winner is None:
        text = "no reward model is better than every other one: an interval of a difference includes 0"
        return [Judgement("doubtful", f"{text}. Use more rows."), *named]
    return [Judgement("good", f"{name} ranks better: the interval of each difference excludes 0"), *named]


def score_rows(preferences: PreferenceSet, evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return for each row its prompt, category, number of chosen answers and the scores of its answers."""
    prompts = [as_text(prompt) for prompt in preferences.prompts["prompt"]]
    rows: list[dict[str, Any]] = [
        {"prompt": prompt, "num_chosen": len(chosen)}
        for prompt, chosen in zip(prompts, preferences.chosen, strict=True)
    ]
    for number, row in enumerate(rows):
        if preferences.categories is not None:
            row["category"] = preferences.categories[number]
        row |= {name: model.ranking.scores[number].tolist() for name, model in evaluation.models.items()}
    return rows
