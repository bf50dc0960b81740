"""A new run never mixes with an earlier one in its output directory."""

from types import SimpleNamespace

import pytest

from rlhf_recipes.durability.earlier_run import own_directory
from rlhf_recipes.durability.occupied import LOCK_FILE
from rlhf_recipes.options.recipes import PreflightArguments

NOTES = {"_mlflow_open.json": "{}", "mlflow_unsent.jsonl": ""}
CHECKPOINT = {"checkpoint-8/weights": "8", "checkpoint-16/weights": "16"}
MODEL = {"model.safetensors": "weights", "config.json": "{}"}


def _write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _start(folder, *, resume=None, **options):
    """Return what a run finds in its directory when it starts."""
    args = SimpleNamespace(output_dir=str(folder), resume_from_checkpoint=resume)
    with own_directory(args, PreflightArguments(**options)):
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {LOCK_FILE}


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (CHECKPOINT, "checkpoint-16"),
        (MODEL, "the model"),
        ({"adapter_model.safetensors": ""}, "the model"),
        (CHECKPOINT | MODEL, "checkpoint-16"),
    ],
)
@pytest.mark.parametrize("resume", [None, False, "false"])
def test_a_new_run_is_refused(tmp_path, files, found, resume):
    _write(tmp_path / "out", files)
    _write(tmp_path / "out.replaced-1", {"kept": ""})
    message = (
        f"`output_dir` .*out holds {found} of an earlier run, .* `--resume_from_checkpoint true`. .* another "
        "`output_dir`, or set `--overwrite true`, which moves its files to out.replaced-2"
    )
    with pytest.raises(ValueError, match=message):
        _start(tmp_path / "out", resume=resume)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {name.split("/")[0] for name in files}


@pytest.mark.parametrize("files", [{}, NOTES, {"completions/training-4.parquet": "", "log.txt": ""}])
def test_what_is_no_result_is_no_earlier_run(tmp_path, files):
    _write(tmp_path / "out", files)
    assert _start(tmp_path / "out", overwrite=True) == set(files)
    assert not (tmp_path / "out.replaced-1").exists()


@pytest.mark.parametrize("resume", [True, "true", "out/checkpoint-8"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_run_that_resumes_finds_its_files(tmp_path, resume, overwrite):
    _write(tmp_path / "out", CHECKPOINT | MODEL)
    assert _start(tmp_path / "out", resume=resume, overwrite=overwrite) == set(CHECKPOINT | MODEL)


def test_overwrite_keeps_the_earlier_files_beside_the_directory(tmp_path, caplog):
    _write(tmp_path / "out", CHECKPOINT | MODEL | NOTES | {"_unfinished/checkpoint-24/weights": "24"})
    assert _start(tmp_path / "out", overwrite=True) == set(NOTES), "the next start completes the record in MLflow"
    aside = tmp_path / "out.replaced-1"
    assert (aside / "checkpoint-16" / "weights").read_text() == "16"
    assert (aside / "_unfinished" / "checkpoint-24" / "weights").exists(), "the new run would finish it"
    assert f"are now in {aside}" in caplog.text
    _write(tmp_path / "out", MODEL)
    _start(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out.replaced-2" / "model.safetensors").exists()


def test_a_preflight_moves_nothing(tmp_path):
    _write(tmp_path / "out", MODEL)
    assert _start(tmp_path / "out", overwrite=True, preflight_only=True) == set(MODEL)


def test_files_that_cannot_be_moved_are_said(tmp_path, monkeypatch):
    _write(tmp_path / "out", MODEL)
    monkeypatch.setattr("pathlib.Path.rename", _other_disk)
    with pytest.raises(ValueError, match="`overwrite`: the files .* cannot be moved .*Invalid cross-device link"):
        _start(tmp_path / "out", overwrite=True)


def _other_disk(self, target):
    raise OSError(18, "Invalid cross-device link")
