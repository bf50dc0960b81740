"""Whatever the small files of a checkpoint contain: a resume finds a whole checkpoint, or says what is damaged."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest
import tiny
from hypothesis import example, given
from hypothesis import strategies as st

from rlhf_recipes.durability import manifest
from rlhf_recipes.durability.checkpoints import (
    ABANDONED_FILE,
    STAGING,
    abandon,
    checkpoint_to_resume,
    checkpoints_by_age,
    find_defect,
    last_checkpoint,
    publish,
    remove_old,
    wished_checkpoint,
)
from rlhf_recipes.durability.manifest import MANIFEST_FILE, read_manifest

pytestmark = pytest.mark.tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the directory of a run of PPO with two checkpoints."""
    directory = tmp_path_factory.mktemp("run")
    tiny.ppo_trainer(directory, save_strategy="steps", save_steps=2).train()
    return directory


SMALL = (
    MANIFEST_FILE, "trainer_state.json", "ppo_state.json", "config.json", "generation_config.json",
    "tokenizer_config.json", "rng_state.pth", "scheduler.pt", "training_args.bin", "ppo_progress_0.pt",
)  # fmt: skip


@contextlib.contextmanager
def _changed(path):
    """Put a file back afterwards."""
    before = path.read_bytes()
    try:
        yield before
    finally:
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
        path.write_bytes(before)


def _check(run, name, before):
    good, newest = checkpoint = (run / "checkpoint-2", run / "checkpoint-4")
    answer = last_checkpoint(run)
    assert answer in map(str, checkpoint)
    if answer == str(newest):  # a changed space between two numbers changes nothing
        assert name == MANIFEST_FILE
        assert json.loads((newest / name).read_bytes()) == json.loads(before)
        return
    with pytest.raises(ValueError, match="`resume_from_checkpoint`"):
        checkpoint_to_resume(str(newest), str(run))
    assert checkpoint_to_resume(True, str(run)) == str(good)


