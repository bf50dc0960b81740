"""Preference as reward (PAR): a bounded reward that is centred on reference answers."""

import torch
from torch import Tensor


def preference_as_reward(scores: Tensor, reference_scores: Tensor) -> Tensor:
    r"""Return the probability that an answer is better than a reference answer of its prompt, by a reward model.

    1/M sum_m sigmoid(r(x, y) - r(x, y_m))

    Under the Bradley-Terry model, by which the scores were learned, each term is the probability that y is preferred
    to y_m. The reward is in (0, 1), and rises less and less above the references. The prompt's own level cancels.

    Args:
        scores: Scores r(x, y), `(B,)`; NaN where there is none.
        reference_scores: Scores of the M reference answers to each prompt, `(B, M)`; NaN for an answer without one.

    Returns:
        `(B,)`; NaN without a score, or without any score of a reference answer.

    Source: Fu et al. 2025, arXiv:2502.18770, section 4.
    """
    return torch.sigmoid(scores.unsqueeze(1) - reference_scores).nanmean(dim=1)
