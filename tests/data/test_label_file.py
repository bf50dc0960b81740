"""The file for people: what they read, and every way in which it can come back."""

import csv
import json

import pytest

from rlhf_recipes.data.label_file import COLUMNS, Question, read_label_file, write_label_file

ASKED = [
    Question("Is it red?", "Yes,\nit is.", '=HYPERLINK("x")'),
    Question("And blue?", "- no", "'tis"),
    Question("Why?", "a; b", "ü\u2028ü"),
]


def rows_in(path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().split("\n") if line]
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path, rows, delimiter=",", columns=COLUMNS):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture(params=["label.csv", "label.jsonl"])
def path(request, tmp_path):
    """Return a file that nobody has filled."""
    write_label_file(tmp_path / "new" / request.param, ASKED)
    return tmp_path / "new" / request.param


def fill(path, labels, **changes):
    rows = rows_in(path)
    for row, label in zip(rows, labels, strict=True):
        row["better"] = label
    for place, change in changes.items():
        rows[int(place.removeprefix("row"))].update(change)
    write_rows(path, rows)


def test_people_see_the_texts_and_nothing_else(path):
    rows = rows_in(path)
    assert [list(row) for row in rows] == [list(COLUMNS)] * 3
    assert rows[0]["answer_1"] == "Yes,\nit is."
    is_csv = path.suffix == ".csv"
    assert rows[0]["answer_2"] == ("'" if is_csv else "") + '=HYPERLINK("x")'  # a spreadsheet would run it
    assert [row["better"] for row in rows] == [""] * 3
    assert read_label_file(path, ASKED) is None


def test_a_filled_file_is_read_in_any_order(path):
    fill(path, ["1", " TIE ", "2.0"])
    rows = rows_in(path)
    write_rows(path, [rows[2], rows[0], rows[1]])
    assert read_label_file(path, ASKED) == [1.0, 0.5, 0.0]


def test_a_spreadsheet_may_write_semicolons_and_other_spaces(tmp_path):
    path = tmp_path / "label.csv"
    write_label_file(path, ASKED)
    fill(path, ["1", "2", "tie"], row0={"answer_1": "Yes,\r\n it is. ", "pair": "1.0"})
    write_rows(path, rows_in(path), delimiter=";")
    assert read_label_file(path, ASKED) == [1.0, 0.0, 0.5]


@pytest.mark.parametrize(
    ("labels", "changes", "message"),
    [
        (["1", "", "2"], {}, "filled in part: 1 of 3 pairs have no label, the first is pair 2. Write `1`, `2` or"),
        (["1", "3", "x"], {}, "has '3' as `better` in pair 2 and 1 others: write `1`, `2` or `tie`"),
        (["1", "1", "2"], {"row1": {"answer_1": "yes"}}, "has another answer_1 in pair 2 than the one"),
        (["1", "1", "2"], {"row1": {"pair": "1"}}, "has the pair '1' twice"),
        (["1", "1", "2"], {"row1": {"pair": "7"}}, "has the pair '7' in row 2, and the pairs have the numbers 1 to 3"),
        (["1", "1", "2"], {"row1": {"pair": "two"}}, "has the pair 'two' in row 2"),
    ],
)
def test_a_wrong_file_is_refused_by_pair_and_stays(path, labels, changes, message):
    fill(path, labels, **changes)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"`label_file` ") as error:
        read_label_file(path, ASKED)
    assert message in str(error.value)
    assert path.read_bytes() == before


def test_lost_rows_and_columns_are_named(tmp_path):
    path = tmp_path / "label.csv"
    write_label_file(path, ASKED)
    rows = rows_in(path)
    write_rows(path, rows[1:2])
    with pytest.raises(ValueError, match="lacks pair 1 and 1 others"):
        read_label_file(path, ASKED)
    write_rows(path, [{"pair": row["pair"]} for row in rows], columns=["pair"])
    with pytest.raises(ValueError, match="has no prompt, answer_1, answer_2, better in row 1"):
        read_label_file(path, ASKED)
    path.write_bytes("pair,prompt,answer_1,answer_2,better\n1,ü".encode("utf-16"))
    with pytest.raises(ValueError, match="is not in UTF-8"):
        read_label_file(path, ASKED)


def test_a_long_answer_can_be_read_back(tmp_path):
    path, asked = tmp_path / "label.csv", [Question("Why?", "long " * 40_000, "b")]
    limit = csv.field_size_limit()
    write_label_file(path, asked)
    assert read_label_file(path, asked) is None
    path.write_text(path.read_text(encoding="utf-8").removesuffix("\n") + "2\n", encoding="utf-8")
    assert read_label_file(path, asked) == [0.0]
    assert csv.field_size_limit() == limit


def test_a_file_that_is_there_is_not_written_over(path):
    with pytest.raises(FileExistsError):
        write_label_file(path, ASKED)