@given(name=st.sampled_from(SMALL), place=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
@example(name=MANIFEST_FILE, place=0, mask=1)
def test_a_changed_byte_is_survived(run, name, place, mask):
    path = run / "checkpoint-4" / name
    with _changed(path) as before:
        content = bytearray(before)
        content[int(place * len(content))] ^= mask
        path.write_bytes(content)
        _check(run, name, before)


@given(name=st.sampled_from(SMALL), place=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_survived(run, name, place):
    path = run / "checkpoint-4" / name
    with _changed(path) as before:
        path.write_bytes(before[: int(place * len(before))])
        _check(run, name, before)


def test_every_byte_of_a_manifest(tmp_path):
    """Flip each bit that makes another ASCII character of a small list, and each that makes no UTF-8."""
    good, bad = _write(tmp_path, 4), _write(tmp_path, 8)
    path = bad / MANIFEST_FILE
    before = path.read_bytes()
    for position in range(len(before)):
        for mask in (0x01, 0x04, 0x10, 0x80):
            content = bytearray(before)
            content[position] ^= mask
            path.write_bytes(content)
            answer = last_checkpoint(tmp_path)
            assert answer == str(good) or read_manifest(bad).number == 2


CONTENTS = {
    "nothing": b"",
    "a list": b"[]",
    "a number": b"3",
    "null": b"null",
    "an empty dictionary": b"{}",
    "files are a number": b'{"files": 3, "written": 1.0}',
    "no files": b'{"files": {}, "written": 1.0}',
    "a file is a number": b'{"files": {"config.json": 3}, "written": 1.0}',
    "no time": b'{"files": {"config.json": {"bytes": 1, "sha256": ""}}}',
    "a time that is no number": b'{"files": {"config.json": {"bytes": 1, "sha256": ""}}, "written": "now"}',
    "a time that is infinite": b'{"files": {"config.json": {"bytes": 1, "sha256": ""}}, "written": Infinity}',
    "a time that is huge": b'{"files": {"config.json": {"bytes": 1, "sha256": ""}}, "written": 1' + b"0" * 400 + b"}",
    "more digits than Python reads": b'{"files": 1' + b"0" * 5000 + b"}",
    "a path above": b'{"files": {"../x": {"bytes": 1, "sha256": ""}}, "written": 1.0}',
    "an absolute path": b'{"files": {"/etc/passwd": {"bytes": 1, "sha256": ""}}, "written": 1.0}',
    "a path with a zero": b'{"files": {"a\\u0000b": {"bytes": 1, "sha256": ""}}, "written": 1.0}',
    "half a character": b'{"files": {"\\ud800": {"bytes": 1, "sha256": ""}}, "written": 1.0}',
    "a name that is too long": b'{"files": {"' + b"a" * 5000 + b'": {"bytes": 1, "sha256": ""}}, "written": 1.0}',
    "a name twice": b'{"files": {}, "files": 3, "written": 1.0}',
    "no UTF-8": b"\xff\xfe{}",
    "deep": b"[" * 100_000,
    "deep and old": b'{"files": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}",
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
@pytest.mark.parametrize("name", [MANIFEST_FILE, "trainer_state.json", "ppo_state.json"])
def test_other_content_is_survived(run, name, content):
    path = run / "checkpoint-4" / name
    with _changed(path) as before:
        path.write_bytes(content)
        _check(run, name, before)


PLACES = {
    "a directory": lambda path: path.mkdir(),
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to nothing": lambda path: path.symlink_to("absent"),
    "a pipe": os.mkfifo,
}


@pytest.mark.parametrize("above", ["../checkpoint-2/", "{run}/checkpoint-2/"])
def test_a_list_of_the_files_of_another_checkpoint_is_not_sound(run, above):
    path = run / "checkpoint-4" / MANIFEST_FILE
    with _changed(path) as before:
        found = json.loads((run / "checkpoint-2" / MANIFEST_FILE).read_text())
        files = {above.format(run=run) + name: entry for name, entry in found["files"].items()}
        path.write_text(json.dumps({"files": files, "written": 4e9}))
        _check(run, MANIFEST_FILE, before)


def test_a_list_of_a_terabyte_is_not_read(run):
    path = run / "checkpoint-4" / MANIFEST_FILE
    with _changed(path) as before:
        os.truncate(path, 2**40)  # with a hole: it takes no place
        _check(run, MANIFEST_FILE, before)


@pytest.mark.parametrize("make", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("name", [MANIFEST_FILE, "trainer_state.json", "rng_state.pth"])
def test_what_is_no_file_is_survived(run, name, make):
    path = run / "checkpoint-4" / name
    with _changed(path) as before:
        path.unlink()
        make(path)
        _check(run, name, before)


@pytest.mark.parametrize("name", [MANIFEST_FILE, "model.safetensors"])
def test_a_file_without_permission_is_survived(run, name, monkeypatch):
    """The tests may run as a user whom no permission stops."""
    newest, opened = run / "checkpoint-4", Path.open

    def guarded(self, *args, **kwargs):
        if self == newest / name:
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", guarded)
    assert last_checkpoint(run) == str(run / "checkpoint-2")
    with pytest.raises(ValueError, match="Permission denied|no readable manifest"):
        checkpoint_to_resume(str(newest), str(run))


@pytest.mark.parametrize("make", [*PLACES.values(), lambda path: path.write_bytes(b"\xff" * 9)])
def test_whatever_marks_an_abandoned_checkpoint(run, make):
    mark = run / "checkpoint-4" / ABANDONED_FILE
    make(mark)
    try:
        assert last_checkpoint(run) == str(run / "checkpoint-2")
        abandon(run / "checkpoint-4", "again")
    finally:
        mark.rmdir() if mark.is_dir() and not mark.is_symlink() else mark.unlink()


# The order of checkpoints, and the removal of old ones.


def _write(output_dir, step):
    staged = output_dir / STAGING / f"checkpoint-{step}"
    staged.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (staged / name).write_text(f"{name} of step {step}")
    publish(staged, output_dir / f"checkpoint-{step}")
    return output_dir / f"checkpoint-{step}"


def _as_older_release(checkpoint, written):
    found = json.loads((checkpoint / MANIFEST_FILE).read_text())
    (checkpoint / MANIFEST_FILE).write_text(json.dumps({"written": written, "files": found["files"]}))


def test_a_clock_that_steps_back_changes_no_order(tmp_path, monkeypatch):
    first = _write(tmp_path, 12)
    monkeypatch.setattr(manifest.time, "time", lambda: 1.0)
    second = _write(tmp_path, 4)
    os.utime(second, (1, 1))
    assert checkpoints_by_age(tmp_path) == [first, second]
    remove_old(tmp_path, 1, keep=[])
    assert checkpoints_by_age(tmp_path) == [second]


def test_checkpoints_of_an_older_release_come_first_by_their_time(tmp_path):
    first, second, newest = _write(tmp_path, 12), _write(tmp_path, 8), _write(tmp_path, 4)
    _as_older_release(first, 3e9)
    _as_older_release(second, 4e9)
    assert checkpoints_by_age(tmp_path) == [first, second, newest]
    assert find_defect(first) is None
    assert read_manifest(_write(tmp_path, 2)).number == 4


def test_the_number_grows_when_a_step_is_written_again(tmp_path):
    _write(tmp_path, 4)
    assert [read_manifest(_write(tmp_path, step)).number for step in (8, 4, 8)] == [2, 3, 4]


def _damage(checkpoint, kind):
    path = checkpoint / "model.safetensors"
    if kind == "removed to the half":
        path.unlink()
    elif kind == "changed":
        path.write_bytes(path.read_bytes().replace(b"step", b"stop"))
    elif kind == "without a list":
        (checkpoint / MANIFEST_FILE).unlink()
    else:
        (checkpoint / MANIFEST_FILE).write_text("[]")


DAMAGES = ("removed to the half", "changed", "without a list", "another list")


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_displaces_no_whole_one(tmp_path, kind):
    good, bad = _write(tmp_path, 4), _write(tmp_path, 8)
    _damage(bad, kind)
    remove_old(tmp_path, 1, keep=[])
    assert last_checkpoint(tmp_path) == str(good)


@pytest.mark.parametrize("kind", DAMAGES[:1] + DAMAGES[2:])
def test_a_damaged_checkpoint_goes_before_a_whole_one(tmp_path, kind):
    first, second, bad = (_write(tmp_path, step) for step in (4, 8, 12))
    _damage(bad, kind)
    remove_old(tmp_path, 2, keep=[], published=second)
    assert checkpoints_by_age(tmp_path) == [first, second]


def test_the_remains_of_a_removal_are_no_checkpoint(tmp_path, monkeypatch):
    """A kill in the middle of the deletion must leave nothing that looks like a checkpoint."""
    first, second = _write(tmp_path, 4), _write(tmp_path, 8)
    delete = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors=False: (Path(path) / "absent").exists())
    remove_old(tmp_path, 1, keep=[], published=second)
    assert not first.exists()
    assert checkpoints_by_age(tmp_path) == [second]
    assert (tmp_path / STAGING).is_dir()
    monkeypatch.setattr(shutil, "rmtree", delete)
    third = _write(tmp_path, 12)
    remove_old(tmp_path, 1, keep=[], published=third)
    assert list(tmp_path.iterdir()) == [third]


def test_a_linked_checkpoint_is_removed_as_a_link(tmp_path):
    elsewhere, kept = _write(tmp_path / "elsewhere", 4), _write(tmp_path, 8)
    (tmp_path / "checkpoint-4").symlink_to(elsewhere)
    remove_old(tmp_path, 1, keep=[], published=kept)
    assert checkpoints_by_age(tmp_path) == [kept]
    assert find_defect(elsewhere) is None


def test_a_first_checkpoint_that_a_kill_left_unnamed_is_found(tmp_path, monkeypatch):
    """MLflow asks first, by `wished_checkpoint`: the record must continue the run from which the training resumes."""

    def killed(self, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            _write(tmp_path, 4)
    assert not (tmp_path / "checkpoint-4").exists()
    assert wished_checkpoint(True, str(tmp_path)) == tmp_path / "checkpoint-4"
    assert checkpoint_to_resume(True, str(tmp_path)) == str(tmp_path / "checkpoint-4")


@pytest.mark.parametrize("moment", ["before the old one is moved away", "between the two renames"])
def test_a_kill_while_a_step_is_written_again_loses_neither(tmp_path, monkeypatch, moment):
    checkpoint = _write(tmp_path, 4)
    before, renamed, calls = checkpoint.stat().st_ino, Path.rename, []

    def killed(self, target):
        calls.append(target)
        if len(calls) == (1 if moment.startswith("before") else 2):
            raise KeyboardInterrupt
        return renamed(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        _write(tmp_path, 4)
    monkeypatch.setattr(Path, "rename", renamed)
    assert wished_checkpoint(True, str(tmp_path)) == checkpoint
    assert checkpoint_to_resume(True, str(tmp_path)) == str(checkpoint)
    assert find_defect(checkpoint) is None
    assert (checkpoint.stat().st_ino == before) == moment.startswith("before")
