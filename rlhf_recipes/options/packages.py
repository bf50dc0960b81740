"""Packages that an option needs, asked for before anything is loaded."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

# Options that need a package if they are set: the package, and how to install it.
NEEDED = {
    "load_in_4bit": ("bitsandbytes", "'rlhf-recipes[quantization]'"),
    "load_in_8bit": ("bitsandbytes", "'rlhf-recipes[quantization]'"),
    "use_vllm": ("vllm", "'rlhf-recipes[vllm]'"),
    "deepspeed": ("deepspeed", "'rlhf-recipes[deepspeed]'"),
}


def check_packages(options: Mapping[str, Any]) -> None:
    """Check that the packages which these options need are installed.

    Args:
        options: Options by name.

    Raises:
        ValueError: If one is missing. The message says how to install it.
    """
    for name, (package, install) in NEEDED.items():
        if options.get(name) and find_spec(package) is None:
            raise ValueError(f"`{name}` needs the package `{package}`: `pip install {install}`.")
    trackers = options.get("report_to") or []
    _check_trackers([trackers] if isinstance(trackers, str) else trackers)


def _check_trackers(names: list[str]) -> None:
    available = get_available_reporting_integrations()
    for name in names:
        if name in ("all", "none", *available):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(f"`report_to` is one of {', '.join(INTEGRATION_TO_CALLBACK)}, got {name!r}.")
        raise ValueError(f"`report_to: {name}` needs the package `{name}`: `pip install {name}`.")
