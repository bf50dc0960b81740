"""Supervised fine-tuning: overrides of `trl.SFTTrainer`."""

from typing import Any

from trl import SFTConfig
from trl import SFTTrainer as TRLSFTTrainer

from rlhf_recipes.models.quantization import keep_unpacked
from rlhf_recipes.options.changes import with_changes
from rlhf_recipes.trainers.saving import SavingTrainer, revision_of


class SFTTrainer(SavingTrainer, TRLSFTTrainer):
    """Train as TRL does, but write a checkpoint whole or not at all, also on a quantised base."""

    def __init__(self, model: Any, args: SFTConfig, *more: Any, **kwargs: Any) -> None:
        self._revision = revision_of(model, args)
        super().__init__(model, with_changes(args), *more, **kwargs)  # a copy: TRL writes into options
        keep_unpacked(self.model)
