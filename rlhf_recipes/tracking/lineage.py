"""Find the origin of a run: code, packages, processes, and the runs that made its inputs."""

import os
from pathlib import Path
from typing import Any

from accelerate import PartialState

from rlhf_recipes.durability.notes import read_note, write_note
from rlhf_recipes.durability.origin import git_tags, versions
from rlhf_recipes.tracking.logged_model import find_model, is_model_uri

RUN_FILE = "mlflow_run.json"
# The role of the run that made the input, by the option that names the input.
UPSTREAM = {
    "model_name_or_path": "policy",
    "reward_model_path": "reward_model",
    "reward_adapter": "reward_model",
    "baseline_path": "baseline",
    "reward_models": "reward_model",
}


def named_models(config: Any, option: str) -> dict[str, Any]:
    """Return the models that an option names, by role. Of a list, the second one is `reward_model_2`."""
    value, role = getattr(config, option, None), UPSTREAM[option]
    paths = value if isinstance(value, list) else [value]
    return {role if number == 1 else f"{role}_{number}": path for number, path in enumerate(paths, start=1) if path}


def environment_tags(*configs: Any) -> dict[str, str]:
    """Return the commit of the working directory, the versions of the packages, and the settings of accelerate."""
    precisions = [kind for kind in ("bf16", "fp16") for config in configs if getattr(config, kind, False)]
    tags = {
        "accelerate.num_processes": str(PartialState().num_processes),
        "accelerate.distributed_type": PartialState().distributed_type.value,
        "accelerate.mixed_precision": (precisions or [os.environ.get("ACCELERATE_MIXED_PRECISION", "no")])[0],
    }
    tags |= {f"versions.{package.replace('-', '_')}": version for package, version in versions().items()}
    return tags | git_tags()


def write_run_file(output_dir: str | Path, run: dict[str, str]) -> None:
    """Write a note of the run beside its weights.

    Args:
        output_dir: Output directory of the run.
        run: `run_id`, `experiment_id`, `tracking_uri` without credentials, and `model_id` if MLflow has the weights.
    """
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    write_note(Path(output_dir, RUN_FILE), run)


def note_model(output_dir: str | Path, run_id: str, model_id: str | None) -> None:
    """Add the id of the model in MLflow to the note beside the weights, if the note is still of that run."""
    note = read_run_file(output_dir)
    if model_id is not None and note is not None and note["run_id"] == run_id:
        write_run_file(output_dir, note | {"model_id": model_id})


def read_run_file(path: str | Path | None) -> dict[str, str] | None:
    """Return the note of the run that wrote a directory, or a checkpoint inside it; `None` without a note.

    `model_id` belongs to the weights of the directory. The note of a checkpoint has none.
    """
    if path is None:
        return None
    directory = Path(path)
    for folder in (directory, directory.parent) if directory.name.startswith("checkpoint-") else (directory,):
        note = read_note(folder / RUN_FILE)
        if note is not None and "run_id" in note:
            return note if folder == directory else {name: note[name] for name in note if name != "model_id"}
    return None


def upstream_runs(*configs: Any) -> dict[str, dict[str, str]]:
    """Return the notes of the runs that made the models in these options, by role.

    Raises:
        UnknownModelError: If an option names a model that is not in MLflow.
    """
    notes = {}
    for config in configs:
        for option in UPSTREAM:
            for role, path in named_models(config, option).items():
                note = _model_note(path) if is_model_uri(path) else read_run_file(path)
                if note is not None:
                    notes[role] = note
    return notes


def _model_note(uri: str) -> dict[str, str]:
    model = find_model(uri)
    return {"run_id": model.source_run_id, "model_id": model.model_id}
