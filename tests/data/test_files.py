"""The files of a data directory: which are read, and what is said about those that cannot be."""

import gzip
import json
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_recipes.data.files import is_beside_data
from rlhf_recipes.data.loading import load_split

ROWS = [{"prompt": f"q{i}", "chosen": f"g{i}"} for i in range(3)]


def _lines(rows=ROWS, end="\n"):
    return "".join(json.dumps(row) + end for row in rows)


def _write(directory, files):
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def _load(directory, split="train"):
    return load_split(
        SimpleNamespace(dataset_name=str(directory), dataset_config=None, dataset_streaming=False), split
    )


def _parquet(rows):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=None if rows else pa.schema({"prompt": pa.string()})), sink)
    return sink.getvalue().to_pybytes()


def test_words_of_a_csv_file_are_no_missing_values(tmp_path):
    _write(tmp_path, {"train.csv": "prompt,chosen,margin\nq,None,1.5\nNA,null,\nN/A,n,2\n"})
    rows = _load(tmp_path)
    assert rows["prompt"][:] == ["q", "NA", "N/A"]
    assert rows["chosen"][:] == ["None", "null", "n"]
    assert rows["margin"][:] == [1.5, None, 2.0]


@pytest.mark.parametrize(
    "files",
    [
        {"train.jsonl": _lines(), "README.md": "# about"},
        {"train.jsonl": _lines(), "train.jsonl.bak": _lines(), "train.jsonl~": _lines(), "train_notes.md": "hm"},
        {"train.jsonl": _lines(end="\r\n")},
        {"train.jsonl": b"\xef\xbb\xbf" + _lines().encode()},
        {"train.jsonl.gz": gzip.compress(_lines().encode())},
        {"train.csv": b"\xef\xbb\xbfprompt,chosen\r\nq0,g0\r\nq1,g1\r\nq2,g2\r\n"},
        {"train.parquet": _parquet(ROWS)},
        {"train.json": json.dumps(ROWS)},
    ],
    ids=["plain", "backups", "CRLF", "BOM", "gz", "CSV with BOM", "Parquet", "JSON array"],
)
def test_a_split_is_read_from_its_files_alone(tmp_path, capsys, files):
    _write(tmp_path, files)
    assert _load(tmp_path).to_list() == ROWS
    assert ("train.jsonl; not from " in capsys.readouterr().out) is ("train.jsonl.bak" in files)


def test_every_file_of_a_split_is_named(tmp_path, capsys):
    _write(tmp_path, {"train.jsonl": _lines(), "train_old.jsonl": _lines(), "old/train.jsonl": _lines()})
    assert len(_load(tmp_path)) == 9
    assert (
        "9 rows of the split 'train' from old/train.jsonl, train.jsonl, train_old.jsonl\n" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train.jsonl": _lines() + '{"prompt": "x", "chosen": \n'}, "train.jsonl is broken: line 4 is no JSON"),
        ({"train.jsonl": _lines() + '\n{"a": \n' + _lines()}, "train.jsonl is broken: line 5 is no JSON"),
        ({"train.jsonl": _lines(), "test.jsonl": "[1, 2]x"}, "test.jsonl is broken: line 1 is no JSON"),
        ({"train.jsonl": _lines() + "3\n"}, "train.jsonl is broken: line 4 is no JSON object"),
        ({"train.jsonl": _lines().encode() + b'{"prompt": "\xe9"}\n'}, "line 4 is not in UTF-8"),
        ({"train.jsonl.gz": gzip.compress(_lines().encode())[:-9]}, "train.jsonl.gz is broken"),
        (
            {"train.csv": "prompt,chosen\na,b\nc,d,e\n"},
            "train.csv is broken: line 3 has 3 fields, and the first line 2",
        ),
        ({"train.parquet": b"PAR1"}, "train.parquet is broken"),
        ({"train.jsonl": ""}, "train.jsonl has no rows"),
        ({"train.jsonl": _lines(), "test.jsonl": "\n"}, "test.jsonl has no rows"),
        ({"train.csv": ""}, "train.csv has no rows"),
        ({"train.parquet": _parquet([])}, "train.parquet has no rows"),
        (
            {"train.jsonl": _lines(), "test.jsonl": _lines([ROWS[0] | {"source": "x"}])},
            r"test.jsonl has the column 'source', which \S*train.jsonl lacks",
        ),
        (
            {"train.csv": "prompt\na\n", "test.csv": "prompt,chosen\na,b\n"},
            r"test.csv has the column 'chosen', which \S*train.csv lacks",
        ),
        (
            {"train.jsonl": _lines(), "test.jsonl": _lines([{"prompt": "a", "chosen": [{"role": "user"}]}])},
            r"'chosen' is text in \S*train.jsonl, and a list in \S*test.jsonl",
        ),
        ({"notes.md": "nothing"}, "holds no file with JSON lines, CSV or Parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_its_line_or_column(tmp_path, files, message):
    _write(tmp_path, files)
    with pytest.raises(ValueError, match=f"`dataset_name` .* cannot be loaded: .*{message}"):
        _load(tmp_path)


@pytest.mark.parametrize(
    ("name", "is_beside"),
    [
        ("d/train.jsonl", False),
        ("d/train-00000-of-00002.parquet", False),
        ("d/train.jsonl.zst", False),
        ("d/cat.png", False),
        ("d/train.jsonl.bak", True),
        ("d/train.csv.md5", True),
        ("d/train~", True),
        ("d/train.log", True),
    ],
)
def test_what_is_no_data(name, is_beside):
    assert is_beside_data(name) is is_beside


def test_a_directory_whose_card_names_its_files_is_read_as_it_is_now(tmp_path):
    """The cache of `datasets` knows such a directory by its last name and its card, and not by the content."""
    head = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: train.jsonl\n---\n"
    for number, place in enumerate(("a", "a", "b")):
        folder = tmp_path / place / "data"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README.md").write_text(head)
        (folder / "train.jsonl").write_text(json.dumps({"prompt": f"question {number}"}) + "\n")
        (row,) = load_split(
            SimpleNamespace(dataset_name=str(folder), dataset_config=None, dataset_streaming=False), "train"
        )
        assert row == {"prompt": f"question {number}"}
