"""Where a run comes from: code, packages, processes, data, and the runs before it.

Layer L1. Reads only; what is done with it is decided in `rlhf_recipes/tracking.py`.
"""

import hashlib
import importlib.metadata
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset

RUN_FILE = "mlflow_run.json"
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "rlhf-recipes")
# The run that wrote what an option names, by the option.
UPSTREAM = {
    "model_name_or_path": "policy",
    "reward_model_path": "reward_model",
    "reward_adapter": "reward_model",
    "baseline_path": "baseline",
}


def environment_tags(*configs: Any) -> dict[str, str]:
    """Return the commit of the working directory, the versions of the packages, and how accelerate was launched."""
    precisions = [kind for kind in ("bf16", "fp16") for config in configs if getattr(config, kind, False)]
    tags = {
        "accelerate.num_processes": str(PartialState().num_processes),
        "accelerate.distributed_type": PartialState().distributed_type.value,
        "accelerate.mixed_precision": (precisions or [os.environ.get("ACCELERATE_MIXED_PRECISION", "no")])[0],
    }
    for package in PACKAGES:
        try:
            tags[f"versions.{package.replace('-', '_')}"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # runs from a checkout that is not installed
            continue
    return tags | git_tags()


def git_tags() -> dict[str, str]:
    """Return the commit of the working directory and whether tracked files differ from it; nothing outside git."""
    commit = _git("rev-parse", "HEAD")
    if not commit:
        return {}
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {"git.commit": commit} | ({} if changed is None else {"git.dirty": str(bool(changed)).lower()})


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def dataset_digest(dataset: Dataset) -> str:
    """Return a hash of every row in order, whichever file or cache they come from."""
    digest = hashlib.sha256(json.dumps(sorted(dataset.column_names)).encode())
    arrow = dataset.select_columns(sorted(dataset.column_names)).with_format("arrow")
    for table in arrow.iter(batch_size=1_000):
        plain = table.combine_chunks().replace_schema_metadata(None)
        for batch in plain.to_batches():
            digest.update(batch.serialize())
    return digest.hexdigest()[:16]


def write_run_file(output_dir: str | Path, run: dict[str, str]) -> None:
    """Leave a note of the run beside the weights that it has written.

    Args:
        output_dir: Of the run.
        run: `run_id`, `experiment_id` and `tracking_uri`, without credentials.
    """
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    Path(output_dir, RUN_FILE).write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")


def read_run_file(path: str | Path | None) -> dict[str, str] | None:
    """Return the note of the run that wrote a directory, or a checkpoint inside it; `None` if there is none."""
    if path is None:
        return None
    directory = Path(path)
    for folder in (directory, directory.parent) if directory.name.startswith("checkpoint-") else (directory,):
        if (folder / RUN_FILE).is_file():
            return json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    return None


def lineage_tags(*configs: Any) -> dict[str, str]:
    """Return the ids of the runs that made what these options name."""
    tags = {}
    for config in configs:
        for option, role in UPSTREAM.items():
            if run := read_run_file(getattr(config, option, None)):
                tags[f"lineage.{role}"] = run["run_id"]
    return tags
