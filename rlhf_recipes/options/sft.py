"""Options of SFT: TRL's, and those of a resume."""

from dataclasses import dataclass

import trl

from rlhf_recipes.options.resume import ResumeConfig


@dataclass
class SFTConfig(ResumeConfig, trl.SFTConfig):
    """Options of `SFTTrainer`."""
