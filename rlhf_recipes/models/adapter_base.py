"""The base of an adapter: noted when the adapter is saved, and found and compared when it is loaded."""

import json
import logging
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel

from rlhf_recipes.models.fingerprint import ADAPTER_CONFIG, base_fingerprint

BASE_FILE = "adapter_base.json"
# Initialisations of LoRA that leave the weights of the base alone and start from the model without an adapter.
NEUTRAL_INITIALISATIONS = (True, "gaussian")
logger = logging.getLogger(__name__)


def initialisation(config: PeftConfig) -> Any:
    """Return the initialisation of a LoRA configuration that starts elsewhere or changes the base; else `None`."""
    chosen = getattr(config, "init_lora_weights", True)
    return None if chosen in NEUTRAL_INITIALISATIONS else chosen


def check_is_merged(config: PeftConfig | None, name: str) -> None:
    """Refuse an adapter that cannot be merged into its base: evaluation, export and reward models merge it.

    Args:
        config: Its configuration. `None` is accepted.
        name: Its directory or the argument that holds it, for the message.

    Raises:
        ValueError: If it puts tokens of its own before each text.
    """
    if config is not None and config.is_prompt_learning:
        raise ValueError(
            f"{name} is an adapter of the type {config.peft_type.value}, which cannot be merged into a model and "
            "ignores the padding of a row. Use LoRA."
        )


def base_of_adapter(model: Any, revision: str | None = None) -> dict[str, str] | None:
    """Return place and fingerprint of the base of a `PeftModel`; `None` without PEFT, or without files of the base.

    Args:
        model: Any model.
        revision: Revision of a base on the Hub. Without it, its files are not known.
    """
    if not isinstance(model, PeftModel):
        return None
    name = str(model.peft_config[model.active_adapter].base_model_name_or_path)
    if revision is None and not Path(name).is_dir():
        return None
    try:
        found = base_fingerprint(name, revision, local_files_only=True)
    except (OSError, ValueError):  # it was built in memory
        return None
    if found is None:
        return None
    if Path(name).is_dir():
        return {"base": str(Path(name).resolve()), "fingerprint": found}
    return {"base": name, "fingerprint": found, "revision": str(revision)}


def save_base(base: dict[str, str] | None, directory: str | Path) -> None:
    """Write what `base_of_adapter` returned beside the adapter. For `None`, remove a file that an earlier run left."""
    path = Path(directory, BASE_FILE)
    if base is None:
        path.unlink(missing_ok=True)
    else:
        path.write_text(json.dumps(base, indent=2) + "\n", encoding="utf-8")


def saved_base(directory: str | Path) -> dict[str, str] | None:
    """Return the base of the adapter in a directory as its trainer noted it; `None` without a note."""
    path = Path(directory, BASE_FILE)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def at_saved_revision(adapter: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return `from_pretrained` options with the revision of an adapter's base in training, if they name none."""
    noted = (saved_base(adapter) or {}).get("revision")
    return {**kwargs, "revision": noted} if noted is not None and kwargs.get("revision") is None else kwargs


def find_base(adapter: str, base: str | None = None, revision: str | None = None) -> str:
    """Return the directory or Hub name of the base of an adapter, and check that its weights are those of training.

    Args:
        adapter: Directory of the adapter.
        base: Directory or Hub name. Default: the base that the adapter names, else the directory in which it was.
        revision: Revision on the Hub.

    Raises:
        ValueError: If the base is not found, or has other weights.
    """
    config = PeftConfig.from_pretrained(adapter)
    check_is_merged(config, adapter)
    named, noted = str(config.base_model_name_or_path or ""), saved_base(adapter)
    if not (named or base):
        raise ValueError(
            f"{adapter} does not name its base: write it as `base_model_name_or_path` into {adapter}/{ADAPTER_CONFIG} "
            "(in Python: `base=`)."
        )
    places = list(dict.fromkeys([base] if base else [named, *([noted["base"]] if noted else [])]))
    here = [place for place in places if Path(place).is_dir()]
    if not (here or base) and noted is not None and Path(noted["base"]).is_absolute():
        raise ValueError(_not_found(adapter, places))  # on the Hub, its name may be somebody else's
    found = {place: _fingerprint(adapter, place, places, revision) for place in here or places[:1]}
    first = next(iter(found))
    if noted is None or found[first] is None:
        logger.warning(f"Whether {first} holds the weights on which {adapter} was trained cannot be checked.")
        return first
    match = next((place for place, fingerprint in found.items() if fingerprint == noted["fingerprint"]), None)
    if match is None:
        raise ValueError(
            f"{adapter} was trained on {noted['base']} (fingerprint {noted['fingerprint']}), but {first} holds other "
            f"weights (fingerprint {found[first]}). Restore the base, give its revision (`model_revision`), or name "
            f"it as `base_model_name_or_path` in {adapter}/{ADAPTER_CONFIG}. To use other weights on purpose, delete "
            f"{adapter}/{BASE_FILE}."
        )
    return match


def _fingerprint(adapter: str, place: str, places: list[str], revision: str | None) -> str | None:
    try:
        return base_fingerprint(place, revision)
    except (OSError, ValueError) as error:
        raise ValueError(_not_found(adapter, places)) from error


def _not_found(adapter: str, places: list[str]) -> str:
    looked = " and ".join(str(Path(place).absolute()) for place in places)
    return (
        f"{adapter} is an adapter on {places[0]}, which is neither a directory ({looked}) nor a model on the Hub. A "
        "relative path starts at the working directory: run the command where the base is, or correct "
        f"`base_model_name_or_path` in {adapter}/{ADAPTER_CONFIG} (in Python: `base=`)."
    )
