"""Load judges: they score answers, but no policy is trained on them."""

from collections.abc import Callable, Mapping
from typing import Any

from rlhf_recipes.models.presence import require_present
from rlhf_recipes.options.paths import function_name
from rlhf_recipes.options.recipes import JudgeArguments
from rlhf_recipes.rewards.functions import as_scorer, check_reward_functions, import_function
from rlhf_recipes.rewards.protocol import scorer_of


def load_judges(
    judge_args: JudgeArguments,
    dataset: Any,
    *,
    reward_model_path: str | None = None,
    policy_eos_token_ids: list[int] | None = None,
    response_separator: str,
    of_two_policies: bool = True,
    **kwargs: Any,
) -> tuple[dict[str, Callable[..., Any]], dict[str, Callable[..., Any]]]:
    """Return two dictionaries by name: judges that score one answer, and judges that compare two.

    Args:
        judge_args: Options that name the judges.
        dataset: Held-out prompts.
        reward_model_path: One more reward model, which gets the name `reward_model`.
        policy_eos_token_ids: Ids that end a completion. A trainer sets them itself (`Scorer.prepare`).
        response_separator: Separator of the run.
        of_two_policies: Whether the scores of two policies are compared.
        kwargs: Options of `from_pretrained`.

    Raises:
        ValueError: If a reward model was trained on another kind of text, if a function cannot be imported, or if
            scores of two policies by a judge cannot be compared.
    """
    judges = [as_scorer(require_present("judge_models", path), **kwargs) for path in judge_args.judge_models]
    scorers = {judge.__name__: judge for judge in judges}
    if len(scorers) < len(judges):  # only the server knows the name of a served one
        raise ValueError(f"`judge_models` must have different names, got {', '.join(j.__name__ for j in judges)}.")
    if reward_model_path is not None:
        scorers["reward_model"] = as_scorer(reward_model_path, **kwargs)
    for scorer in scorers.values():
        check_reward_functions([scorer], dataset=dataset, response_separator=response_separator)
        scorer.policy_eos_token_ids = policy_eos_token_ids
    place = getattr(judge_args, "output_dir", None)  # a trainer sets its own
    functions, pairwise = (
        {function_name(reference): import_function(reference, place) for reference in references}
        for references in (judge_args.judge_functions, judge_args.pairwise_judges)
    )
    if of_two_policies:
        check_absolute(functions)
    return scorers | functions, pairwise


def check_absolute(judges: Mapping[str, Any]) -> None:
    """Check that the scores of two policies by each judge can be compared.

    Raises:
        ValueError: If a judge compares the answers of one call with each other: the mean is 0.5 for every policy.
    """
    for name, judge in judges.items():
        if getattr(scorer_of(judge), "is_relative", False):
            raise ValueError(
                f"The judge `{name}` of `judge_functions` compares the answers of one policy with each other, so its "
                "scores do not tell which of two policies is better. Name it in `pairwise_judges`, or set `mode: "
                "scores` or `reference_column` in its file."
            )
