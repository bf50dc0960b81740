"""The reports of benchmarks over few seeds: t intervals of paired differences, and no seed is left out."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import dense_rewards  # noqa: E402
import over_optimization_report  # noqa: E402
import reward_model_report  # noqa: E402
import second_turn  # noqa: E402
from paired_differences import as_cell, paired_difference  # noqa: E402

OURS, THEIRS = {0: 2.0, 1: 2.0, 2: 6.0}, {0: 1.0, 1: 0.0, 2: 3.0}
CELL = "+2.000 [-0.484, +4.484]"  # differences 1, 2 and 3: half a width is t(2) = 4.3027 over the root of 3
POINTS = [{"gold": 1.0, "kl": 1.0, "step": 10}, {"gold": 2.0, "kl": 2.0, "step": 20}]


def _rows(values):
    return {seed: {"gold": value} for seed, value in values.items()}


def test_the_intervals_are_those_of_student():
    pairs = [({"gold": OURS[seed]}, {"gold": THEIRS[seed]}) for seed in OURS]
    assert second_turn.difference(pairs, "gold") == CELL
    assert reward_model_report.difference(_rows(OURS), _rows(THEIRS), "gold") == CELL
    names = over_optimization_report.COMPARED
    rows = {
        name: {seed: dict.fromkeys(names, value) for seed, value in values.items()}
        for name, values in (("single", THEIRS), ("many", OURS))
    }
    assert "| many | +2.00 [-0.48, +4.48] |" in over_optimization_report.table(rows)


def test_one_seed_has_no_interval():
    assert as_cell(paired_difference([2.0], [1.0])) == "+1.000"
    assert dense_rewards.share_text([0.4]).endswith("1 of 1 seeds reach the gold score of the sparse run; mean 0.4")


def _run(*gold):
    path = [point | {"gold": value} for point, value in zip(POINTS, gold, strict=True)]
    return {"sft": {"gold": 0.0}, "path": path}


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        (1.5, "2 of 3 seeds reach the gold score of the sparse run, so there is no mean"),
        (2.0, "3 of 3 seeds reach the gold score of the sparse run; mean 0.667 [-0.0504, 1.38]"),
    ],
)
def test_a_run_that_never_gets_there_counts(tmp_path, last, expected):
    """The shares are 1/2, 1/2 and none or 1: their deviation is 0.289."""
    dense = [_run(2.0, 3.0), _run(2.0, 3.0), _run(1.0, last)]
    dense_rewards.write_report(tmp_path, {seed: (run, _run(1.0, 2.0)) for seed, run in enumerate(dense)})
    text = (tmp_path / "dense.md").read_text()
    assert expected in text
    assert ("inf" in text) == (last < 2)
