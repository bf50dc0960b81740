"""The frontier of score and KL: closed forms, and properties of any paths."""

import numpy as np
import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import EXACT, FP64, assert_close

from rlhf_recipes.comparison.frontier import find_frontier
from rlhf_recipes.comparison.groups import Group
from rlhf_recipes.comparison.runs import TrackedRun

NUMBER = st.integers(0, 40).map(lambda tenths: tenths / 8)
PATH = st.lists(st.tuples(NUMBER, NUMBER), min_size=1, max_size=5).map(lambda points: [(0.0, 0.0), *points])
GROUPS = st.lists(st.lists(PATH, min_size=1, max_size=3), min_size=2, max_size=4)


def _frontier(*groups):
    """Return the frontier of groups, each a list of paths of points (KL, score). Their names are A, B, C."""
    built, paths = [], {}
    for name, members in zip("ABCDEFG", groups, strict=False):
        runs = [TrackedRun(f"{name}{seed}", "ppo", "FINISHED", str(seed), {}, {}, {}) for seed in range(len(members))]
        paths |= {
            run.run_id: pd.DataFrame(points, columns=["kl", "score"], dtype=float)
            for run, points in zip(runs, members, strict=True)
        }
        built.append(Group(name, name, runs))
    return find_frontier(built, paths)


def _leaders(frontier):
    return {row.kl: [group.name for group in row.leaders] for row in frontier.rows}


def test_two_lines_that_cross():
    """A rises by 3 per nat and ends at 1 nat. B rises by 1: it passes A's 3 at 3 nats, and goes on to 6."""
    frontier = _frontier([[(0, 0), (1, 3)]], [[(0, 0), (6, 6)]])
    assert _leaders(frontier) == {1: ["A"], 2: ["A"], 3: ["A", "B"], 4: ["B"], 5: ["B"], 6: ["B"]}
    ((start, end),) = frontier.leads["A"]
    assert start == 0
    assert 2.9 < end <= 3.0
    ((_, end),) = frontier.leads["B"][-1:]
    assert end == 6
    expected = np.maximum(np.minimum(3 * frontier.kl, 3), frontier.kl)
    assert_close(frontier.scores.tolist(), expected.tolist(), FP64)
    assert {name: best.mean for name, best in frontier.best.items()} == {"A": 3, "B": 6}


def test_a_group_that_moves_least_does_not_limit_the_others():
    """Before, all groups were compared within the 0.5 nats of C, where C was the best."""
    others = [[[(0, 0), (4, 4)], [(0, 0), (4, 4.2)]], [[(0, 0), (4, 3)], [(0, 0), (4, 3.1)]]]
    still = [[(0, 0), (0.5, 0.9)], [(0, 0), (0.5, 0.8)]]
    alone, together = _frontier(*others), _frontier(*others, still)
    assert set(map(tuple, _leaders(alone).values())) == {("A",)}
    assert {kl: names for kl, names in _leaders(together).items() if kl >= 1} == {
        kl: names for kl, names in _leaders(alone).items() if kl >= 1
    }
    assert ["C"] in _leaders(together).values(), "within a KL that it reaches"


def test_a_group_is_told_apart_by_its_seeds():
    """Three seeds each, 0.1 apart: the interval of 2.0 - 1.0 leaves out 0, that of 2.0 - 1.9 does not."""
    a, b, c = ([[(0, 0), (1, s + d)] for d in (-0.1, 0.0, 0.1)] for s in (2.0, 1.0, 1.9))
    last = _frontier(a, b, c).rows[-1]
    assert ([g.name for g in last.leaders], [g.name for g in last.close]) == (["A"], ["C"])
    assert_close(last.score.mean, 2.0, FP64)
    assert last.score.low < 2.0 < last.score.high


def test_one_seed_tells_nobody_apart():
    last = _frontier([[(0, 0), (1, 9)]], [[(0, 0), (1, 0)], [(0, 0), (1, 0.1)]]).rows[-1]
    assert ([g.name for g in last.leaders], [g.name for g in last.close]) == (["A"], ["B"])
    assert np.isnan(last.score.low)


def test_a_run_that_never_moves_has_a_frontier_of_one_point():
    frontier = _frontier([[(0, 0), (0, 1)]], [[(0, 0), (0, 2)]])
    assert _leaders(frontier) == {0: ["B"]}
    assert_close(frontier.kl.tolist(), [0.0], EXACT)


@settings(max_examples=12)
@given(GROUPS, st.integers(1, 8))
def test_a_group_that_is_below_another_everywhere_is_never_on_the_frontier(groups, gap):
    below = [[(kl, score - gap / 8) for kl, score in path] for path in groups[0]]
    frontier = _frontier(*groups, below)
    last = "ABCDEFG"[len(groups)]
    assert all(last not in names for names in _leaders(frontier).values())
    assert frontier.leads[last] == []


@settings(max_examples=12)
@given(GROUPS, st.integers(0, 100))
def test_the_order_of_groups_and_runs_changes_nothing(groups, seed):
    order = np.random.default_rng(seed).permutation(len(groups))
    one, other = _frontier(*groups), _frontier(*(groups[number][::-1] for number in order))
    assert_close(one.scores.tolist(), other.scores.tolist(), FP64)
    for ours, theirs in zip(one.rows, other.rows, strict=True):
        assert ours.kl == theirs.kl
        assert_close(ours.score.mean, theirs.score.mean, FP64)


@settings(max_examples=12)
@given(GROUPS)
def test_the_frontier_never_falls_and_holds_the_best_of_every_group(groups):
    frontier = _frontier(*groups)
    assert (np.diff(frontier.scores) >= 0).all()
    assert frontier.scores[-1] == max(best.mean for best in frontier.best.values())


@settings(max_examples=12)
@given(GROUPS, st.integers(1, 7))
def test_a_group_that_moves_less_and_scores_less_changes_nothing_beyond_its_reach(groups, eighths):
    """Any group that stops at a smaller KL, below what the others score there, leaves the frontier above as it was."""
    frontier = _frontier(*groups)
    stop = frontier.kl[-1] * eighths / 8
    known = float(np.interp(stop, frontier.kl, frontier.scores))
    added = _frontier(*groups, [[(0.0, 0.0), (stop, known / 2)]])
    above = frontier.kl > stop
    assert_close(added.scores[above].tolist(), frontier.scores[above].tolist(), EXACT)
