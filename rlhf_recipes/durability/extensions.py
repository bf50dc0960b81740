"""Let no process wait for ever for an operator that a killed run was compiling.

PyTorch compiles an operator of DeepSpeed at its first use. The process that compiles creates an empty file `lock` in
the folder of the operator, and every other process waits until that file is gone: for ever, if its owner was killed.
"""

import logging
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

import psutil
from filelock import FileLock
from torch.utils.file_baton import FileBaton

COMPILE_SECONDS = 1800.0  # the longest wait for another process that compiles
SILENT_SECONDS = 300.0  # without a change in its folder, a lock without a name of its owner counts as left
POLL_SECONDS = 2.0
_acquire = FileBaton.try_acquire
logger = logging.getLogger(__name__)


def watch_locks() -> None:
    """Write the owner of a lock into it, take over a lock whose owner is gone, and give the wait for a lock an end."""
    for name, function in {"try_acquire": acquire_by_name, "wait": wait_for_owner}.items():
        setattr(FileBaton, name, function)


def acquire_by_name(baton: FileBaton) -> bool | None:
    """Take a lock as PyTorch does, also from an owner that is gone, and write into it which process has it."""
    lock = Path(baton.lock_file_path)
    taken = _acquire(baton)
    if not taken:
        with _check(lock):
            _remove_left(lock)
            taken = _acquire(baton)
    if taken:
        own = psutil.Process()
        lock.write_text(f"{_this_machine()} {own.pid} {own.create_time():.0f}", encoding="utf-8")
    return taken


def wait_for_owner(baton: FileBaton) -> None:
    """Wait until the owner of a lock has removed it.

    Raises:
        TimeoutError: If the owner has not removed it in time, or was killed. PyTorch would load an operator that is
            not there.
    """
    lock, deadline = Path(baton.lock_file_path), time.monotonic() + COMPILE_SECONDS
    if lock.exists():
        logger.warning(f"Another process compiles in {lock.parent}: waiting for it to remove {lock}.")
    while lock.exists():
        with _check(lock):
            is_left = _remove_left(lock)
        if is_left:
            raise TimeoutError(
                f"The process that compiled in {lock.parent} was killed. Start the same command again when the other "
                "processes of this run have ended: one of them may compile now."
            )
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"{lock} has been there for more than {COMPILE_SECONDS:g} s: another process compiles an operator of "
                "DeepSpeed, or was killed while it did. If none compiles on any machine that shares this folder, "
                "delete the file and start again."
            )
        time.sleep(POLL_SECONDS)


def _check(lock: Path) -> FileLock:
    """Return a lock that lets one process at a time judge another lock, whichever user it belongs to."""
    return FileLock(f"{lock}.check", timeout=COMPILE_SECONDS, mode=0o666)


def _remove_left(lock: Path) -> bool:
    # Its owner has removed it in the meantime, or it belongs to another user.
    with suppress(FileNotFoundError, PermissionError):
        judged = lock.stat()
        if _is_left(lock) and _is_same(judged, lock.stat()):  # the judgement may take seconds
            lock.unlink()
            logger.warning(f"The run that compiled in {lock.parent} was killed: its lock {lock} is removed.")
            return True
    return False


def _is_same(first: os.stat_result, second: os.stat_result) -> bool:
    return os.path.samestat(first, second) and first.st_mtime_ns == second.st_mtime_ns


def _is_left(lock: Path) -> bool:
    """Return whether the owner of a lock is gone. One without a name keeps the file open as long as it compiles."""
    *machine, pid, started = ["", "", *lock.read_text(encoding="utf-8").split()]
    if " ".join(machine[2:]) == _this_machine():
        return not _lives(int(pid), float(started))
    if any(_opens(process, lock) for process in psutil.process_iter()):
        return False
    files = [file for file in lock.parent.iterdir() if file.suffix != ".check"]
    newest = max(file.stat().st_mtime for file in files)
    return time.time() - newest > SILENT_SECONDS


def _lives(pid: int, started: float) -> bool:
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        is_same = abs(process.create_time() - started) < 2  # the number may be another process's by now
        return is_same and process.status() != psutil.STATUS_ZOMBIE
    return False


def _opens(process: psutil.Process, lock: Path) -> bool:
    with suppress(psutil.Error, OSError):  # it has ended, or belongs to another user
        return any(os.path.samefile(file.path, lock) for file in process.open_files() if file.path.endswith("lock"))
    return False


def _this_machine() -> str:
    # Two containers have different processes, and a restart ends all of them.
    spaces = [os.readlink("/proc/self/ns/pid")] if Path("/proc/self/ns/pid").exists() else []
    return " ".join([socket.gethostname(), f"{psutil.boot_time():.0f}", *spaces])
