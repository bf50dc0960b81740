"""The price of a nat: controllers of the KL coefficient.

One float of state, updated once per rollout and kept in `ppo_state.json` of every checkpoint.
"""

import math
import sys
from typing import Any


class FixedKLController:
    """A KL coefficient that stays where it was set.

    Args:
        kl_coef: Price of one nat, in score units, >= 0.
    """

    def __init__(self, kl_coef: float) -> None:
        self.kl_coef = kl_coef

    def update(self, kl: float, n_sequences: int) -> None:
        """Do nothing."""

    def state_dict(self) -> dict[str, float]:
        """Return the coefficient."""
        return {"kl_coef": self.kl_coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.kl_coef = float(state["kl_coef"])


class AdaptiveKLController(FixedKLController):
    """A KL coefficient that steers the KL towards a target.

    e = clip(KL / target - 1, -0.2, 0.2);   kl_coef *= 1 + e * n_sequences / horizon

    Args:
        kl_coef: Initial price of one nat, in score units, > 0.
        target_kl: KL per sequence to hold, nats, > 0.
        kl_horizon: Number of sequences over which the coefficient may grow by about a fifth.

    Raises:
        ValueError: If an argument is not positive.

    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
    """

    def __init__(self, kl_coef: float, target_kl: float, kl_horizon: int) -> None:
        for name, number in (("kl_coef", kl_coef), ("target_kl", target_kl), ("kl_horizon", kl_horizon)):
            if not number > 0:
                raise ValueError(f"`{name}` must be positive for the adaptive KL controller, got {number}.")
        super().__init__(kl_coef)
        self.target_kl, self.kl_horizon = target_kl, kl_horizon

    def update(self, kl: float, n_sequences: int) -> None:
        """Correct the coefficient after a rollout.

        Args:
            kl: Mean over sequences of the summed k1 estimate, nats, over all ranks. Ignored when not finite.
            n_sequences: Sequences in the rollout, over all ranks.
        """
        if not math.isfinite(kl):
            return
        error = min(max(kl / self.target_kl - 1, -0.2), 0.2)
        # Beyond four and a half horizons per rollout the step is bounded: at five it would turn the price negative.
        factor = max(1 + error * n_sequences / self.kl_horizon, 0.1)
        self.kl_coef = max(self.kl_coef * factor, sys.float_info.min)


def make_kl_controller(
    kind: str, kl_coef: float, target_kl: float, horizon: int
) -> FixedKLController | AdaptiveKLController:
    """Return the controller that `PPOConfig.kl_controller` names: `fixed` or `adaptive`."""
    return AdaptiveKLController(kl_coef, target_kl, horizon) if kind == "adaptive" else FixedKLController(kl_coef)
