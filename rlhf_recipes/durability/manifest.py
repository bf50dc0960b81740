"""The list of a checkpoint's files, with sizes and hashes. A checkpoint without a sound list does not count."""

import hashlib
import json
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

MANIFEST_FILE = "manifest.json"
HASHING_THREADS = 8
LARGEST = 2**28  # bytes of a list; one of a million files has fewer


@dataclass(frozen=True)
class Manifest:
    """A list of files.

    Args:
        files: Bytes and hash of each file, by its path in the folder.
        written: Time, seconds since 1970.
        number: Position among the checkpoints of one output directory; it only grows. 0: from an older release, which
            had the time alone.
    """

    files: dict[str, tuple[int, str]]
    written: float
    number: int


def write_manifest(folder: Path, number: int) -> None:
    """Write the list of all files of a folder into it. The list holds its own hash."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    found = hashes(folder, [name for name in names if name != MANIFEST_FILE])
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": digest} for name, digest in found.items()}
    manifest: dict[str, Any] = {"number": number, "written": time.time(), "files": files}
    manifest["sha256"] = _digest(manifest)
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest | None:
    """Return the list of a folder; `None` if it is missing, not readable or not sound, whatever it contains."""
    path = folder / MANIFEST_FILE
    try:
        if not path.is_file() or path.stat().st_size > LARGEST:  # a device or a pipe in its place would never end
            return None
        return _checked(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return None


def hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the hash of each file by its path in the folder."""
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: _hash(folder / name), names), strict=True))


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(manifest: dict[str, Any]) -> str:
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _checked(found: Any) -> Manifest:
    """Return a parsed list.

    Raises:
        ValueError: If it is not sound.
    """
    if not isinstance(found, dict):
        raise ValueError("not a list of files")
    number, written, files = found.get("number", 0), found.get("written"), found.get("files")
    is_old = "number" not in found and "sha256" not in found
    if not is_old and found.get("sha256") != _digest(found):
        raise ValueError("not what was written")
    if type(number) is not int or not isinstance(written, int | float) or not 0 <= written < 1e12:
        raise ValueError("no number or time")
    if not isinstance(files, dict) or (is_old and not files) or not all(map(_is_sound, files, files.values())):
        raise ValueError("no files, or files of another folder")
    sizes = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    return Manifest(sizes, float(written), number)


def _is_sound(name: str, entry: Any) -> bool:
    path = PurePosixPath(name)
    is_inside = bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name
    return is_inside and isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys()
