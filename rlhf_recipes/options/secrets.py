"""What a run was asked to do, as it may be shown to others: plain values, without secrets."""

import copy
import os
import re
from dataclasses import asdict
from typing import Any

SECRET_NAMES = re.compile(r"passw|secret|credential|authorization|(^|_)(token|key|api_?key)($|_)", re.IGNORECASE)
TEXT_TOKENS = {"bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token"}
# user:password@ of an address, a secret in its query, and the formats in which tokens are issued.
SECRET_VALUES = re.compile(
    r"(?<=://)[^/\s]+(?=@)"
    r"|(?<=[?&])((?:\w*_)?(?:token|key|password|secret)=)[^&\s]+"
    r"|\b(?:hf_|sk-|ghp_|github_pat_|glpat-|xox[abp]-|AKIA)[\w-]{12,}",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """Replace what gives access to something by `***`."""
    return SECRET_VALUES.sub(lambda found: f"{found[1] or ''}***", text)


def without_credentials(uri: str) -> str:
    """Return an address as it can be used by someone who has credentials of their own."""
    return redact(uri).replace("://***@", "://")


def keep_token_out_of_files(args: Any) -> None:
    """Hand `hub_token` to huggingface_hub by the environment, in place: every checkpoint holds a pickle of `args`.

    What is asked for by an option goes before what the environment of this process has held.
    """
    if args.hub_token is not None:
        os.environ["HF_TOKEN"], args.hub_token = args.hub_token, None


def without_secrets(args: Any) -> Any:
    """Return a copy of a trainer's options for files: what is a secret by its name or its form is not in it."""
    shown = copy.copy(args)
    vars(shown).update(_without_secrets(vars(args)))
    return shown


def _without_secrets(value: Any) -> Any:
    # Plain types alone: what else an option can be, an enumeration say, must stay what it is.
    if type(value) is dict:
        return {name: None if _is_secret(str(name)) else _without_secrets(entry) for name, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_without_secrets(entry) for entry in value)
    return redact(value) if type(value) is str else value


def holds_credentials(uri: str | None) -> bool:
    """Return whether an address has a user and a password in it."""
    return uri is not None and without_credentials(uri) != redact(uri)


def public_options(configs: tuple[Any, ...]) -> dict[str, dict[str, Any]]:
    """Return the options of dataclasses by class name, as values that YAML and JSON know, without secrets.

    An option whose name says that it is a secret is left out, whatever it holds; in all others, credentials inside
    addresses and issued tokens are replaced.
    """
    raw = {
        type(config).__name__: config.to_dict() if hasattr(config, "to_dict") else asdict(config) for config in configs
    }
    return {name: _public(options) for name, options in raw.items()}


def _public(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _public(entry) for name, entry in value.items() if not _is_secret(str(name))}
    if isinstance(value, list | tuple | set):
        return [_public(entry) for entry in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return redact(str(value))


def _is_secret(name: str) -> bool:
    return name not in TEXT_TOKENS and SECRET_NAMES.search(name) is not None
