"""Save weights with all that is needed to load them again: a mixin for TRL's trainers."""

import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from peft import PeftModel

from rlhf_recipes.durability.origin import Origin
from rlhf_recipes.durability.progress import ProgressTrainer
from rlhf_recipes.evaluation.figures import evaluation_of
from rlhf_recipes.models.adapter_base import base_of_adapter, save_base
from rlhf_recipes.models.dropout import disable_dropout
from rlhf_recipes.models.frozen_head import keep_head_weights_uncopied
from rlhf_recipes.models.generation import mend_generation_config
from rlhf_recipes.models.quantization import save_quantization
from rlhf_recipes.options.changes import with_changes
from rlhf_recipes.options.given import GivenInputs
from rlhf_recipes.trainers.model_card import CARD_NAME, Description, model_card
from rlhf_recipes.trainers.printing import print_short_lines
from rlhf_recipes.trainers.shown_options import hide_secrets_from_trackers


class SavingTrainer(ProgressTrainer):
    """Save a valid generation config, and beside an adapter the quantisation and the fingerprint of its base.

    `disable_dropout` holds for every dropout, where the trainer has this option. A model card is beside all weights.
    """

    model: Any
    train_dataset: Any
    stage = ""  # value of the tag `stage` in MLflow
    model_type = "policy"
    ends_with_evaluation = False  # others are evaluated during the training, or by a recipe of its own
    given_data: tuple[Any, Any] | None = None  # training and evaluation rows, where TRL replaces them by token ids
    _source = ""  # directory or name of the model that training starts from; set before `__init__`
    _revision: str | None = None  # on the Hub, of that model
    _method = ""  # of the training, in the card
    _tag_names: list[str]  # TRL's
    _paper: dict[str, str]  # TRL's
    _origin: Origin
    _named: tuple[Any, Any] | None = None
    _tags: Any = ()  # in the card
    best_step: int | None = None  # whose weights the model has, where the best ones were loaded at the end

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if getattr(self.args, "disable_dropout", False):
            disable_dropout(self.model)
        keep_head_weights_uncopied(self.model)
        hide_secrets_from_trackers(self)
        print_short_lines(self)
        self._base = base_of_adapter(self.model, self._revision)  # before another run can replace it
        if self.is_world_process_zero():  # it alone writes cards, and on many processes `git` would be slow
            self._origin = Origin.of_process(self.args.world_size)  # now: the files may change while it trains

    def note_source(self, model: Any, args: Any) -> None:
        """Note where the model comes from, before it is loaded."""
        self._revision = revision_of(model, args)
        self._source = model if isinstance(model, str) else model.config._name_or_path

    @property
    def given(self) -> GivenInputs:
        """Return the inputs of the training, named as the options of the recipes name them."""
        return GivenInputs(self._source or None, self._revision)

    def conclude(self) -> dict[str, float]:
        """Save the trained model, and return the figures of the evaluation that ends the stage, if one does.

        An evaluation that fails must not cost the model, so it comes after the save. The card then gets its result.
        """
        self.save_model(self.args.output_dir)
        if not self.ends_with_evaluation or self.eval_dataset is None:
            return {}
        figures: dict[str, float] = self.evaluate()
        self.save_card()
        return figures

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        mend_generation_config(self.accelerator.unwrap_model(self.model))
        super()._save(output_dir, state_dict=state_dict)
        folder = output_dir or self.args.output_dir
        if self.args.should_save:
            save_quantization(self.model, folder)
            save_base(self._base, folder)
        if self.is_world_process_zero():
            self._save_card_into(folder)

    def _save_card_into(self, folder: str) -> None:
        """Write the card over that of PEFT. For a checkpoint, TRL has just written it into `output_dir`."""
        if self._staging is not None:
            shutil.copy(Path(self.args.output_dir, CARD_NAME), folder)
            return
        name = self.name_of_run()
        with self._options(with_changes(self.args, output_dir=folder)):
            self.create_model_card(model_name=name)

    def describe(self, script_args: Any, model_args: Any) -> None:
        """Let the card name data and base as the options of a recipe name them.

        Args:
            script_args: Options with `dataset_name`, and perhaps `reward_model_path`.
            model_args: Options with `model_name_or_path`.
        """
        self._named = (script_args, model_args)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write the card of the model into `output_dir`, in place of TRL's, whose tags stay."""
        if not self.is_world_process_zero():
            return
        path = Path(self.args.output_dir, CARD_NAME)
        if not self._tags:  # also those of trackers, which TRL finds
            super().create_model_card(model_name)
            self._tags = ModelCard.load(path).data.tags or []
        tags = [*self._tags, *([tags] if isinstance(tags, str) else tags or ())]
        described = self._description(model_name or self.name_of_run(), dataset_name, tags)
        evaluation = evaluation_of(self.state.log_history, self.best_step)
        model_card(described, evaluation, self._origin).save(path)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Warn of the weights that a checkpoint lacks. A weight that is tied to one of the checkpoint is there."""
        own = dict(self.model.named_parameters(remove_duplicate=False))
        loaded = {id(parameter) for name, parameter in own.items() if name not in load_result.missing_keys}
        missing = [name for name in load_result.missing_keys if id(own.get(name)) not in loaded]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.best_step = self.state.best_global_step

    def save_card(self) -> None:
        """Write the card again, beside the saved model, with the latest evaluation. Every rank makes the call."""
        self.create_model_card()
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model card", revision=self.args.hub_revision)

    def _description(self, name: str, dataset: str | None, tags: Any) -> Description:
        script_args, model_args = self._named or (None, None)
        base = getattr(model_args, "model_name_or_path", None) or self.model.config._name_or_path
        dataset = dataset or getattr(script_args, "dataset_name", None)
        return Description(
            name=name,
            place=self.hub_model_id or ".",
            method=self._method,
            base=str(base or "a model in memory"),
            dataset=dataset,
            is_policy=self.model_type == "policy",
            judges_steps=self.model_type == "process_reward_model",
            is_adapter=isinstance(self.accelerator.unwrap_model(self.model), PeftModel),
            facts=self.card_facts(),
            tags=tags or (),
            alarms=self.card_alarms(),
        )

    def card_facts(self) -> dict[str, str]:
        """Return what the card tells about the run, by title."""
        script_args = (self._named or (None,))[0]
        facts = {
            "revision of the base": None if self._revision in (None, "main") else self._revision,
            "data": _data(script_args, self.train_dataset),
            "steps": f"{self.state.global_step:,} of {self.state.max_steps:,}" if self.state.max_steps else None,
            "weights of step": None if self.best_step is None else f"{self.best_step:,}, with the best evaluation",
            "seed": str(self.args.seed),
            "seed of the order of the data": None if self.args.data_seed is None else str(self.args.data_seed),
            "processes": str(self.args.world_size),
        }
        if self._paper:
            facts["method in"] = f"[{self._paper['title']}](https://arxiv.org/abs/{self._paper['id']})"
        return {title: text for title, text in facts.items() if text is not None}

    def card_alarms(self) -> list[str]:
        """Return warnings about the course of the run, for the card."""
        return []


def _data(script_args: Any, dataset: Any) -> str | None:
    rows = f"{len(dataset):,} rows" if hasattr(dataset, "__len__") else None
    name = getattr(script_args, "dataset_name", None)
    if name is None:
        return rows
    split = f"split `{script_args.dataset_train_split}`"
    return ", ".join(part for part in (f"`{name}`", script_args.dataset_config, split, rows) if part)


def revision_of(model: Any, args: Any) -> str | None:
    """Return the revision from which a trainer loads its model; `None` if it gets a model in memory."""
    return (args.model_init_kwargs or {}).get("revision", "main") if isinstance(model, str) else None
