"""One training in an output directory at a time, and none in one that cannot be written."""

import errno
import logging
import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import processes
import pytest
import tiny

from rlhf_recipes.durability import occupied as module
from rlhf_recipes.durability.occupied import LOCK_FILE, check_writable, occupied

RECIPES = Path(__file__).parents[2] / "recipes"
FORK = multiprocessing.get_context("fork")


def _hold(folder, ready, forks):
    with occupied(folder):
        if forks and os.fork() == 0:  # as the workers of a data loader
            ready.send(os.getpid())
            time.sleep(600)
        if not forks:
            ready.send(os.getpid())
        time.sleep(600)


@pytest.fixture
def hold(request):
    """Return a function that starts a process which holds a directory. It returns the process and its last child."""
    ends = []

    def start(folder, *, forks=False):
        ready, other = FORK.Pipe()
        process = FORK.Process(target=_hold, args=(str(folder), other, forks))
        process.start()
        other.close()
        child = ready.recv()
        ends.extend({process.pid, child})
        return process, child

    yield start
    for pid in ends:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def test_a_directory_of_a_living_process_is_refused_with_its_host_and_number(tmp_path, hold):
    process, _ = hold(tmp_path)
    owner = rf'"host": "{socket.gethostname()}", "pid": {process.pid}'
    with (
        pytest.raises(ValueError, match=f"`output_dir` {tmp_path} is in use by a run .*{owner}"),
        occupied(tmp_path),
    ):
        pass
    with occupied(tmp_path / "other"):
        pass


@pytest.mark.parametrize("forks", [False, True], ids=["alone", "with a worker that lives on"])
def test_a_killed_process_frees_its_directory_at_once(tmp_path, hold, forks):
    process, child = hold(tmp_path, forks=forks)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (tmp_path / LOCK_FILE).exists()
    with occupied(tmp_path):
        assert str(os.getpid()) in (tmp_path / LOCK_FILE).read_text()
    if forks:
        os.kill(child, 0)  # it lives


def test_a_process_may_hold_a_directory_several_times(tmp_path, hold):
    with occupied(tmp_path):
        with occupied(f"{tmp_path}/../{tmp_path.name}"):
            pass
        assert (tmp_path / LOCK_FILE).exists(), "the inner one must not end the outer one"
    assert not (tmp_path / LOCK_FILE).exists()
    hold(tmp_path)


def test_a_forked_process_does_not_think_that_it_holds_the_directory(tmp_path):
    with occupied(tmp_path):
        child = os.fork()
        if child == 0:
            try:
                with occupied(tmp_path):
                    os._exit(1)
            except ValueError:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_file_that_its_owner_removes_meanwhile_is_no_lock(tmp_path, hold, monkeypatch):
    """Between opening and locking, a run may end and a third one may begin."""
    lock, calls = module._lock_file, []

    def late(descriptor, path):
        calls.append(path)
        if len(calls) == 1:
            path.unlink()
        return lock(descriptor, path)

    monkeypatch.setattr(module, "_lock_file", late)
    with occupied(tmp_path):
        assert len(calls) == 2
        monkeypatch.setattr(module, "_lock_file", lock)
        process = FORK.Process(target=_hold, args=(str(tmp_path), None, False))
        process.start()
        process.join(60)
        assert process.exitcode == 1, "the other process is refused"


@pytest.fixture
def other_host(monkeypatch):
    """Let locks that are written from now on be those of another machine than this process's."""
    monkeypatch.setattr(module.socket, "gethostname", lambda: "node7")
    return lambda: monkeypatch.setattr(module.socket, "gethostname", lambda: "node8")


@pytest.mark.parametrize("owner_text", [None, "", "no JSON", "[]"])
def test_a_lock_of_another_host_is_waited_for_and_the_message_says_what_to_delete(
    tmp_path, hold, other_host, monkeypatch, owner_text
):
    process, _ = hold(tmp_path)
    other_host()
    if owner_text is not None:
        (tmp_path / LOCK_FILE).write_text(owner_text)
    waits = []
    monkeypatch.setattr(module.time, "sleep", waits.append)
    monkeypatch.setattr(module, "OTHER_HOST_SECONDS", 0.2)
    host = "node7" if owner_text is None else "its machine"
    with pytest.raises(ValueError, match=rf"in use .* If {host} is gone, delete {tmp_path / LOCK_FILE}"):
        _enter(occupied, tmp_path)
    assert waits
    (tmp_path / LOCK_FILE).unlink()  # as the message says
    with occupied(tmp_path):
        assert process.is_alive()


