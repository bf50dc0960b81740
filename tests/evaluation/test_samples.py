"""Tables of completions are written and found again, and repetition is counted."""

import errno
import logging

import numpy as np
import pandas as pd
import pytest
import torch

from rlhf_recipes.algorithm.repetition import repeated_ngrams
from rlhf_recipes.data.messages import as_text
from rlhf_recipes.evaluation import samples
from rlhf_recipes.evaluation.samples import (
    latest_table,
    sample_rows,
    tables_of_step,
    tables_until,
    write_evaluation,
    write_table,
)


def _repeated(ids, n):
    seen, repeats = set(), 0
    ngrams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    for ngram in ngrams:
        repeats += ngram in seen
        seen.add(ngram)
    return repeats / max(len(ngrams), 1)


@pytest.mark.parametrize("n", [1, 4])
def test_repeated_ngrams_by_sets(n):
    """Few different tokens, rows of every length, and anything in the padding."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 3, length).tolist() for length in range(40)]
    ids = torch.full((40, 40), 1)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, : len(row)] = 1
    expected = [_repeated(row, n) for row in rows]
    assert repeated_ngrams(ids, mask, n).tolist() == pytest.approx(expected)
    assert 0 < max(expected) < 1


def test_ngrams_of_large_ids_do_not_meet_by_overflow():
    ids = torch.arange(150_000, 150_400).reshape(4, 100).flip(0)
    assert repeated_ngrams(ids, torch.ones_like(ids)).sum() == 0
    assert repeated_ngrams(ids[:, :3], torch.ones(4, 3)).tolist() == [0.0] * 4


def test_a_table_is_read_back_as_it_was(tmp_path):
    prompts = ["p", [{"role": "system", "content": "be kind"}, {"role": "user", "content": "ü"}]]
    completions = ["yes", [{"role": "assistant", "content": "no\n"}]]
    scores = {"score": torch.tensor([1.5, torch.nan]), "kl": torch.tensor([0.25, 0.5])}
    rows = sample_rows(prompts, completions, [[5, 1], [5, 6, 7]], scores, torch.tensor([False, True]))
    file = write_table(rows, tmp_path, "training", 40)
    table = pd.read_json(file, orient="split")
    assert table["prompt"].tolist() == ["p", "system: be kind\nuser: ü"]
    assert table["completion"].tolist() == ["yes", "no\n"]
    assert table["score"].isna().tolist() == [False, True]
    assert table[["kl", "length", "stop"]].to_numpy().tolist() == [[0.25, 2, "eos"], [0.5, 3, "length"]]
    assert tables_of_step(tmp_path, 40) == [file]
    assert not tables_of_step(tmp_path, 4)
    file.with_name("my-notes.json").touch()
    assert tables_until(tmp_path, 40) == [file]
    assert not tables_until(tmp_path, 39)


def test_an_answer_of_several_messages_keeps_its_roles():
    assert (
        as_text([{"role": "assistant", "content": "a"}, {"role": "tool", "content": "b"}]) == "assistant: a\ntool: b"
    )


def test_a_full_disk_costs_a_table_and_nothing_else(tmp_path, monkeypatch, caplog):
    def full(self, file, **kwargs):
        file.write_text("[half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_json", full)
    with caplog.at_level(logging.WARNING):
        assert write_table([{"prompt": "a"}], tmp_path, "training", 40) is None
    assert tables_of_step(tmp_path, 40) == [], "half a table is none"
    assert "could not be written: [Errno 28] No space left on device. The training goes on without it." in caplog.text
    (tmp_path / "samples").rmdir()
    (tmp_path / "samples").write_text("a file in the place of the folder")
    assert write_table([{"prompt": "a"}], tmp_path, "training", 40) is None


def test_the_latest_evaluation_has_one_short_row_per_prompt(tmp_path, monkeypatch, caplog):
    """Every run has it under the same name, and a browser can show those of many runs."""
    assert latest_table(tmp_path) is None
    prompts = [f"prompt {number // 2}" for number in range(2 * samples.LATEST_ROWS + 4)]
    rows = [{"prompt": prompt, "completion": "x" * 5_000, "score": 0.5} for prompt in prompts]
    write_evaluation(rows, tmp_path, 25)
    write_evaluation(rows[:4], tmp_path, 50)
    assert len(pd.read_json(tables_of_step(tmp_path, 25)[0], orient="split")) == len(rows)
    assert pd.read_json(latest_table(tmp_path), orient="split")["prompt"].tolist() == ["prompt 0", "prompt 1"]
    assert latest_table(tmp_path) not in tables_until(tmp_path, 50)
    write_evaluation(rows, tmp_path, 75)
    latest = pd.read_json(latest_table(tmp_path), orient="split")
    assert latest["prompt"].tolist() == list(dict.fromkeys(prompts))[: samples.LATEST_ROWS]
    assert {*latest["completion"].str.len()} == {samples.LATEST_CHARACTERS}

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    write_evaluation(rows[:4], tmp_path, 100)
    assert "The run goes on without it" in caplog.text
    assert len(pd.read_json(latest_table(tmp_path), orient="split")) == samples.LATEST_ROWS
