"""Names that MLflow takes, for metrics, parameters, tags and models."""

import hashlib
import re
from collections.abc import Iterable
from typing import Any

from mlflow.utils.validation import MAX_ENTITY_KEY_LENGTH

_HASH = 8  # characters that tell two names apart that would be one


def clean_name(name: str) -> str:
    """Return a name that MLflow takes as the key of a metric, parameter or tag.

    Like transformers, replace by `_` what is not an ASCII letter or digit, `_`, `-`, `.`, `:`, `/` or a space. Replace
    also the parts of a path that would lead to another name (`..`, `/abc`, `a//b`), and shorten a long name.
    """
    name = re.sub(r"[^0-9A-Za-z_\-. :/]", "_", name)
    parts = [part if part.strip(".") else "_" for part in name.split("/")]
    name = re.sub(r"^\.\.", "__", "/".join(parts))
    return name if len(name) <= MAX_ENTITY_KEY_LENGTH else _marked(name[: MAX_ENTITY_KEY_LENGTH - _HASH - 1], name)


def model_name(directory: str) -> str:
    """Return the name of a directory as the name of a model in MLflow, which refuses dots and much else."""
    return re.sub(r"[^\w-]", "_", directory)


def _marked(clean: str, name: str) -> str:
    return f"{clean}_{hashlib.sha256(name.encode()).hexdigest()[:_HASH]}"


class Names:
    """Clean the names of one run so that different names stay different."""

    def __init__(self) -> None:
        self._taken: dict[str, str] = {}  # the name that has a clean name, by this

    def __call__(self, names: Iterable[str]) -> dict[str, str]:
        """Return the clean name of each name. Of two that would be one, the later gets a hash at its end."""
        clean = {name: clean_name(name) for name in names}
        for name in sorted(clean, key=lambda name: clean[name] != name):  # a name that MLflow takes keeps its own
            if self._taken.setdefault(clean[name], name) != name:
                clean[name] = _marked(clean[name][: MAX_ENTITY_KEY_LENGTH - _HASH - 1], name)
        return clean


def by_clean_name(values: dict[str, Any]) -> dict[str, Any]:
    """Return values under names that MLflow takes."""
    return {clean: values[name] for name, clean in Names()(values).items()}
