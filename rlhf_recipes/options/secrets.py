"""Options as others may see them: plain values, without secrets."""

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
    """Replace passwords, tokens and keys by `***`."""
    return SECRET_VALUES.sub(lambda found: f"{found[1] or ''}***", text)


def without_credentials(uri: str) -> str:
    """Return an address as it can be used by someone who has credentials of their own."""
    return redact(uri).replace("://***@", "://")


def use_hub_token(token: str | None) -> None:
    """Give huggingface_hub a token in the environment of this process, where it has priority over a stored login."""
    if token is not None:
        os.environ["HF_TOKEN"] = token


class _UnwrittenToken(str):
    """A token that can be used, and that a pickle holds as `None`."""

    def __reduce__(self) -> Any:
        return type(None), ()


def without_secrets(args: Any) -> Any:
    """Return a copy of a trainer's options for files: it has no option that is a secret by its name or its form.

    The exception is `hub_token`: transformers pushes with it what it has just written. The copy has the token, and a
    pickle of the copy does not.
    """
    shown = copy.copy(args)
    vars(shown).update(_without_secrets(vars(args)))
    if args.hub_token is not None:
        vars(shown)["hub_token"] = _UnwrittenToken(args.hub_token)
    return shown


def _without_secrets(value: Any) -> Any:
    # Plain types only: other values, such as enumerations, must stay what they are.
    if type(value) is dict:
        return {name: None if _is_secret(str(name)) else _without_secrets(entry) for name, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_without_secrets(entry) for entry in value)
    return redact(value) if type(value) is str else value


def holds_credentials(uri: str | None) -> bool:
    """Return whether an address holds a user and a password."""
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
