"""Whether an option names a model that can be loaded: asked before data and other models are loaded."""

import os

from transformers.utils import cached_file

from rlhf_recipes.models.fingerprint import ADAPTER_CONFIG
from rlhf_recipes.options.paths import is_address, require_path

CONFIGS = ("config.json", ADAPTER_CONFIG)


def require_present(option: str, path: str | None, revision: str | None = None) -> str:
    """Return the directory or Hub name of a model, or the address of a served one. See also `require_path`.

    Args:
        option: Name of the option, for the message.
        path: Value of the option.
        revision: Revision on the Hub.

    Raises:
        ValueError: If there is no model of this name.
        FileNotFoundError: See `require_path`.
    """
    path = require_path(option, path)
    if is_address(path):
        return path
    reason = "it has no `config.json`"
    try:
        quiet = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
        if any(cached_file(path, name, **quiet) for name in CONFIGS):
            return path
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
    what = "a directory" if os.path.exists(path) else "no directory here, so it was looked for on the Hub"
    raise ValueError(f"`{option}` {path!r} cannot be loaded ({what}): {reason}")
