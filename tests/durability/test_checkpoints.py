"""A damaged checkpoint is found and not used; the one before is used."""

import json
import logging
import os
from pathlib import Path

import pytest

from rlhf_recipes.durability.checkpoints import (
    MANIFEST_FILE,
    STAGING,
    abandon,
    checkpoint_to_resume,
    checkpoints_by_age,
    find_defect,
    last_checkpoint,
    publish,
    remove_old,
)


def _write(output_dir, step, content="weights"):
    staged = output_dir / STAGING / f"checkpoint-{step}"
    (staged / "global_step").mkdir(parents=True)
    (staged / "model.safetensors").write_text(f"{content} of step {step}")
    (staged / "global_step" / "optimizer.pt").write_text(f"moments {step}")
    publish(staged, output_dir / f"checkpoint-{step}")
    return output_dir / f"checkpoint-{step}"


def test_a_published_checkpoint_is_whole_and_nothing_lies_beside_it(tmp_path):
    checkpoint = _write(tmp_path, 4)
    assert find_defect(checkpoint) is None
    files = json.loads((checkpoint / MANIFEST_FILE).read_text())["files"]
    assert files.keys() == {"model.safetensors", "global_step/optimizer.pt"}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_publishing_replaces_the_checkpoint_of_an_earlier_attempt(tmp_path):
    _write(tmp_path, 4, "old")
    checkpoint = _write(tmp_path, 4, "new")
    assert (checkpoint / "model.safetensors").read_text() == "new of step 4"
    assert find_defect(checkpoint) is None
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def _truncate(path, count=1):
    path.write_bytes(path.read_bytes()[:-count])


def _flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "truncated": (lambda c: _truncate(c / "model.safetensors"), "has 16 bytes of model.safetensors instead of 17"),
    "bit": (lambda c: _flip_a_bit(c / "global_step/optimizer.pt"), "holds another global_step/optimizer.pt"),
    "file": (lambda c: (c / "global_step/optimizer.pt").unlink(), "lacks global_step/optimizer.pt"),
    "manifest": (lambda c: (c / MANIFEST_FILE).unlink(), "has no readable manifest.json"),
    "half a manifest": (lambda c: _truncate(c / MANIFEST_FILE, 9), "has no readable manifest.json"),
}
each_damage = pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)


@each_damage
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, caplog, damage, message):
    good, bad = _write(tmp_path, 4), _write(tmp_path, 8)
    damage(bad)
    with caplog.at_level(logging.WARNING):
        assert last_checkpoint(tmp_path) == str(good)
    assert message in caplog.text
    assert str(bad) in caplog.text
    assert bad.is_dir(), "what the user made stays"


@each_damage
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, damage, message):
    checkpoint = _write(tmp_path, 4)
    damage(checkpoint)
    with pytest.raises(ValueError, match=f"`resume_from_checkpoint` .*{message}"):
        checkpoint_to_resume(str(checkpoint), str(tmp_path))


def test_a_file_that_the_user_added_is_no_damage(tmp_path):
    checkpoint = _write(tmp_path, 4)
    (checkpoint / "notes.txt").write_text("good one")
    assert find_defect(checkpoint) is None


def test_what_was_being_written_is_no_checkpoint(tmp_path):
    good = _write(tmp_path, 4)
    (tmp_path / STAGING / "checkpoint-8").mkdir(parents=True)
    assert checkpoints_by_age(tmp_path) == [good]


@pytest.mark.parametrize("wish", [True, "true", "True"])
def test_true_means_the_latest_or_a_fresh_start(tmp_path, wish):
    assert checkpoint_to_resume(wish, str(tmp_path / "absent")) is None
    assert checkpoint_to_resume(wish, str(tmp_path)) is None
    _write(tmp_path, 4)
    latest = _write(tmp_path, 12)
    assert checkpoint_to_resume(wish, str(tmp_path)) == str(latest)


@pytest.mark.parametrize("wish", [None, False, "false", ""])
def test_false_means_a_fresh_start(tmp_path, wish):
    _write(tmp_path, 4)
    assert checkpoint_to_resume(wish, str(tmp_path)) is None


def test_a_path_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`resume_from_checkpoint` .*checkpoint-9 does not exist"):
        checkpoint_to_resume(str(tmp_path / "checkpoint-9"), str(tmp_path))


def test_the_latest_is_the_one_written_last(tmp_path):
    """A run that went back to step 4 and wrote step 8 has abandoned step 12."""
    abandoned, latest = _write(tmp_path, 12), _write(tmp_path, 8)
    assert find_defect(abandoned) is None
    assert last_checkpoint(tmp_path) == str(latest)


def test_what_a_run_went_back_from_is_taken_up_by_name_only(tmp_path, caplog):
    good, left = _write(tmp_path, 4), _write(tmp_path, 8)
    abandon(left, "the KL")
    assert last_checkpoint(tmp_path) == str(good)
    assert checkpoint_to_resume(str(left), str(tmp_path)) == str(left)
    (good / "model.safetensors").unlink()
    assert last_checkpoint(tmp_path) is None
    assert f"{left} was left behind when the run went back: it is passed over" in caplog.text
    assert checkpoints_by_age(tmp_path) == [left, good]
    remove_old(tmp_path, 1, keep=[])
    assert not left.exists()
    _write(tmp_path, 8)
    assert last_checkpoint(tmp_path) == str(left), "it is another one"


def test_the_oldest_beyond_the_limit_go(tmp_path):
    for step in (4, 8, 12, 16):
        _write(tmp_path, step)
    remove_old(tmp_path, 2, keep=[None])
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-12", "checkpoint-16"}


def test_the_best_and_the_latest_stay_whatever_the_limit(tmp_path):
    for step in (4, 8, 12, 16):
        _write(tmp_path, step)
    remove_old(tmp_path, 1, keep=[os.path.relpath(tmp_path / "checkpoint-8")])
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-8", "checkpoint-16"}


def test_an_unfinished_folder_of_a_higher_step_goes_before_the_latest(tmp_path):
    """transformers would keep it, as the newest, and delete the only whole one."""
    (tmp_path / "checkpoint-99").mkdir()
    good = _write(tmp_path, 4)
    remove_old(tmp_path, 1, keep=[])
    assert [path for path in tmp_path.iterdir()] == [good]


@pytest.mark.parametrize("limit", [None, 0])
def test_without_a_limit_all_stay(tmp_path, limit):
    for step in (4, 8, 12):
        _write(tmp_path, step)
    remove_old(tmp_path, limit, keep=[])
    assert len(list(tmp_path.iterdir())) == 3


def test_a_checkpoint_that_cannot_be_removed_is_named_with_the_remedy(tmp_path, monkeypatch, caplog):
    for step in (4, 8):
        _write(tmp_path, step)

    def denied(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", denied)
    remove_old(tmp_path, 1, keep=[])
    assert f"{tmp_path}/checkpoint-4 is beyond `save_total_limit` and could not be removed: " in caplog.text
    assert "Permission denied. Delete it by hand when the run has ended." in caplog.text
