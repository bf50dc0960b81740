"""Packages that an option needs, asked for before anything is loaded."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from rlhf_recipes.options.trackers import check_trackers

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
    check_trackers(options.get("report_to") or [])
