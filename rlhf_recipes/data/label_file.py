"""A file in which people say which of two answers is better, and the same file when they have filled it.

The answers of a pair are in random order, and nothing in the file tells how they were made.
"""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

COLUMNS = ("pair", "prompt", "answer_1", "answer_2", "better")
LABELS = {"1": 1.0, "1.0": 1.0, "2": 0.0, "2.0": 0.0, "tie": 0.5}
ALLOWED = "`1`, `2` or `tie`"
FORMULA = ("=", "+", "-", "@")  # a spreadsheet would compute a cell that begins so


class Question(NamedTuple):
    """Texts of a pair as a person reads them."""

    prompt: str
    first: str
    second: str


def write_label_file(path: Path, questions: Sequence[Question]) -> None:
    """Write a file of pairs with an empty column `better`. It must not be there yet."""
    rows = [dict(zip(COLUMNS, (number, *asked, ""), strict=True)) for number, asked in enumerate(questions, start=1)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("x", encoding="utf-8-sig" if path.suffix == ".csv" else "utf-8", newline="") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
        else:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _cell(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def read_label_file(path: Path, questions: Sequence[Question]) -> list[float] | None:
    """Return for each pair 1 if the first answer is better, 0 if the second is, and 0.5 for a tie.

    The result is `None` if nobody has filled a row yet. The file is never changed.

    Args:
        path: File that `write_label_file` has written. The order of its rows and spaces may have changed.
        questions: Pairs that were written.

    Raises:
        ValueError: If the file cannot be read, lacks a pair, has other texts, or has rows without a label or with a
            label that is none. The message names the pairs.
    """
    rows = _numbered(path, len(questions))
    for number, asked in enumerate(questions, start=1):
        for name, text in zip(COLUMNS[1:4], asked, strict=True):
            if _words(rows[number].get(name)) != _words(text):
                raise ValueError(
                    f"`label_file` {path} has another {name} in pair {number} than the one that was written. Restore "
                    "it, or name another file to begin anew; the labels of this one stay in it."
                )
    given = {number: str(rows[number].get("better") or "").strip().lower() for number in sorted(rows)}
    empty = [number for number, label in given.items() if not label]
    if len(empty) == len(given):
        return None
    if wrong := [number for number, label in given.items() if label and label not in LABELS]:
        raise ValueError(
            f"`label_file` {path} has {given[wrong[0]]!r} as `better` in pair {wrong[0]}{_others(wrong)}: write "
            f"{ALLOWED}."
        )
    if empty:
        raise ValueError(
            f"`label_file` {path} is filled in part: {len(empty)} of {len(given)} pairs have no label, the first is "
            f"pair {empty[0]}. Write {ALLOWED} into `better` of each, and run the command again. Nothing is lost."
        )
    return [LABELS[label] for label in given.values()]


def _numbered(path: Path, count: int) -> dict[int, dict[str, Any]]:
    """Return the rows by the number of their pair."""
    found: dict[int, dict[str, Any]] = {}
    for place, row in enumerate(_rows(path), start=1):
        if lacking := [name for name in COLUMNS if name not in row]:
            raise ValueError(f"`label_file` {path} has no {', '.join(lacking)} in row {place}. Restore the column.")
        text = str(row["pair"]).strip().removesuffix(".0")
        number = int(text) if text.isdecimal() else 0
        if not 1 <= number <= count or number in found:
            problem = "twice" if number in found else f"in row {place}, and the pairs have the numbers 1 to {count}"
            raise ValueError(f"`label_file` {path} has the pair {row['pair']!r} {problem}. Correct the column `pair`.")
        found[number] = row
    if missing := [number for number in range(1, count + 1) if number not in found]:
        raise ValueError(
            f"`label_file` {path} lacks pair {missing[0]}{_others(missing)}. Restore the rows; a pair that nobody can "
            "decide is a `tie`."
        )
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".csv":
            head = text.partition("\n")[0]
            delimiter = ";" if head.count(";") > head.count(",") else ","  # of spreadsheets in some languages
            with _cells_of_any_length(text):
                return list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError, csv.Error) as error:
        reason = "it is not in UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise ValueError(f"`label_file` {path} cannot be read: {reason}. Save it as UTF-8.") from error
    if any(not isinstance(row, dict) for row in rows):
        raise ValueError(f"`label_file` {path} has a line that is no JSON object. Restore it.")
    return rows


@contextmanager
def _cells_of_any_length(text: str) -> Iterator[None]:
    """Let `csv` read cells as long as the text. It writes longer ones than it reads by default."""
    limit = csv.field_size_limit()
    csv.field_size_limit(max(limit, len(text)))
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _words(text: Any) -> list[str]:
    return str(text).strip().removeprefix("'").split()


def _others(numbers: Sequence[int]) -> str:
    return f" and {len(numbers) - 1} others" if len(numbers) > 1 else ""
