"""The numbers that a loss reads are finite numbers, in every row."""

import math

import pytest
import tiny
from datasets import Dataset

from rlhf_recipes.data.margins import NUMBERS, check_margins

BAD = [
    (math.nan, "nan"),
    (math.inf, "inf"),
    (-math.inf, "-inf"),
    (1e39, "1e\\+39"),  # infinite in float32
    (None, "no value"),
    (True, "True"),
    ("slightly", "'slightly'"),
    ([0.5], r"\[0.5\]"),
]


def _data(value, column="margin"):
    """Return rows of which the third has the value. Columns of mixed types keep them, as from JSON."""
    values = [0.5, 1, value] if isinstance(value, float | None) else [value] * 3
    return Dataset.from_dict({"prompt": ["a"] * 3, column: values})


@pytest.mark.parametrize("column", NUMBERS)
@pytest.mark.parametrize(("value", "said"), BAD)
def test_what_is_no_number_is_refused_by_column_and_row(value, said, column):
    row = 2 if isinstance(value, float | None) else 0
    with pytest.raises(ValueError, match=f"`data` has {said} as '{column}' in row {row}"):
        check_margins(_data(value, column), "data")


def test_numbers_pass():
    data = Dataset.from_dict({"margin": [0.5, -1.0, 0.0, 3e38], "other": ["a", None, "", "b"]})
    assert check_margins(data, "data") is data
    assert check_margins(None, "data") is None


def test_a_stream_is_checked_when_it_is_read():
    stream = check_margins(_data(math.nan).to_iterable_dataset(), "data")
    with pytest.raises(ValueError, match="has nan as 'margin' in row 2"):
        list(stream)
    with pytest.raises(ValueError, match="has True as 'margin' in row 0"):
        check_margins(_data(True).to_iterable_dataset(), "data")


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_a_reward_model_is_not_trained_on_a_hole(tmp_path, name):
    data = {"data": tiny.preferences(margin=True), "eval_data": tiny.preferences(margin=True, count=6)}
    key = "data" if name == "train_dataset" else "eval_data"
    data[key] = data[key].map(lambda row, i: {"margin": math.nan if i == 4 else 0.5}, with_indices=True)
    with pytest.raises(ValueError, match=f"`{name}` has nan as 'margin' in row 4"):
        tiny.reward_trainer(tmp_path, **data)
    assert not list(tmp_path.iterdir())
