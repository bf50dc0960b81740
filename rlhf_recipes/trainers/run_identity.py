"""The identity of a run: the models, data and options that must be the same when the run is resumed.

Every checkpoint holds it: in `IDENTITY_FILE`, or with PPO beside the rest of its state. A resume compares it with its
own.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import SchedulerType, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from rlhf_recipes.data.digest import dataset_digest
from rlhf_recipes.models.adapter_base import base_of_adapter
from rlhf_recipes.models.fingerprint import fingerprint
from rlhf_recipes.models.quantization import quantization_of
from rlhf_recipes.options.relevance import defaults_of, options_that_count
from rlhf_recipes.rewards.protocol import scorer_of
from rlhf_recipes.trainers.saving import SavingTrainer

IDENTITY_FILE = "run_identity.json"
# Checkpoints of an earlier version lack these facts: there is then nothing to compare with.
LATER_FACTS = ("the adapter", "`dtype`", "the quantisation")
INCIDENTAL_FIELDS = ("peft_version", "base_model_name_or_path", "revision", "inference_mode")
logger = logging.getLogger(__name__)


class RunIdentity:
    """Refuse to resume a run with another reference, other rewards, data or options, or more or fewer processes.

    Args:
        facts: Facts of the run, by name. They are compared as JSON.
        allow_changes: Whether to warn instead.
        defaults: Facts of a checkpoint that does not note them.
    """

    def __init__(
        self, facts: dict[str, Any], *, allow_changes: bool, defaults: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        self._facts: dict[str, Any] = json.loads(json.dumps(facts))
        known = {name: value for name, value in defaults.items() if name in self._facts}
        self._defaults: dict[str, Any] = json.loads(json.dumps(known, default=str))
        self._allow_changes = allow_changes

    def state_dict(self) -> dict[str, Any]:
        """Return the facts."""
        return self._facts

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare the facts of a checkpoint with those of this run.

        Raises:
            ValueError: If a fact differs. The message gives both values.
        """
        state = self._defaults | state
        names = sorted({*state, *self._facts} - {name for name in LATER_FACTS if name not in state})
        changed = [
            f"{name} was {state.get(name)}, is {self._facts.get(name)}"
            for name in names
            if state.get(name) != self._facts.get(name)
        ]
        if not changed:
            return
        message = f"The checkpoint is of another run: {'; '.join(changed)}."
        if not self._allow_changes:
            raise ValueError(
                f"{message} Resume with the values of the checkpoint, or set `allow_changes_on_resume: true`."
            )
        logger.warning(f"{message} The run resumes anyway, because `allow_changes_on_resume` is set.")


