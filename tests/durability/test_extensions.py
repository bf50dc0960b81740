"""A lock that a killed run left in the folder of an operator holds no later run."""

import logging
import multiprocessing
import os
import threading
import time

import pytest
import torch.utils.cpp_extension
from torch.utils.file_baton import FileBaton

import rlhf_recipes.durability.trainer  # noqa: F401  (it watches the locks)
from rlhf_recipes.durability import extensions

forkserver = multiprocessing.get_context("forkserver")  # has imported the libraries: see `processes.py`


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(extensions, "POLL_SECONDS", 0.05)


def _compile(lock, seconds):
    baton = FileBaton(lock)
    assert baton.try_acquire()
    time.sleep(seconds)
    baton.release()


def _compiling(lock, seconds):
    process = forkserver.Process(target=_compile, args=(str(lock), seconds), daemon=True)
    process.start()
    deadline = time.monotonic() + 60
    while not (lock.exists() and lock.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def test_torch_takes_its_locks_by_the_class_that_is_watched():
    assert torch.utils.cpp_extension.FileBaton is FileBaton
    assert FileBaton.wait is extensions.wait_for_owner


def test_the_lock_of_a_killed_run_is_taken_over_and_named(tmp_path, caplog):
    lock = tmp_path / "lock"
    process = _compiling(lock, 60)
    assert not FileBaton(str(lock)).try_acquire()
    process.kill()
    process.join()
    assert lock.exists()
    start = time.monotonic()
    with caplog.at_level(logging.WARNING):
        assert FileBaton(str(lock)).try_acquire()
    assert time.monotonic() - start < 20
    assert f"was killed: its lock {lock} is removed" in caplog.text
    assert not FileBaton(str(lock)).try_acquire(), "it has a living owner again"


def _race(lock, gate, taken):
    baton = FileBaton(lock)
    gate.wait()
    taken.put(baton.try_acquire())
    time.sleep(5)


def test_one_of_several_ranks_takes_a_lock_over(tmp_path):
    lock = tmp_path / "lock"
    process = _compiling(lock, 60)
    process.kill()
    process.join()
    gate, taken = forkserver.Barrier(3), forkserver.Queue()
    ranks = [forkserver.Process(target=_race, args=(str(lock), gate, taken), daemon=True) for _ in range(3)]
    for rank in ranks:
        rank.start()
    assert sorted(bool(taken.get(timeout=90)) for _ in ranks) == [False, False, True]
    for rank in ranks:
        rank.kill()
        rank.join()


def test_a_rank_whose_compiler_is_killed_ends_with_the_remedy(tmp_path):
    lock = tmp_path / "lock"
    process = _compiling(lock, 60)
    threading.Timer(1, process.kill).start()
    with pytest.raises(TimeoutError, match="was killed. Start the same command again"):
        FileBaton(str(lock)).wait()
    assert not lock.exists()


def test_a_run_that_compiles_is_waited_for(tmp_path, caplog):
    lock = tmp_path / "lock"
    process = _compiling(lock, 2)
    with caplog.at_level(logging.WARNING):
        FileBaton(str(lock)).wait()
    process.join(20)
    assert process.exitcode == 0, "its lock was still there"
    assert f"waiting for it to remove {lock}" in caplog.text
    assert "removed." not in caplog.text


@pytest.mark.parametrize("content", ["", "another-machine 1 pid:[1]"])
def test_a_lock_that_may_be_of_another_machine_is_removed_only_when_nothing_happens_there(
    tmp_path, monkeypatch, caplog, content
):
    monkeypatch.setattr(extensions, "COMPILE_SECONDS", 0.5)
    lock = tmp_path / "lock"
    lock.write_text(content)
    with pytest.raises(TimeoutError, match=f"{lock} has been there for .*delete the file and start again"):
        FileBaton(str(lock)).wait()
    assert lock.exists()
    old = time.time() - 400
    os.utime(lock, (old, old))
    (tmp_path / "cpu_adam.o").write_text("just written")
    with pytest.raises(TimeoutError, match="delete the file"):
        FileBaton(str(lock)).wait()
    os.utime(tmp_path / "cpu_adam.o", (old, old))
    assert FileBaton(str(lock)).try_acquire()
    assert "was killed" in caplog.text


def test_a_plain_run_that_compiles_keeps_its_lock(tmp_path, monkeypatch):
    """A run without this library leaves its lock empty, and has it open."""
    monkeypatch.setattr(extensions, "COMPILE_SECONDS", 0.5)
    monkeypatch.setattr(extensions, "SILENT_SECONDS", -1.0)
    lock = tmp_path / "lock"
    descriptor = os.open(lock, os.O_CREAT | os.O_EXCL)
    assert not FileBaton(str(lock)).try_acquire()
    with pytest.raises(TimeoutError, match="delete the file"):
        FileBaton(str(lock)).wait()
    os.close(descriptor)
    assert FileBaton(str(lock)).try_acquire()


def test_the_lock_of_another_user_is_left_alone(tmp_path, monkeypatch):
    """The system hides the open files of another user's processes, and may protect the lock."""
    monkeypatch.setattr(extensions, "COMPILE_SECONDS", 0.5)
    monkeypatch.setattr(extensions, "_opens", lambda *_: False)
    lock = tmp_path / "lock"
    process = _compiling(lock, 60)
    assert not FileBaton(str(lock)).try_acquire()
    process.kill()
    process.join()

    def denied(path):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(extensions.Path, "unlink", denied)
    assert not FileBaton(str(lock)).try_acquire()
    with pytest.raises(TimeoutError, match="delete the file"):
        FileBaton(str(lock)).wait()


@pytest.mark.parametrize("call", ["try_acquire", "wait"])
def test_a_lock_that_is_new_since_it_was_judged_is_kept(tmp_path, monkeypatch, call):
    lock = tmp_path / "lock"
    lock.write_text("left")
    judgements = []

    def late(path):
        if not judgements:
            path.unlink()
            path.write_text("of a rank that has just taken it")
            judgements.append(True)
            return True
        raise KeyError("it is still there")

    monkeypatch.setattr(extensions, "_is_left", late)
    if call == "try_acquire":
        assert not FileBaton(str(lock)).try_acquire()
    else:
        with pytest.raises(KeyError):
            FileBaton(str(lock)).wait()
    assert "just taken" in lock.read_text()


def test_a_number_that_another_process_has_by_now_is_no_owner(tmp_path):
    lock = tmp_path / "lock"
    lock.write_text(f"{extensions._this_machine()} {os.getpid()} 1000000")
    assert FileBaton(str(lock)).try_acquire()
