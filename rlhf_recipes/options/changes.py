"""Options with other values: a copy, because what a user wrote is never changed."""

import copy
import logging
from typing import Any, TypeVar

from transformers.trainer_pt_utils import AcceleratorConfig

from rlhf_recipes.options.trackers import check_trackers

Options = TypeVar("Options")
logger = logging.getLogger(__name__)


def with_changes(options: Options, **changes: Any) -> Options:
    """Return a copy of options with some values changed.

    The copy has its own lists and dictionaries, in which TRL writes. It shares the state of devices and of DeepSpeed,
    which exists once in a process. Nothing is checked again: `__post_init__` expects the values that a user writes.
    """
    own = copy.copy(options)
    containers = {name: value for name, value in vars(options).items() if _is_container(value)}
    vars(own).update(copy.deepcopy(containers) | changes)
    return own


def _is_container(value: Any) -> bool:
    return isinstance(value, dict | list | set | AcceleratorConfig)


def options_of_trainer(training_args: Options, model_init_kwargs: dict[str, Any]) -> Options:
    """Return the options with which a recipe builds its trainer, and log what differs from the user's.

    Args:
        training_args: Options of one of TRL's trainers, as the user wrote them.
        model_init_kwargs: Options of `from_pretrained`, which take priority over those of the trainer.

    Raises:
        ValueError: If `report_to` names a tracker that is not installed.
    """
    asked: Any = training_args
    check_trackers(asked.report_to)
    changes = {
        "report_to": [name for name in asked.report_to if name != "mlflow"],  # `track_run` writes to MLflow
        "model_init_kwargs": (asked.model_init_kwargs or {}) | model_init_kwargs,
    }
    changed = [f"`{name}`" for name, value in changes.items() if value != getattr(asked, name)]
    logger.info(f"The recipe sets {', '.join(changed) or 'nothing'} for the trainer.")
    return with_changes(training_args, **changes)