def test_a_lock_that_another_host_leaves_behind_is_taken_when_it_ends(tmp_path, hold, other_host, monkeypatch):
    process, _ = hold(tmp_path)
    other_host()

    def end(seconds):
        process.kill()
        process.join()

    monkeypatch.setattr(module.time, "sleep", end)
    with occupied(tmp_path):
        assert '"node8"' in (tmp_path / LOCK_FILE).read_text()


def test_a_run_that_ends_while_its_lock_is_read_frees_the_directory(tmp_path, hold, monkeypatch):
    process, _ = hold(tmp_path)
    lock = module._lock_file

    def end_after(descriptor, path):
        is_free = lock(descriptor, path)
        if not is_free:
            process.kill()
            process.join()
            path.unlink()
        return is_free

    monkeypatch.setattr(module, "_lock_file", end_after)
    with occupied(tmp_path):
        assert str(os.getpid()) in (tmp_path / LOCK_FILE).read_text()


@pytest.mark.parametrize("enter", [occupied, check_writable], ids=["training", "other recipes"])
@pytest.mark.parametrize(
    ("place", "reason"),
    [("file", "File exists|Not a directory"), ("file/in_it", "Not a directory"), ("/proc/1/x", "")],
)
def test_a_directory_that_cannot_be_written_is_refused_with_the_reason(tmp_path, enter, place, reason):
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError, match=rf"`output_dir` .*{place} cannot be written: .*({reason}).*Choose another one"
    ):
        _enter(enter, tmp_path / place)


@pytest.mark.parametrize("enter", [occupied, check_writable], ids=["training", "other recipes"])
def test_a_full_disk_is_refused(tmp_path, enter, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    monkeypatch.setattr(module.tempfile, "TemporaryFile", full)
    with pytest.raises(ValueError, match="cannot be written: No space left on device. .*make room"):
        _enter(enter, tmp_path)


def _enter(enter, folder):
    if enter is check_writable:
        check_writable(str(folder))
        return
    with occupied(str(folder)):
        pass


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, caplog):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(module.fcntl, "lockf", no_locks)
    with caplog.at_level(logging.WARNING), occupied(tmp_path):
        pass
    assert "without locks (No locks available)" in caplog.text


@pytest.mark.tiny
def test_a_user_of_the_library_is_refused_too(tmp_path, hold):
    trainer = tiny.ppo_trainer(tmp_path, max_steps=1)
    process, _ = hold(tmp_path)
    with pytest.raises(ValueError, match="is in use by a run"):
        trainer.train()
    assert trainer.state.global_step == 0
    process.kill()
    process.join()
    trainer.train()
    assert trainer.state.global_step == 1
    assert not (tmp_path / LOCK_FILE).exists()


@pytest.mark.recipe
@pytest.mark.parametrize("recipe", ["sft", "reward_modeling", "ppo", "baseline", "evaluate"])
def test_a_recipe_is_refused_before_it_loads_a_model(tmp_path, hold, recipe):
    hold(tmp_path / "out")
    options = ("--model_name_or_path", "nowhere", "--dataset_name", "nowhere")
    trains = ("--use_cpu", "true", "--bf16", "false")
    judged = ("--baseline_path", "nowhere", "--reward_model_path", "nowhere")
    own = {"evaluate": judged, "baseline": (*trains, "--method", "rloo")}.get(recipe, trains)
    line = (RECIPES / f"{recipe}.py", *own, *options, "--output_dir", tmp_path / "out")
    ended = processes.run_command(*line, directory=tmp_path)
    assert ended.returncode == 1
    assert "is in use by a run that has not ended" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "mlflow.db").exists()
