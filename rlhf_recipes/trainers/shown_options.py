"""Let the trackers of transformers record the options of a run without secrets."""

import copy
from typing import Any

from transformers import Trainer
from transformers.integrations import get_reporting_integration_callbacks

from rlhf_recipes.options.secrets import public_options


class _WithoutSecrets:
    """Give the callback of a tracker, which stands behind this class, options without secrets to record."""

    def setup(self, args: Any, *rest: Any, **kwargs: Any) -> None:
        """Begin the record."""
        super().setup(_shown(args), *rest, **kwargs)  # type: ignore[misc]

    def on_train_begin(self, args: Any, *rest: Any, **kwargs: Any) -> None:
        """Begin the record, as trackers without a `setup` do."""
        super().on_train_begin(_shown(args), *rest, **kwargs)  # type: ignore[misc]


def _shown(args: Any) -> Any:
    """Return a copy of the options, which is the same but for the dictionary that trackers record."""
    shown, public = copy.copy(args), public_options((args,))[type(args).__name__]
    vars(shown)["to_dict"] = lambda: dict(public)  # JSON and the other forms are made from it
    return shown


def hide_secrets_from_trackers(trainer: Trainer) -> None:
    """Let each tracker that transformers has added record the options of a trainer without secrets.

    transformers hides tokens by the names of options only, not those inside of dictionaries and addresses.
    """
    kinds = get_reporting_integration_callbacks(trainer.args.report_to)
    callbacks = trainer.callback_handler.callbacks
    for place, callback in enumerate(callbacks):
        if (kind := type(callback)) in kinds:
            callbacks[place] = object.__new__(type(kind.__name__, (_WithoutSecrets, kind), {}))
            vars(callbacks[place]).update(vars(callback))
