"""Whether an option names a model that can be loaded: asked before data and other models are loaded."""

import os

from rlhf_recipes.models.fingerprint import ADAPTER_CONFIG
from rlhf_recipes.options.paths import is_address, require_path, why_unread
from rlhf_recipes.options.spelling import directory_meant


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
    reason = why_unread(path, "config.json", ADAPTER_CONFIG, revision=revision)
    if reason is None:
        return path
    is_here = os.path.exists(path)
    what = "a directory" if is_here else "no directory here, so it was looked for on the Hub"
    hint = "" if is_here else f".{directory_meant(path)}"
    raise ValueError(f"`{option}` {path!r} cannot be loaded ({what}): {reason}{hint}")
