"""Supervised fine-tuning: what `trl.SFTTrainer` lacks.

Overrides only.
"""

from typing import Any

from trl import SFTTrainer as TRLSFTTrainer

from rlhf_recipes.durability.trainer import DurableTrainer
from rlhf_recipes.models.quantization import keep_unpacked, save_quantization


class SFTTrainer(DurableTrainer, TRLSFTTrainer):
    """Train as TRL does, with checkpoints that are whole or not there, also on a quantised base."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        keep_unpacked(self.model)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict=state_dict)
        if self.args.should_save:
            save_quantization(self.model, output_dir or self.args.output_dir)
