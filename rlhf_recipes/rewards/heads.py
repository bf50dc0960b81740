"""Make one score of those of several heads, and log how far the heads disagree."""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np
from torch import Tensor

from rlhf_recipes.algorithm.heads import combine_heads, disagreement
from rlhf_recipes.rewards.card import RewardModelCard

_scores_of_call: ContextVar[list[Tensor] | None] = ContextVar("scores by head of this call", default=None)


def combined(
    scores: Tensor,
    combine: Callable[[Tensor], Tensor],
    name: str,
    card: RewardModelCard | None,
    log_metric: Callable[[str, float], Any] | None = None,
) -> list[float]:
    """Return one score per row. With several heads, log their disagreement as `rewards/<name>/disagreement`.

    Beside it goes `rewards/<name>/disagreement_ratio`: the same figure divided by that of the evaluation data, which
    the card has.

    Args:
        scores: Scores by head from a common origin, `(B, K)`.
        combine: Function that returns one score for those of K heads, `(B,)`.
        name: Name of the reward model.
        card: Its card.
        log_metric: TRL's function for figures of a reward, if there is one.
    """
    if scores.size(1) > 1 and log_metric is not None:
        mean = disagreement(scores).nanmean().item()
        log_metric(f"rewards/{name}/disagreement", mean)
        if card is not None and card.disagreement:
            log_metric(f"rewards/{name}/disagreement_ratio", mean / card.disagreement)
    return combine(scores).tolist()


class KeptHeads:
    """Call a reward model under its guard, and keep the scores of its heads. `combine` is the rule of the model.

    A call that was left at its time limit may end during a later one. Its thread has the context of its own call, so
    its scores stay there.

    Args:
        guarded: Reward model under a guard.
        rule: Function of the scores of several heads, `(B, K)`, that returns one score each, `(B,)`.
    """

    def __init__(self, guarded: Callable[..., Any], rule: Callable[[Tensor], Tensor] = combine_heads) -> None:
        self._guarded, self._rule = guarded, rule
        self._kept: list[tuple[int, Tensor | None]] = []

    def combine(self, scores: Tensor) -> Tensor:
        """Keep scores by head, and combine them."""
        if (found := _scores_of_call.get()) is not None:
            found.append(scores)
        return self._rule(scores)

    def __call__(self, **kwargs: Any) -> Sequence[Any]:
        """Return the scores of a call."""
        found: list[Tensor] = []
        token = _scores_of_call.set(found)
        try:
            scores: Sequence[Any] = self._guarded(**kwargs)
        finally:
            _scores_of_call.reset(token)
        self._kept.append((len(scores), next((each for each in found if len(each) == len(scores)), None)))
        return scores

    def by_answer(self) -> np.ndarray | None:
        """Return the scores of all answers by head, `(N, K)`; NaN after a failed call, `None` without any scores."""
        count = next((each.size(1) for _, each in self._kept if each is not None), None)
        if count is None:
            return None
        return np.concatenate(
            [np.full((size, count), np.nan) if each is None else each.numpy() for size, each in self._kept]
        )
