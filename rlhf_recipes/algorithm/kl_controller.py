"""Controllers of the KL coefficient, the price of one nat.

The state is one float. It is updated once per rollout, and every checkpoint keeps it in `ppo_state.json`.
"""

import math
import sys
from typing import Any


class FixedKLController:
    """Keep the KL coefficient at its initial value.

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
        """Restore the state that `state_dict` returned."""
        self.kl_coef = float(state["kl_coef"])


class AdaptiveKLController(FixedKLController):
    """Change the KL coefficient so that the KL moves towards a target.

    e = clip(KL / target - 1, -0.2, 0.2);   kl_coef *= 1 + e * n_sequences / horizon

    Args:
        kl_coef: Initial price of one nat, in score units, > 0.
        target_kl: Target of the KL per sequence, nats, > 0.
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
        """Change the coefficient after a rollout.

        Args:
            kl: Mean over the sequences of all ranks of the summed k1 estimate, nats. A non-finite one changes nothing.
            n_sequences: Number of sequences in the rollout, over all ranks.
        """
        if not math.isfinite(kl):
            return
        error = min(max(kl / self.target_kl - 1, -0.2), 0.2)
        # Beyond 4.5 horizons per rollout the step is bounded: beyond five the coefficient would become negative.
        factor = max(1 + error * n_sequences / self.kl_horizon, 0.1)
        self.kl_coef = max(self.kl_coef * factor, sys.float_info.min)


def make_kl_controller(
    kind: str, kl_coef: float, target_kl: float, horizon: int
) -> FixedKLController | AdaptiveKLController:
    """Return the controller that `PPOConfig.kl_controller` names: `fixed` or `adaptive`."""
    return AdaptiveKLController(kl_coef, target_kl, horizon) if kind == "adaptive" else FixedKLController(kl_coef)
