"""The common end of the trainers of models that score: their heads in float32, and the card beside the weights."""

from pathlib import Path
from typing import Any

from rlhf_recipes.models.quantization import keep_adapter_precision, keep_unpacked
from rlhf_recipes.models.reward_model import ScoreHead, store_in_float32
from rlhf_recipes.trainers.prepared import check_adapter_vocabulary, check_prepared
from rlhf_recipes.trainers.run_identity import IdentifiedTrainer


class ScoringModelTrainer(IdentifiedTrainer):
    """Train a model with a `ScoreHead`. A subclass has the card."""

    card: Any

    def finish_setup(self, tokens: int, **datasets: Any) -> None:
        """Check what TRL has prepared, and keep the precision of the trained weights.

        Args:
            tokens: Size of the vocabulary before TRL saw the tokenizer.
            datasets: Data sets as they were given, by name.
        """
        check_adapter_vocabulary(self, tokens)
        check_prepared(self, **datasets)
        keep_unpacked(self.model)
        keep_adapter_precision(self.model)
        for module in self.model.modules():
            if isinstance(module, ScoreHead):
                store_in_float32(module)  # TRL casts the trained weights of a quantised model to bfloat16

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict=state_dict)
        if self.args.should_save:
            self.card.save(Path(output_dir or self.args.output_dir))

    def save_card(self) -> None:
        """Write both cards again, beside the saved model, with the result of the latest evaluation."""
        if self.args.should_save:
            self.card.save(self.args.output_dir)
        super().save_card()
