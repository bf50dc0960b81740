"""The inputs of a trainer that a script builds, named as the options of the recipes name them."""

from dataclasses import dataclass, field


@dataclass
class GivenInputs:
    """Models and rewards of a training. The record of a run and the comparison read them.

    Args:
        model_name_or_path: Directory or name of the model that training starts from; `None` for one in memory.
        model_revision: Revision of that model on the Hub.
        reward_model_path: Directory, name or address of the first reward model.
        reward_functions: Qualified names of the reward functions.
    """

    model_name_or_path: str | None = None
    model_revision: str | None = None
    reward_model_path: str | None = None
    reward_functions: list[str] = field(default_factory=list)
