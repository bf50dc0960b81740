"""Loading of weights from a directory that someone else may have written: data is read, code is not run.

By default, transformers asks on the terminal whether to run a repository's code, and falls back to pickled weights.
Here the answer is no, and weights are safetensors.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.utils import cached_file

from rlhf_recipes.options.refusals import is_refusal, with_option

PICKLES = {"pytorch_model*.bin": "model*.safetensors", "adapter_model*.bin": "adapter_model*.safetensors"}
# Ends of the keys of a configuration that choose a program: `attn_implementation`, `_attn_implementation_internal`.
IMPLEMENTATIONS = ("_implementation", "_implementation_internal")


def safe_kwargs(path: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return `from_pretrained` options for the weights of a path, with safe defaults for missing ones.

    Raises:
        ValueError: If the configuration of the model names a kernel, and the options name no attention.
    """
    if kwargs.get("attn_implementation") is None:
        _refuse_kernel(path, kwargs.get("revision"))
    return {"trust_remote_code": False, "use_safetensors": True, **kwargs}


@contextmanager
def safe_loading(*paths: str) -> Iterator[None]:
    """Refuse pickled weights in these directories, and report refused code in one line.

    Raises:
        ValueError: If a directory holds weights as pickles only or broken files, needs code of its own that is not
            allowed, or has a padding token outside its vocabulary.
    """
    for path in paths:
        _refuse_pickles(path)
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"The weights in {' or '.join(dict.fromkeys(paths))} cannot be read ({error}). Copy or download them "
            "again; pointers of Git LFS become files by `git lfs pull`."
        ) from None
    except AssertionError as error:
        if "adding_idx" not in str(error):
            raise
        raise ValueError(
            f"{' or '.join(dict.fromkeys(paths))} has a `pad_token_id` in `config.json` that is outside its "
            "vocabulary. Write the id of one of its tokens."
        ) from None
    except (ValueError, ImportError) as error:  # transformers has the second one for a package that is missing
        if "trust_remote_code" not in str(error):
            if not is_refusal(error):
                raise
            raise ValueError(with_option(error)) from error
        raise ValueError(
            f"{' or '.join(dict.fromkeys(paths))} brings Python code of its own, which loading would run. It was not "
            "run. Read the code. If you trust it, set `trust_remote_code: true`. Reward models and judges of a run "
            "may never bring code."
        ) from None


def _refuse_kernel(path: str, revision: str | None) -> None:
    """Refuse a model whose `config.json` names a kernel of the Hub: transformers would download and run it."""
    quiet: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
    file = cached_file(path, "config.json", revision=revision, **quiet)
    config = {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
    kernel = next((value for value in _implementations(config) if "/" in value), None)
    if kernel is not None:
        raise ValueError(
            f"The `config.json` of {path} names the kernel {kernel!r}. Loading would download this program and run "
            "it, so it was not loaded. Set `attn_implementation: sdpa`, or the kernel if you trust it."
        )


def _implementations(config: Any, is_named: bool = False) -> Iterator[str]:
    """Yield each text under a key for an implementation, at any depth."""
    if isinstance(config, dict):
        for name, value in config.items():
            yield from _implementations(value, is_named or name.endswith(IMPLEMENTATIONS))
    elif isinstance(config, list):
        for entry in config:
            yield from _implementations(entry, is_named)
    elif is_named and isinstance(config, str):
        yield config


def _refuse_pickles(path: str) -> None:
    for pickles, tensors in PICKLES.items():
        found = sorted(Path(path).glob(pickles)) if Path(path).is_dir() else []
        if found and not any(Path(path).glob(tensors)):
            raise ValueError(
                f"{path} holds its weights as a pickle ({found[0].name}), which can run code when it is loaded. On a "
                "machine where that does no harm, load it with transformers or PEFT, and write it as safetensors with "
                "`save_pretrained`."
            )
