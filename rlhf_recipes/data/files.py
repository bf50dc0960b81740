"""Tell the data files of a directory from the others, and find the defect of one that cannot be read."""

import csv
import gzip
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow.parquet as pq

SUFFIXES = {".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".txt"}
COMPRESSED = {".gz", ".bz2", ".xz", ".zip", ".zst", ".lz4"}
NOTES = {".md", ".log", ".bak", ".old", ".orig", ".tmp", ".swp", ".part"}
KINDS = {str: "text", bool: "a boolean", int: "a number", float: "a number", dict: "a dictionary", list: "a list"}


def is_beside_data(file: str) -> bool:
    """Return whether a file is a note or a backup. `datasets` would read `train.jsonl.bak` too."""
    path = Path(file)
    after_data = not SUFFIXES.isdisjoint(path.suffixes) and path.suffix not in SUFFIXES | COMPRESSED
    return after_data or path.suffix in NOTES or path.name.endswith("~")


def find_defect(files: Iterable[str]) -> str | None:
    """Return the reason why files cannot be read together, as one sentence with file and line; `None` if unknown."""
    first: tuple[str, dict[str, str]] | None = None
    for file in files:
        try:
            kinds = _kinds_of_columns(Path(file))
        except (OSError, ValueError, EOFError) as error:
            return f"{file} is broken: {' '.join(str(error).split())}"
        if not kinds:
            return f"{file} has no rows."
        if first is None:
            first = file, kinds
        elif difference := _difference(first, (file, kinds)):
            return difference
    return None


def _difference(one: tuple[str, dict[str, str]], other: tuple[str, dict[str, str]]) -> str | None:
    for (file, kinds), (name, others) in ((one, other), (other, one)):
        if lacking := [column for column in kinds if column not in others]:
            return (
                f"{file} has the column {', '.join(map(repr, lacking))}, which {name} lacks. All files must have the "
                "same columns: add or drop it, or move the file to a directory of its own."
            )
    for column, kind in one[1].items():
        if kind != (found := other[1][column]):
            return f"The column {column!r} is {kind} in {one[0]}, and {found} in {other[0]}. Convert all to one."
    return None


def _kinds_of_columns(path: Path) -> dict[str, str]:
    """Return the kind of the first value of each column. Read a file of JSON lines to its end.

    Raises:
        ValueError: If a line cannot be read. The message holds its number.
    """
    if path.suffix == ".parquet":
        schema, rows = pq.read_schema(path), pq.read_metadata(path).num_rows
        return {field.name: str(field.type) for field in schema} if rows else {}
    kinds: dict[str, str] = {}
    with cast(BinaryIO, gzip.open(path) if path.suffix == ".gz" else path.open("rb")) as file:
        for row in _csv_rows(file) if ".csv" in path.suffixes else _json_rows(file):
            for column, value in row.items():
                if value is not None:
                    kinds.setdefault(column, KINDS.get(type(value), "of another kind"))
    return kinds


def _json_rows(file: BinaryIO) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(file, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if number == 1 and text.startswith("["):
                yield from _json_array(text + file.read().decode())
                return
            row = json.loads(text or "{}")
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            kind = "not in UTF-8" if isinstance(error, UnicodeDecodeError) else f"no JSON ({error.msg})"
            raise ValueError(f"line {number} is {kind}.") from None
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is no JSON object.")
        yield row


def _json_array(text: str) -> list[dict[str, Any]]:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno} is no JSON ({error.msg}).") from None


def _csv_rows(file: BinaryIO) -> Iterator[dict[str, Any]]:
    reader = csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""))
    columns = next(reader, [])
    for row in reader:
        if row and len(row) != len(columns):
            raise ValueError(f"line {reader.line_num} has {len(row)} fields, and the first line {len(columns)}.")
        yield dict.fromkeys(columns, "")
