"""Options as others may see them: plain values, without secrets."""

import copy
import os
import re
from dataclasses import asdict
from typing import Any

from rlhf_recipes.console import hide_by

TEXT_TOKENS = {"bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token"}
# A name that says by itself that its value is a secret, in an option, a header, a connection string or a variable.
CLEAR_NAME = (
    r"passw(?:or)?d|passphrase|secret|credentials?|authorization|signature|api[_-]?key|cookie"
    r"|(?:access|account|secret|private|shared)[_-]?(?:access[_-]?)?key"
    r"|(?:access|auth|bearer|csrf|hf|hub|id|private|refresh|security|session|tracking)[_-]?token"
)
# A name that says it in the query of an address or as the name of an option. In a sentence it is a common word.
SHORT_NAME = r"token|key|sig|pwd|pass|auth"
_TEXT = f"(?:{'|'.join(sorted(TEXT_TOKENS))})"
SECRET_NAMES = re.compile(
    rf"passw|{CLEAR_NAME}|(?:^|[_-])(?:{SHORT_NAME})(?:$|[_-])|(?:^|[a-z])(?-i:Token|Key)$", re.IGNORECASE
)
_AT, _SCHEME = r"(?:@|%40)", r"(?:://|%3A%2F%2F)"
_IS = r"""(?:["']?\s{0,8}(?::|=|%3A|%3D)(?:\s|%20|\+){0,8})"""
_VALUE = (
    r"""(?:(?:bearer|basic|digest|negotiate|token)(?:\s|%20|\+){1,8})?"""
    r"""(?:\*{3}|"[^"]{0,999}"|'[^']{0,999}'|[^\s&"'<>;]+)"""
)
# Between words, or after a character that is written as in an address (%20).
_START, _WORD = (rf"(?:(?<![{before}])|(?<=%[0-9a-f]{{2}}))" for before in ("a-z0-9", r"\w-"))
# user:password@ of an address. A password may hold @, : and, in the address of a database, /.
_USER = (
    rf"(?P<scheme>{_SCHEME})(?:[^/\s\"'<>?#]{{1,256}}(?={_AT})"
    rf"|[^:/\s\[\]@]{{1,64}}:(?!\d*[/?#])[^\s\"'<>]{{0,256}}(?={_AT}))"
)
# The one table of secrets. A named group stays, and `***` replaces the rest. Lengths are bounded: time is linear.
_TABLE = (
    # A private key, also one that has been cut off.
    r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----.*?(?:-----END [A-Z ]{0,40}PRIVATE KEY-----|\Z)",
    _USER,
    # The same without `://`. An image is named `name:tag@sha256:..`, and a mail `mailto:me@host`.
    r"(?<![\w./:@-])(?!mailto:)[\w.%+-]{1,64}:(?![/\s])[^\s\"'<>/,;(){}\[\]]{1,128}(?=@(?!sha256:)[\w\[])",
    # NAME=value, NAME: value, "NAME": "value"
    rf"(?P<clear>(?:{CLEAR_NAME}){_IS}){_VALUE}",
    rf"(?P<short>(?:[?&;\"']|%3F|%26|{_WORD}(?=(?:token|sig|pwd(?!=/))\s*(?:=|%3D)))(?!{_TEXT}[\"'=:])"
    rf"(?:[\w-]{{0,40}}[_-])?(?:{SHORT_NAME}){_IS}){_VALUE}",
    r"(?P<variable>\b(?-i:[A-Z][A-Z0-9_]{0,40}_(?:TOKEN|KEY))=)[^\s&\"';]+",
    rf"(?P<kind>{_START}(?:bearer|basic)\s{{1,8}})(?=\S{{0,256}}(?:\d|=|(?-i:[a-z][A-Z])))[\w.~+/-]{{8,}}=*",
    # The forms in which tokens are issued.
    rf"{_START}(?:hf_|api_org_|npm_)[a-z0-9]{{16,}}",
    rf"{_START}(?:gh[oprsu]_|dop_v1_|dckr_pat_|[rs]k_(?:live|test)_|whsec_)\w{{10,}}",
    rf"{_START}(?:github_pat_|glpat-|sk-(?!learn)|xox[a-z]-|ya29\.)[\w.-]{{12,}}",
    rf"{_START}(?-i:AIza[\w-]{{12,}}|A[KS]IA[A-Z0-9]{{12,}}|pypi-(?=[\w-]{{0,64}}[A-Z0-9])[\w-]{{16,}})",
    rf"{_START}(?-i:eyJ[\w-]{{6,}}(?:\.[\w-]*){{2,4}})",
)
SECRET_VALUES = re.compile("|".join(_TABLE), re.IGNORECASE | re.DOTALL)


def redact(text: str) -> str:
    """Replace passwords, tokens and keys by `***`."""
    return SECRET_VALUES.sub(lambda found: f"{found[found.lastgroup] if found.lastgroup else ''}***", text)


hide_by(redact)


def reason_of(error: Exception) -> str:
    """Return the first line of an error, at most 300 characters, without secrets."""
    lines = redact(str(error)).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def without_credentials(uri: str) -> str:
    """Return an address as it can be used by someone who has credentials of their own.

    Only user, password and the secret parameters of the query are left out: in a path, text of any form is a name.
    """
    scheme, mark, _ = uri.partition("://")
    if not mark or scheme.partition("+")[0] in ("file", "sqlite"):
        return uri
    start, mark, query = re.sub(f"{_USER}{_AT}", r"\g<scheme>", uri, flags=re.IGNORECASE).partition("?")
    kept = [part for part in query.split("&") if not _is_secret(part.partition("=")[0])]
    return start + (mark if kept else "") + "&".join(kept)


def holds_credentials(address: str | None) -> bool:
    """Return whether the address of a server, with or without `http://`, holds a user, a password or a token."""
    whole = address if address is None or "://" in address else f"http://{address}"
    return whole is not None and without_credentials(whole) != whole


def use_hub_token(token: str | None) -> None:
    """Give huggingface_hub a token in the environment of this process, where it has priority over a stored login."""
    if token is not None:
        os.environ["HF_TOKEN"] = token


class _UsedText(str):
    """A text that is used as it is, while a pickle holds another value in its place."""

    written: str | None = None

    def __reduce__(self) -> Any:
        return (type(None), ()) if self.written is None else (str, (self.written,))


def without_secrets(args: Any) -> Any:
    """Return a copy of a trainer's options for files: its pickle has no secret, by the name or the form of an option.

    The copy itself still has `hub_token` and all texts, because transformers also uses it: it pushes with the token,
    and copies files into `output_dir`, whose name may look like a token.
    """
    shown = copy.copy(args)
    vars(shown).update(_without_secrets(vars(args)))
    if args.hub_token is not None:
        vars(shown)["hub_token"] = _UsedText(args.hub_token)
    return shown


def _without_secrets(value: Any) -> Any:
    # Plain types only: other values, such as enumerations, must stay what they are.
    if type(value) is dict:
        return {name: None if _is_secret(str(name)) else _without_secrets(entry) for name, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_without_secrets(entry) for entry in value)
    if type(value) is not str or (written := redact(value)) == value:
        return value
    used = _UsedText(value)
    used.written = written
    return used


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
