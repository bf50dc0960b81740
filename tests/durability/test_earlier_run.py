"""A new run never mixes with an earlier one in its output directory."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from processes import run_command

from rlhf_recipes.durability.earlier_run import (
    check_output_dir,
    keep_earlier_files,
    keep_foreign_card,
    move_earlier_run,
    own_directory,
)
from rlhf_recipes.durability.occupied import LOCK_FILE
from rlhf_recipes.options.recipes import PreflightArguments

EXPORT = Path(__file__).parents[2] / "recipes" / "export.py"
NOTES = {"_mlflow_open.json": "{}", "mlflow_unsent.jsonl": ""}
CHECKPOINT = {"checkpoint-8/weights": "8", "checkpoint-16/weights": "16"}
MODEL = {"model.safetensors": "weights", "config.json": "{}"}


def _write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {LOCK_FILE}


def _start(folder, *, resume=None, inputs=None, **options):
    """Return what a run finds in its directory when it trains."""
    args = SimpleNamespace(output_dir=str(folder), run_name=str(folder), resume_from_checkpoint=resume)
    before = _files(folder)
    with own_directory(args, PreflightArguments(**options), SimpleNamespace(**inputs or {})):
        assert _files(folder) == before, "something may still be wrong with the run"
        move_earlier_run(str(folder))
        return _files(folder)


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (CHECKPOINT, "checkpoint-16"),
        (MODEL, "the model"),
        ({"adapter_model.safetensors": ""}, "the model"),
        (CHECKPOINT | MODEL, "checkpoint-16"),
    ],
)
@pytest.mark.parametrize("resume", [None, False, "false", "other/checkpoint-8"])
def test_a_new_run_is_refused(tmp_path, files, found, resume):
    """The checkpoint of another directory makes a run new here, too."""
    _write(tmp_path / "out", files)
    _write(tmp_path / "out.replaced-1", {"kept": ""})
    go_on = "set `--resume_from_checkpoint true`" if "8" in found or "16" in found else "no checkpoint to continue"
    message = (
        f"`output_dir` .*out holds {found} of an earlier run, .* {go_on}.* another "
        "`output_dir`, or set `--overwrite true`, which moves its files to out.replaced-2"
    )
    with pytest.raises(ValueError, match=message):
        _start(tmp_path / "out", resume=resume)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {name.split("/")[0] for name in files}


def test_a_run_that_finds_no_checkpoint_to_resume_is_a_new_one(tmp_path):
    _write(tmp_path / "out", MODEL)
    with pytest.raises(ValueError, match="holds the model of an earlier run, .* no checkpoint to continue that run"):
        _start(tmp_path / "out", resume="true")
    assert _start(tmp_path / "out", resume="true", overwrite=True) == set()


@pytest.mark.parametrize("files", [{}, NOTES, {"completions/training-4.parquet": "", "log.txt": ""}])
def test_what_is_no_result_is_no_earlier_run(tmp_path, files):
    _write(tmp_path / "out", files)
    assert _start(tmp_path / "out", overwrite=True) == set(files)
    assert not (tmp_path / "out.replaced-1").exists()


@pytest.mark.parametrize("resume", [True, "true", "out/checkpoint-8", "out/checkpoint-8/"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_run_that_resumes_finds_its_files(tmp_path, monkeypatch, resume, overwrite):
    monkeypatch.chdir(tmp_path)
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


def test_a_run_that_ends_before_it_trains_moves_nothing(tmp_path):
    """Its models, data or store may be wrong, or it may be a preflight."""
    _write(tmp_path / "out", MODEL)
    args = SimpleNamespace(output_dir=str(tmp_path / "out"), resume_from_checkpoint=None)
    with own_directory(args, PreflightArguments(overwrite=True)):
        check_output_dir(args.output_dir, adapter=True)  # the model will not be there
    assert _files(tmp_path) == {f"out/{name}" for name in MODEL}
    move_earlier_run(args.output_dir)
    with pytest.raises(ValueError, match="holds a whole model, and this run would save an adapter beside it"):
        check_output_dir(args.output_dir, adapter=True)


@pytest.mark.parametrize(
    ("inputs", "held"),
    [
        ({"model_name_or_path": "out/checkpoint-8"}, "`model_name_or_path` out/checkpoint-8"),
        ({"reward_model_path": "out"}, "`reward_model_path` out"),
        ({"model_init_kwargs": {"cache_dir": ["out/cache"]}}, "`model_init_kwargs` out/cache"),
        ({"tracking_uri": "sqlite:///out/mlflow.db"}, "`tracking_uri` sqlite:///out/mlflow.db"),
        ({"dataset_name": "link"}, "`dataset_name` link"),
    ],
)
def test_an_input_of_the_run_is_not_moved(tmp_path, monkeypatch, inputs, held):
    monkeypatch.chdir(tmp_path)
    _write(tmp_path / "out", CHECKPOINT)
    (tmp_path / "link").symlink_to("out/checkpoint-8")
    message = f"^`overwrite`: `output_dir` .*out holds {held}, which would move .* another"
    with pytest.raises(ValueError, match=message):
        _start(tmp_path / "out", overwrite=True, inputs=inputs)
    with pytest.raises(ValueError, match="name another `output_dir`.$"):
        _start(tmp_path / "out", inputs=inputs)
    assert _files(tmp_path / "out") == set(CHECKPOINT)


@pytest.mark.parametrize("below", [".", "project"])
def test_the_working_directory_is_not_moved(tmp_path, monkeypatch, below):
    _write(tmp_path / "out", MODEL | {"project/data.jsonl": ""})
    monkeypatch.chdir(tmp_path / "out" / below)
    with pytest.raises(ValueError, match="holds the working directory, which would move"):
        _start(tmp_path / "out", overwrite=True)


def test_files_that_cannot_be_moved_are_said_before_the_run_loads_anything(tmp_path, monkeypatch):
    _write(tmp_path / "out", MODEL)
    monkeypatch.setattr("pathlib.Path.rename", _other_disk)
    args = SimpleNamespace(output_dir=str(tmp_path / "out"), resume_from_checkpoint=None)
    message = "`overwrite`: the files .* cannot be moved .*Invalid cross-device link"
    with pytest.raises(ValueError, match=message), own_directory(args, PreflightArguments(overwrite=True)):
        pytest.fail("the run would load its models")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(MODEL)


@pytest.mark.parametrize("back", [True, False])
def test_a_move_that_fails_halfway_is_undone_or_said(tmp_path, monkeypatch, back):
    _write(tmp_path / "out", MODEL)
    rename = Path.rename

    def fails(self, target):
        if self.name == "model.safetensors" or (self.parent.name == "out.replaced-1" and not back):
            _other_disk(self, target)
        return rename(self, target)

    monkeypatch.setattr("pathlib.Path.rename", fails)
    left = "" if back else " config.json could not be moved back."
    with pytest.raises(ValueError, match=f"Invalid cross-device link.*by hand.{left}$"):
        _start(tmp_path / "out", overwrite=True)
    assert _files(tmp_path / "out") == set(MODEL) - (set() if back else {"config.json"})
    assert (tmp_path / "out.replaced-1").exists() != back


def _other_disk(self, target):
    raise OSError(18, "Invalid cross-device link")


@pytest.mark.recipe
def test_an_export_never_replaces_another_one_or_its_own_source(tmp_path):
    tiny.save(tiny.policy(tiny.tokenizer()), tmp_path / "model")
    source = {path: path.read_bytes() for path in (tmp_path / "model").iterdir()}

    def export(output_dir, *options):
        options = ("--model_name_or_path", "model", "--output_dir", output_dir, *options)
        return run_command(EXPORT, *options, directory=tmp_path)

    assert export("out").returncode == 0
    (tmp_path / "out" / "notes.txt").write_text("mine")
    refused = export("out")
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1] == (
        f"Error: `output_dir` {tmp_path}/out holds the model of an earlier run, and a new run would mix with it. "
        "To start anew, name another `output_dir`, or set `--overwrite true`, which moves its files to out.replaced-1."
    )
    assert export("out", "--overwrite", "true").returncode == 0
    assert (tmp_path / "out.replaced-1" / "notes.txt").read_text() == "mine"
    assert _files(tmp_path / "out") | {"notes.txt"} == _files(tmp_path / "out.replaced-1")
    for options in ((), ("--overwrite", "true")):
        refused = export("model", *options)
        assert refused.returncode == 1
        assert refused.stderr.splitlines()[-1].endswith("ame another `output_dir`.")
    assert {path: path.read_bytes() for path in (tmp_path / "model").iterdir()} == source


def test_a_readme_of_the_user_and_an_earlier_result_keep_a_name(tmp_path, caplog):
    readme, result = tmp_path / "README.md", tmp_path / "results.json"
    readme.write_text("Made by rlhf_recipes 0.1.0.")
    keep_foreign_card(str(tmp_path))
    assert readme.exists(), "a card of this library is written again"
    readme.write_text("My notes.")
    keep_foreign_card(str(tmp_path))
    assert (tmp_path / "README.replaced-1.md").read_text() == "My notes."
    for number in range(2):
        result.write_text(str(number))
        keep_earlier_files(result)
    assert [(tmp_path / f"results.replaced-{n}.json").read_text() for n in (1, 2)] == ["0", "1"]
    assert not readme.exists()
    assert not result.exists()
    assert "is now README.replaced-1.md" in caplog.text
    keep_earlier_files(result)  # nothing to keep
