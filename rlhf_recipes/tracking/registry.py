"""Load models from MLflow, with the same result as from the directory that a recipe wrote.

An address is `models:/name@alias`, `models:/name/version` or `models:/m-…`. The store is the current one of MLflow
(`MLFLOW_TRACKING_URI`, `mlflow.set_tracking_uri`).
"""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import mlflow
from filelock import FileLock
from huggingface_hub import constants
from mlflow.entities import LoggedModel, LoggedModelStatus
from peft import PeftModel
from transformers import PreTrainedModel

from rlhf_recipes.models.fingerprint import base_fingerprint, weights_fingerprint
from rlhf_recipes.models.loading import load_policy
from rlhf_recipes.models.presence import require_present
from rlhf_recipes.options.secrets import without_credentials
from rlhf_recipes.rewards.scorer import RewardModelScorer
from rlhf_recipes.tracking.lineage import write_run_file
from rlhf_recipes.tracking.logged_model import SCHEME, UnknownModelError, find_model, is_model_uri
from rlhf_recipes.tracking.store import configure_mlflow

REMEDY = "Put its base there, or say where it is: `load_registered_policy(.., base=..)`."
logger = logging.getLogger(__name__)


def load_registered_policy(uri: str, *, base: str | None = None, **kwargs: Any) -> PreTrainedModel | PeftModel:
    """Load a policy from MLflow. It generates the same text as after its training. See `load_policy`.

    Args:
        uri: Address of the model.
        base: Base of an adapter: a directory, a Hub name, or the address of a model in MLflow. Default: the path in
            the adapter's configuration.
        kwargs: Arguments of `from_pretrained`. `revision` is the revision of the base.

    Raises:
        ValueError: See `download_model`.
    """
    base = download_model(base) if is_model_uri(base) else base
    return load_policy(download_model(uri, base, kwargs.get("revision")), base=base, **kwargs)


def load_registered_reward_model(uri: str, *, base: str | None = None, **kwargs: Any) -> RewardModelScorer:
    """Load a reward model with its tokenizer and card from MLflow. It gives the same scores as after its training.

    Arguments and errors are those of `load_registered_policy`.
    """
    base = download_model(base) if is_model_uri(base) else base
    path = download_model(uri, base, kwargs.get("revision"))
    return RewardModelScorer.from_pretrained(path, base=base, **kwargs)


def require_model(option: str, path: str | None, revision: str | None = None) -> str:
    """Return the directory or Hub name of a model. A model in MLflow is downloaded.

    Args:
        option: Name of the option, for the message.
        path: Value of the option.
        revision: Revision of the base of an adapter, if the base is on the Hub.

    Raises:
        ValueError: See `download_model` and `require_present`.
        FileNotFoundError: See `require_path`.
    """
    return download_model(path, revision=revision) if is_model_uri(path) else require_present(option, path, revision)


def require_models(option: str, paths: list[str], revision: str | None = None) -> list[str]:
    """Return the directory, Hub name or address of each model in a list. See `require_model`."""
    return [require_model(option, path, revision) for path in paths]


def download_model(uri: str, base: str | None = None, revision: str | None = None) -> str:
    """Download a model from MLflow once into `$HF_HOME/rlhf_recipes`, and check its base.

    Args:
        uri: Address of the model.
        base: Directory or Hub name of the base of an adapter. Default: the path in the adapter's configuration.
        revision: Revision of the base on the Hub.

    Returns:
        The directory, with the files that a recipe writes.

    Raises:
        ValueError: If the model cannot be read or is not whole, or its base is missing or has other weights.
    """
    configure_mlflow()
    model = find_model(uri)
    if "base_model" in model.params:
        _check_base(uri, model.params, base or model.params["base_model"], revision)
    return str(_download(uri, model))


def _check_base(uri: str, params: dict[str, str], base: str, revision: str | None) -> None:
    try:
        found = base_fingerprint(base, revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{uri} is an adapter on {base}, which is neither a directory here nor to be had from the Hub. {REMEDY}"
        ) from error
    recorded = params.get("base_fingerprint")
    if recorded is None or found is None:
        logger.warning(f"Whether {base} holds the weights that {uri} was trained on cannot be checked.")
    elif found != recorded:
        raise ValueError(
            f"{uri} was trained on {params['base_model']} (revision {params['base_revision']}, fingerprint "
            f"{recorded}), but {base} holds other weights (fingerprint {found}). {REMEDY}"
        )


def _download(uri: str, model: LoggedModel) -> Path:
    cache = os.environ.get("HF_HOME", constants.HF_HOME)
    folder = Path(cache, "rlhf_recipes", model.model_id, model.name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder.parent}.lock"):  # one process of a machine downloads, the others wait
        if folder.is_dir():
            return folder
        if model.status != LoggedModelStatus.READY:
            raise UnknownModelError(f"{uri} is not whole: its upload was cut off. Send the rest of its run.")
        partial = folder.with_name(f"{model.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        mlflow.artifacts.download_artifacts(f"{SCHEME}{model.model_id}", dst_path=str(partial))
        if weights_fingerprint(partial) != model.tags.get("weights"):
            raise UnknownModelError(f"{uri} does not hold the weights that a recipe has recorded there.")
        note = {"run_id": model.source_run_id, "experiment_id": model.experiment_id, "model_id": model.model_id}
        write_run_file(partial, note | {"tracking_uri": without_credentials(mlflow.get_tracking_uri())})
        return partial.rename(folder)
