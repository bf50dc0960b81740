"""Compare the learning rate of a run with what is usual for its stage, its method and the size of its model."""

from rlhf_recipes.options.learning_rates import rates_of
from rlhf_recipes.preflight.finding import Finding


def rate_line(options: type, rate: float, parameters: int, *, lora: bool) -> str:
    """Return the rate, whether it is the default of LoRA, and the usual range.

    Args:
        options: Class of the options of the run.
        rate: Learning rate.
        parameters: Number of parameters of the whole model.
        lora: Whether only an adapter is trained.
    """
    rates = rates_of(options)
    if rates is None:
        return f"{rate:.2g}"
    low, high = rates.usual(parameters, lora=lora)
    default = ", the default with LoRA" if lora and rate == rates.lora_default else ""
    return f"learning rate {rate:.2g}{default} (usual: {low:.0e} to {high:.0e})"


def rate_findings(options: type, rate: float, parameters: int, *, lora: bool) -> list[Finding]:
    """Return a warning if the rate is outside of the usual range. The arguments are those of `rate_line`."""
    rates = rates_of(options)
    low, high = (0.0, float("inf")) if rates is None else rates.usual(parameters, lora=lora)
    if low <= rate <= high:
        return []
    method = "LoRA" if lora else "full fine-tuning"
    effect = "learn almost nothing" if rate < low else "diverge"
    message = (
        f"`learning_rate` ({rate:.2g}) is far from what is usual for {method} of a model with {parameters / 1e6:,.0f} "
        f"million parameters, {low:.0e} to {high:.0e}: the run may {effect}. Set it in this range."
    )
    return [Finding("warning", message)]
