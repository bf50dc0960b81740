"""Trackers that a training reports to beside MLflow."""

from collections.abc import Iterable

from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

EXTRAS = ("tensorboard", "trackio", "wandb")
_UNLISTED = ("azure_ml", "flyte")  # transformers lists them as available in some environments only


def check_trackers(report_to: Iterable[str]) -> None:
    """Check that each tracker is known and installed. transformers would find out after the models are loaded.

    Raises:
        ValueError: If one is not.
    """
    others = [name for name in report_to if name != "mlflow"]
    unknown = [name for name in others if name not in INTEGRATION_TO_CALLBACK]
    if unknown:
        known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
        raise ValueError(f"`report_to` names {unknown[0]}, which is no tracker. The trackers are {known}.")
    if not others:
        return  # to look for packages takes a second
    available = {*get_available_reporting_integrations(), *_UNLISTED}
    missing = [name for name in others if name not in available]
    if missing:
        extra = f": `pip install 'rlhf-recipes[{missing[0]}]'`" if missing[0] in EXTRAS else ""
        raise ValueError(
            f"`report_to` names {missing[0]}, which is not installed. Install it{extra}, or leave it out."
        )
