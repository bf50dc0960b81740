"""The steps of an answer: their log-odds of being right, the loss of these, and the reward of each step."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

UNLABELLED = -100  # label of a token that ends no labelled step; transformers counts all other labels
StepReward = Literal["signed", "probability", "log_odds", "difference"]


def log_odds_of(logits: Tensor) -> Tensor:
    """Return the log-odds of "right" from the outputs of a token classifier, `(B, T, K)` to `(B, T)`.

    One output (K = 1) is the log-odds itself. Of two outputs, "wrong" and "right", the log-odds is the difference of
    the second and the first, because `softmax(a, b)_2 = sigmoid(b - a)`.

    Raises:
        ValueError: If there are more outputs.
    """
    if logits.shape[-1] > 2:
        raise ValueError(f"A step is right or wrong, but the model gives {logits.shape[-1]} numbers per token.")
    return logits[..., 0] if logits.shape[-1] == 1 else logits[..., 1] - logits[..., 0]


def step_loss(log_odds: Tensor, labels: Tensor, count: Tensor | int | None = None) -> Tensor:
    """Return the binary cross-entropy, summed over the labelled tokens and divided by `count`.

    With hard labels and two outputs it is the cross-entropy of the two classes. A label between 0 and 1 is the
    probability that the step is right.

    Args:
        log_odds: `(B, T)`.
        labels: `(B, T)`, in [0, 1], or `UNLABELLED`.
        count: Labelled tokens of the whole batch of an optimiser step, of which these rows may be a part. Default:
            those of these rows.
    """
    labelled = labels != UNLABELLED
    total = binary_cross_entropy_with_logits(log_odds[labelled].float(), labels[labelled].float(), reduction="sum")
    return total / (labelled.sum().clamp(min=1) if count is None else count)


def agreements(log_odds: Tensor, labels: Tensor) -> Tensor:
    """Return how many steps are judged as labelled, and how many are labelled, `(2,)`.

    Args:
        log_odds: `(B, T)`. Above 0, a step is judged right.
        labels: `(B, T)`. Above 1/2, a step is right. `UNLABELLED` is none.
    """
    labelled = labels != UNLABELLED
    return torch.stack([(((log_odds > 0) == (labels > 0.5)) & labelled).sum(), labelled.sum()])


def step_rewards(log_odds: Tensor, kind: StepReward) -> Tensor:
    """Return the reward of each step of one answer, `(N,)`.

    With `p_i = sigmoid(log_odds_i)`:

    signed: `2 p_i - 1`, in [-1, 1]. A step that is more likely wrong than right costs.
    probability: `p_i`, in [0, 1]. Every step pays, also a wrong one.
    log_odds: `log(p_i / (1 - p_i))`. It has no limit.
    difference: `p_i - p_{i-1}` with `p_0 = 1/2`. The sum is the last probability minus 1/2, so the number of steps
    does not matter. It suits labels that say whether the answer so far can still end well.

    Args:
        log_odds: `(N,)`, in the order of the steps.
        kind: One of the four.

    Source: probability, Wang et al. 2024, arXiv:2312.08935; difference, Gao et al. 2024, arXiv:2410.15115 ("delta"),
    and Setlur et al. 2024, arXiv:2410.08146. Differs: arXiv:2410.15115 subtracts the following step.
    """
    right = log_odds.sigmoid()
    match kind:
        case "signed":
            return (log_odds / 2).tanh()
        case "probability":
            return right
        case "log_odds":
            return log_odds
        case "difference":
            return right.diff(prepend=right.new_full((1,), 0.5))
