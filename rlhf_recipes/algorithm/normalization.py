"""Normalisation of reward-model scores over time.

The state is float64 and is outside every module, so that no cast and no sharding can change it.
"""

import math
from typing import Any

import torch
from torch import Tensor


class RewardNormalizer:
    """Normalise scores by their exponential moving mean and variance, with exact bias correction.

    Each update, with batch mean mu, population variance v and decay b:
    W = b W + (1-b);  a = (1-b)/W;  d = mu - m;  m += a d;  V = (1-a)(V + a d^2) + a v

    W starts at 0, so the first batch sets the statistics, and no invented prior biases them. The centred form does not
    cancel. Raw moments cancel: in fp32 at mean 1000 and sd 0.05 they give a negative variance.

    The state is three floats. The PPO trainer updates it once per rollout with the scores of all ranks, and every
    checkpoint keeps it in `ppo_state.json`. Before the first update, scores pass through (mean 0, sd 1).

    Args:
        decay: Weight of the past, in [0, 1). With 0 only the current batch counts.
        clip: Bound on a normalised score, in standard deviations, > 0.
        eps: Number that is added to the variance.

    Raises:
        ValueError: If `decay` or `clip` is out of range.

    Source: Adam's bias correction, arXiv:1412.6980, applied to West's weighted centred update. Differs from PPO-max,
        arXiv:2307.04964: the statistics of PPO-max never forget.
    """

    def __init__(self, decay: float = 0.99, clip: float = 5.0, eps: float = 1e-8) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"`decay` must lie in [0, 1), got {decay}.")
        if not clip > 0.0:
            raise ValueError(f"`clip` must be positive, got {clip}.")
        self.decay, self.clip, self.eps = decay, clip, eps
        self._weight, self._mean, self._variance = 0.0, 0.0, 1.0

    @property
    def mean(self) -> float:
        """Return the moving mean of the scores."""
        return self._mean

    @property
    def is_known(self) -> bool:
        """Return whether there are statistics: after a start from known ones, or an update."""
        return self._weight > 0

    @property
    def std(self) -> float:
        """Return the moving standard deviation of the scores, `eps` included."""
        return math.sqrt(self._variance + self.eps)

    def warm_start(self, mean: float, std: float) -> None:
        """Start from known statistics, with the weight of an infinite past."""
        self._weight, self._mean, self._variance = 1.0, float(mean), float(std) ** 2

    def update(self, scores: Tensor) -> None:
        """Move the statistics towards this batch of all ranks, `(B,)`. Ignore non-finite scores and empty batches."""
        scores = scores.detach().flatten().to("cpu", torch.float64)
        scores = scores[scores.isfinite()]
        if scores.numel() == 0:
            return
        mean = scores.mean()
        variance = (scores - mean).square().mean()
        self._weight = self.decay * self._weight + (1 - self.decay)
        step = (1 - self.decay) / self._weight
        delta = mean.item() - self._mean
        self._mean += step * delta
        self._variance = (1 - step) * (self._variance + step * delta**2) + step * variance.item()

    def normalize(self, scores: Tensor) -> Tensor:
        """Return `clip((scores - mean) / std, -clip, +clip)`, and NaN for a non-finite score."""
        finite = torch.where(scores.isfinite(), scores, torch.nan)
        # The subtraction is in float64: at a mean of 1e4, float32 keeps three decimals of a score.
        normalized = (finite.to("cpu", torch.float64) - self._mean) / self.std
        return normalized.clamp(-self.clip, self.clip).to(scores.device, scores.dtype)

    def normalize_parts(self, parts: Tensor) -> Tensor:
        """Return `clip(parts / std, -clip, +clip)`: parts of scores on their scale, without the part of the mean.

        Normalised parts need not sum to the normalised score. The mean, and what clipping takes away, are missing.
        """
        scaled = parts.to("cpu", torch.float64) / self.std
        return scaled.clamp(-self.clip, self.clip).to(parts.device, parts.dtype)

    def denormalize(self, normalized: Tensor) -> Tensor:
        """Return the score that `normalize` maps to `normalized`, without clipping."""
        return (normalized.to("cpu", torch.float64) * self.std + self._mean).to(normalized.device, normalized.dtype)

    def state_dict(self) -> dict[str, float]:
        """Return the statistics. JSON keeps them bit by bit."""
        return {"weight": self._weight, "mean": self._mean, "variance": self._variance}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the statistics that `state_dict` returned."""
        self._weight, self._mean, self._variance = (float(state[key]) for key in ("weight", "mean", "variance"))
