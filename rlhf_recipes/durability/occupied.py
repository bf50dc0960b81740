"""One training or evaluation in an output directory at a time: two would write the same files and the same note."""

import fcntl
import json
import logging
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

LOCK_FILE = "_running.lock"  # a push skips `_*`
# NFS keeps the lock of a machine that has died for 90 seconds, or until that machine starts again.
OTHER_HOST_SECONDS = 120.0
POLL_SECONDS = 2.0
logger = logging.getLogger(__name__)
_held: set[tuple[int, Path]] = set()  # processes and their directories: a forked process does not inherit a lock


@contextmanager
def occupied(output_dir: str) -> Iterator[None]:
    """Hold an output directory for a run. Every rank must make the call; only the first process locks.

    The lock is one of the operating system. It ends with its process, however that ends. A process may hold a
    directory several times.

    Raises:
        ValueError: If another process holds the directory, or if nothing can be written to it.
    """
    held = (os.getpid(), Path(output_dir).resolve())
    if held in _held:
        yield
        return
    is_new = not held[1].exists()
    lock = _lock_for_all(held[1])
    _held.add(held)
    try:
        yield
    finally:
        _held.discard(held)
        if lock is not None:
            with suppress(OSError):  # someone may have removed the directory
                (held[1] / LOCK_FILE).unlink()
                if is_new:
                    held[1].rmdir()  # if nothing was written to it
            os.close(lock)


def _lock_for_all(folder: Path) -> int | None:
    """Lock a directory in the first process, and refuse it in all."""
    state, refusal, lock = PartialState(), [""], None
    if state.is_main_process:
        try:
            lock = _lock(folder)
        except ValueError as error:
            refusal = [str(error)]
    if state.num_processes > 1:
        broadcast_object_list(refusal)
    if refusal[0]:
        raise ValueError(refusal[0])
    return lock


def _lock(folder: Path) -> int:
    """Return a descriptor whose closing ends the lock."""
    path = folder / LOCK_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _open_locked(path)
        owner = {"host": socket.gethostname(), "pid": os.getpid()}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{json.dumps(owner)}\n".encode(), 0)
        os.fsync(descriptor)  # a full disk shows here
    except OSError as error:
        raise _unwritable(folder, error) from error
    return descriptor


def _open_locked(path: Path) -> int:
    """Open and lock a file that stays the file of that name: a run that ends removes its own."""
    deadline = time.monotonic() + OTHER_HOST_SECONDS
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if not _lock_file(descriptor, path):
            os.close(descriptor)
            _wait_for_other_host(path, deadline)
            continue
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)


def _lock_file(descriptor: int, path: Path) -> bool:
    """Lock an open file, where the file system can. Return whether no other process has locked it."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        logger.warning(
            f"`output_dir` {path.parent} is on a file system without locks ({error.strerror}): take care that no "
            "second run writes to it."
        )
    return True


def _wait_for_other_host(path: Path, deadline: float) -> None:
    """Wait a moment before another try, if the lock may be one that a machine has left behind.

    Raises:
        ValueError: If its owner runs on this machine, or the time is over.
    """
    try:
        owner = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:  # the run has just ended
        return
    host = _host(owner)
    is_here = host == socket.gethostname()
    if is_here or time.monotonic() > deadline:
        gone = "" if is_here else f" If {host or 'its machine'} is gone, delete {path} and start again."
        raise ValueError(
            f"`output_dir` {path.parent} is in use by a run that has not ended ({owner or 'unknown'}). Wait for its "
            f"end, stop it, or choose another `output_dir`.{gone}"
        )
    logger.warning(f"{path} is locked ({owner or 'unknown'}): waiting, in case that machine is gone.")
    time.sleep(POLL_SECONDS)


def _host(owner: str) -> str | None:
    """Return the host in the text of a lock; a run that has just begun has not written it yet."""
    with suppress(ValueError, TypeError, KeyError):
        return str(json.loads(owner)["host"])
    return None


def check_writable(output_dir: str) -> None:
    """Check that files can be written to the directory of a recipe that trains nothing.

    Raises:
        ValueError: If not.
    """
    try:
        folder = Path(output_dir).resolve()
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b" ")
    except OSError as error:
        raise _unwritable(output_dir, error) from error


def _unwritable(folder: str | Path, error: OSError) -> ValueError:
    return ValueError(
        f"`output_dir` {folder} cannot be written: {error.strerror}. Choose another one, or make room or permission "
        "there."
    )