class IdentifiedTrainer(SavingTrainer):
    """Resume only from a checkpoint of the same run. PPO has the same check in its own state.

    A subclass calls `identify` before it trains.
    """

    _identity: RunIdentity

    def identify(
        self,
        args: Any,
        *,
        model: Any,
        network: Any,
        peft_config: Any,
        others: Mapping[str, Any] = MappingProxyType({}),
        **data: Any,
    ) -> None:
        """Note the facts that must be the same when the run is resumed. For another length there is a warning.

        Args:
            args: Options, as the user wrote them. TRL's own have no `allow_changes_on_resume`.
            model: Path or model that the user gave.
            network: The same model, loaded, before anything is added to it.
            peft_config: Adapter that will be added to it.
            others: Facts beside these, by name.
            data: `train_dataset`, and `rewards` if there are any.
        """
        facts = facts_of_training(args, **data) | options_that_count(args, length_is_free=True)
        facts |= {"the model to start from": _start(model)} | facts_of_network(network, peft_config) | dict(others)
        allow = getattr(args, "allow_changes_on_resume", False)
        self._identity = RunIdentity(facts, allow_changes=allow, defaults=defaults_of(args))

    def _save_progress(self, folder: Path) -> None:
        super()._save_progress(folder)
        if self.args.should_save:
            (folder / IDENTITY_FILE).write_text(json.dumps(self._identity.state_dict(), indent=2) + "\n", "utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        file = Path(checkpoint or "", IDENTITY_FILE)
        if checkpoint is not None and file.is_file():
            self._identity.load_state_dict(json.loads(file.read_text(encoding="utf-8")))
        elif checkpoint is not None:
            logger.warning(
                f"{checkpoint} is of an older version, which did not note models, data and options: this "
                "run cannot be compared with it."
            )
        if checkpoint is not None and self.is_world_process_zero():
            self._warn_of_length(Path(checkpoint, TRAINER_STATE_NAME))
        super()._load_optimizer_and_scheduler(checkpoint)

    def _warn_of_length(self, file: Path) -> None:
        before, now = TrainerState.load_from_json(str(file)).max_steps, self.state.max_steps
        schedule = SchedulerType(self.args.lr_scheduler_type).value
        trains = self.state.global_step < now and not self._has_stopped
        if trains and before != now and not schedule.startswith("constant"):
            logger.warning(
                f"The run had {before:,} steps, and has {now:,} now. `lr_scheduler_type` {schedule} depends on this "
                f"length, so the learning rate jumps at step {self.state.global_step:,}. For the schedule of before, "
                "set the length of before."
            )


def _start(model: Any) -> str:
    """Return a text that identifies the model to start from. New weights on a model in memory are random, and free."""
    if isinstance(model, PeftModel):
        return (base_of_adapter(model) or {}).get("fingerprint", "an adapter in memory")
    return fingerprint(getattr(model, "base_model", model))


def facts_of_training(args: Any, *, train_dataset: Any, rewards: list[Any] | None = None) -> dict[str, Any]:
    """Return the facts of data, rewards and processes that must be the same when a run is resumed, by name.

    Args:
        args: Options of the run.
        train_dataset: Data that the trainer reads.
        rewards: Reward functions; `None` if the training has none.
    """
    facts = {
        # A stream has no hash before it is read.
        "the training data": dataset_digest(train_dataset) if isinstance(train_dataset, Dataset) else "a stream",
        "the number of processes": args.world_size,
    }
    if rewards is not None:
        facts["the rewards"] = [scorer_of(reward).identity() for reward in rewards]
    return facts


def facts_of_run(args: Any, *, policy: Any, rewards: list[Any], train_dataset: Any) -> dict[str, Any]:
    """Return the facts of a PPO run that must be the same when it is resumed, by name.

    Args:
        args: Options of the run.
        policy: Path or model that the user gave, before anything is added to it.
        rewards: Reward functions, without the reward adapter.
        train_dataset: Data that the trainer reads.
    """
    facts = facts_of_training(args, train_dataset=train_dataset, rewards=rewards)
    facts["the policy to start from"] = fingerprint(policy)
    if args.reward_adapter is not None:
        facts["the reward adapter"] = fingerprint(args.reward_adapter)
    return facts | options_that_count(args)


def facts_of_network(policy: Any, peft_config: PeftConfig | None) -> dict[str, Any]:
    """Return how the policy was loaded and what is added to it, by name.

    Args:
        policy: Loaded policy, before anything is added to it.
        peft_config: Adapter that will be added to it. Its defaults are left out: another version of PEFT has others.
    """
    quantization = quantization_of(policy)
    adapter = None if peft_config is None else changed_fields(peft_config)
    quantized = None if quantization is None else quantization.to_diff_dict()
    facts = {"`dtype`": policy.dtype, "the quantisation": quantized, "the adapter": adapter}
    return json.loads(json.dumps(facts, default=lambda value: sorted(value) if isinstance(value, set) else str(value)))


def changed_fields(config: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that differ from their defaults, but for those that name a version or place."""
    values = {}
    for field in fields(config):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if getattr(config, field.name) != default and field.name not in INCIDENTAL_FIELDS:
            values[field.name] = getattr(config, field.name)
    return values
