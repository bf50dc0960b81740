"""Make one score of those of several heads, and log how far the heads disagree."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rlhf_recipes.algorithm.heads import disagreement
from rlhf_recipes.rewards.card import RewardModelCard


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
