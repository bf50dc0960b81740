"""Dropout of the trainings that sample from their policy."""

from dataclasses import dataclass, field


@dataclass
class DropoutConfig:
    """No dropout by default. TRL's RLOO and GRPO keep that of the model and of LoRA (0.05), also while they sample."""

    disable_dropout: bool = field(
        default=True,
        metadata={
            "help": "Sample and train without dropout. With it, the ratio of an unchanged policy is not 1, and the "
            "answers come from another policy than the trained one."
        },
    )
