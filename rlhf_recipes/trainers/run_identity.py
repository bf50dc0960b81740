"""What must be the same when a run is resumed: the models, the data and the options that make its numbers.

Stored in every checkpoint beside the rest of PPO's state, and compared when one is loaded.
"""

import json
import logging
from typing import Any

from datasets import Dataset
from peft import PeftConfig
from torch import nn

from rlhf_recipes.data.digest import dataset_digest
from rlhf_recipes.models.fingerprint import (
    fingerprint_of_files,
    fingerprint_of_weights,
    weights_fingerprint,
)
from rlhf_recipes.models.reward_model import is_adapter
from rlhf_recipes.options.relevance import options_that_count
from rlhf_recipes.rewards.client import RemoteRewardModel

logger = logging.getLogger(__name__)


class RunIdentity:
    """Refuse to go on with a run whose reference, rewards, data, options or processes are others.

    Args:
        facts: By name; equal ones are compared as JSON.
        allow_changes: Warn instead.
    """

    def __init__(self, facts: dict[str, Any], *, allow_changes: bool) -> None:
        self._facts: dict[str, Any] = json.loads(json.dumps(facts))
        self._allow_changes = allow_changes

    def state_dict(self) -> dict[str, Any]:
        """Return the facts."""
        return self._facts

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare with the facts of a checkpoint.

        Raises:
            ValueError: If they differ, naming what was and what is.
        """
        names = sorted({*state, *self._facts})
        changed = [
            f"{name} was {state.get(name)}, is {self._facts.get(name)}"
            for name in names
            if state.get(name) != self._facts.get(name)
        ]
        if not changed:
            return
        told = f"The checkpoint is of another run: {'; '.join(changed)}."
        if not self._allow_changes:
            raise ValueError(f"{told} Resume with what it was written with, or set `allow_changes_on_resume: true`.")
        logger.warning(f"{told} Resumed all the same, as `allow_changes_on_resume` says.")


def facts_of_run(
    args: Any, *, policy: Any, rewards: list[Any], functions: list[Any], train_dataset: Any
) -> dict[str, Any]:
    """Return what must be the same when a run is resumed, by name.

    Args:
        args: Options.
        policy: As it was given, before anything is added to it.
        rewards: Reward models and functions, as they were given.
        functions: What is called for each: it knows the weights behind an address.
        train_dataset: As it is trained on.
    """
    pairs = zip(rewards, functions, strict=True)
    facts = {
        "the policy to start from": fingerprint(policy),
        "the rewards": [fingerprint(f if isinstance(f, RemoteRewardModel) else given) for given, f in pairs],
        "the training data": data_fingerprint(train_dataset),
        "the number of processes": args.world_size,
    }
    if args.reward_adapter is not None:
        facts["the reward adapter"] = fingerprint(args.reward_adapter)
    return facts | options_that_count(args)


def fingerprint(model: Any) -> str:
    """Return what identifies a model or a reward function.

    Of a path a hash of its files, those of an adapter's base included; of an instance a hash of sampled weights; of
    a function its name, whatever it does; of a served model what its server says of its files, wherever it is served.
    """
    if isinstance(model, RemoteRewardModel):
        return model.weights or model.url  # of a server that does not know its files
    if isinstance(model, nn.Module):
        return fingerprint_of_weights(model)
    if not isinstance(model, str):
        return str(getattr(model, "__name__", type(model).__name__))
    if not is_adapter(model):
        return fingerprint_of_files(model)
    base = PeftConfig.from_pretrained(model).base_model_name_or_path
    return f"{weights_fingerprint(model)} on {fingerprint_of_files(base)}"


def data_fingerprint(dataset: Any) -> str:
    """Return a hash of a dataset's rows; a stream has none that could be told beforehand."""
    return dataset_digest(dataset) if isinstance(dataset, Dataset) else "a stream"
