"""Learning rates that are usual for a stage, a method and a size, and the default of a run with LoRA.

An adapter needs about ten times the rate of full fine-tuning (Schulman et al. 2025, "LoRA Without Regret"). Policy
optimisation needs a tenth of the rate of fine-tuning or less. Small models bear more, and those of a few million
parameters learn nothing without it. TRL's defaults are right for full fine-tuning, and in reward modelling for LoRA.
"""

from dataclasses import dataclass

TINY, SMALL = 20e6, 0.6e9  # parameters


@dataclass(frozen=True)
class Rates:
    """Hold the learning rates of a stage.

    Args:
        lora_default: Default of a run with LoRA.
        full: Usual range of full fine-tuning.
        lora: Usual range with LoRA.
        tiny: Usual range of a tiny model, with LoRA and without.
    """

    lora_default: float
    full: tuple[float, float]
    lora: tuple[float, float]
    tiny: tuple[float, float]

    def usual(self, parameters: float, *, lora: bool) -> tuple[float, float]:
        """Return the lowest and the highest usual rate.

        Args:
            parameters: Number of parameters of the whole model.
            lora: Whether only an adapter is trained.
        """
        if parameters < TINY:
            return self.tiny
        low, high = self.lora if lora else self.full
        return low, high * (5 if parameters < SMALL and not lora else 1)


_POLICY = Rates(lora_default=1e-5, full=(1e-7, 1e-5), lora=(3e-6, 2e-4), tiny=(1e-5, 1e-3))
# By the name of TRL's class of options: this module must not import TRL, which takes seconds.
RATES = {
    "SFTConfig": Rates(lora_default=2e-4, full=(1e-6, 1e-4), lora=(2e-5, 1e-3), tiny=(1e-5, 1e-2)),
    "RewardConfig": Rates(lora_default=1e-4, full=(1e-6, 1e-4), lora=(1e-5, 1e-3), tiny=(1e-5, 1e-2)),
    **dict.fromkeys(("GRPOConfig", "RLOOConfig", "DPOConfig"), _POLICY),
}


def rates_of(options: type) -> Rates | None:
    """Return the learning rates of a stage by the class of its options; `None` if it does not train."""
    return next((RATES[kind.__name__] for kind in options.__mro__ if kind.__name__ in RATES), None)
