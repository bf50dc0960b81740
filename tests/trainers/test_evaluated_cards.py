"""The result of an evaluation is beside the reward model, once per split, and the rest of its card stays."""

import json
import os

import numpy as np
import pytest
from datasets import Dataset
from huggingface_hub import ModelCard

from rlhf_recipes.data.preferences import PreferenceSet
from rlhf_recipes.evaluation.evaluated_models import Evaluated, Evaluation
from rlhf_recipes.evaluation.reward_models import rank
from rlhf_recipes.trainers.evaluated_cards import EVALUATIONS_FILE, note_evaluation

CARD = """---
model-index:
- name: mine
  results:
  - task:
      type: text-classification
    dataset:
      name: data of the run
      type: local
    metrics:
    - type: accuracy
      value: 0.5
      name: accuracy
---

# mine

## Results

A table.
"""


def _evaluation(path, right):
    preferences = PreferenceSet(Dataset.from_dict({"prompt": ["p"] * 10}), [["a"]] * 10, [["bb"]] * 10)
    scores = [np.array([1.0, 0.0] if row < right else [0.0, 1.0]) for row in range(10)]
    return Evaluation({"rm": Evaluated(str(path), rank(preferences, scores))}, [])


def test_card_and_file_hold_the_latest_result_of_each_split(tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    for right, split in ((5, "test"), (9, "test"), (7, "other")):
        note_evaluation(_evaluation(tmp_path, right), "me/pairs", split)
    found = json.loads((tmp_path / EVALUATIONS_FILE).read_text())
    assert {name: figures["accuracy"] for name, figures in found.items()} == {
        "me/pairs:test": 0.9,
        "me/pairs:other": 0.7,
    }
    card = ModelCard.load(tmp_path / "README.md")
    assert card.text.count("## Evaluation on me/pairs, split test") == 1
    assert "| accuracy | 0.900 | 0.596 to 0.982 |" in card.text
    assert "| accuracy | 0.500 |" not in card.text
    assert "A table." in card.text
    results = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert results[("data of the run", "accuracy")] == 0.5
    assert results[("me/pairs, split test", "accuracy")] == 0.9


def test_what_cannot_be_written_is_said(tmp_path, caplog):
    (tmp_path / "README.md").write_text("---\n- [\n---\n")
    note_evaluation(_evaluation(tmp_path, 9), "pairs", "test")
    assert f"The result is not written beside {tmp_path}" in caplog.text
    note_evaluation(_evaluation("me/on-the-hub", 9), "pairs", "test")
    assert not (tmp_path / "me").exists()


@pytest.mark.parametrize("content", ["[]", '"text"', "{"])
def test_a_file_of_another_kind_stays_as_it_is(tmp_path, caplog, content):
    (tmp_path / EVALUATIONS_FILE).write_text(content)
    note_evaluation(_evaluation(tmp_path, 9), "pairs", "test")
    assert (tmp_path / EVALUATIONS_FILE).read_text() == content
    assert f"The result is not written beside {tmp_path}: {EVALUATIONS_FILE} " in caplog.text


@pytest.mark.parametrize("number", [0, 1])
def test_a_write_that_breaks_off_leaves_the_old_file(tmp_path, monkeypatch, number):
    """The file is written first, the card second."""
    names, calls = (EVALUATIONS_FILE, "README.md"), []
    (tmp_path / names[0]).write_text("{}")
    (tmp_path / names[1]).write_text(CARD)
    before = (tmp_path / names[number]).read_text()

    def break_off(file):
        calls.append(file)
        if len(calls) > number:
            raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", break_off)
    note_evaluation(_evaluation(tmp_path, 9), "pairs", "test")
    assert len(calls) == number + 1
    assert (tmp_path / names[number]).read_text() == before
