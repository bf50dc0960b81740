"""Save weights with all that is needed to load them again: a mixin for TRL's trainers."""

from typing import Any

from rlhf_recipes.durability.progress import ProgressTrainer
from rlhf_recipes.models.adapter_base import base_of_adapter, save_base
from rlhf_recipes.models.dropout import disable_dropout
from rlhf_recipes.models.generation import mend_generation_config
from rlhf_recipes.models.quantization import save_quantization
from rlhf_recipes.options.given import GivenInputs
from rlhf_recipes.trainers.printing import print_short_lines


class SavingTrainer(ProgressTrainer):
    """Save a valid generation config, and beside an adapter the quantisation and the fingerprint of its base.

    `disable_dropout` holds for every dropout, where the trainer has this option.
    """

    stage = ""  # value of the tag `stage` in MLflow
    model_type = "policy"
    given_data: tuple[Any, Any] | None = None  # training and evaluation rows, where TRL replaces them by token ids
    _source = ""  # directory or name of the model that training starts from; set before `__init__`
    _revision: str | None = None  # on the Hub, of that model

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if getattr(self.args, "disable_dropout", False):
            disable_dropout(self.model)
        print_short_lines(self)
        self._base = base_of_adapter(self.model, self._revision)  # before another run can replace it

    def note_source(self, model: Any, args: Any) -> None:
        """Note where the model comes from, before it is loaded."""
        self._revision = revision_of(model, args)
        self._source = model if isinstance(model, str) else model.config._name_or_path

    @property
    def given(self) -> GivenInputs:
        """Return the inputs of the training, named as the options of the recipes name them."""
        return GivenInputs(self._source or None, self._revision)

    def conclude(self) -> dict[str, float]:
        """Save the trained model. Return the figures of the evaluation that ends the stage, if one does."""
        self.save_model(self.args.output_dir)
        return {}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        mend_generation_config(self.accelerator.unwrap_model(self.model))
        super()._save(output_dir, state_dict=state_dict)
        if self.args.should_save:
            save_quantization(self.model, output_dir or self.args.output_dir)
            save_base(self._base, output_dir or self.args.output_dir)


def revision_of(model: Any, args: Any) -> str | None:
    """Return the revision from which a trainer loads its model; `None` if it gets a model in memory."""
    return (args.model_init_kwargs or {}).get("revision", "main") if isinstance(model, str) else None
