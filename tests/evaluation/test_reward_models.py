"""How scores rank rows, by hand numbers, and which of two reward models ranks better."""

import itertools

import numpy as np
import pytest
from datasets import Dataset
from tolerances import FP64, assert_close

from rlhf_recipes.data.preferences import PreferenceSet, preference_set
from rlhf_recipes.evaluation.best_of_answers import curve_of, given_candidates
from rlhf_recipes.evaluation.evaluated_models import Evaluated, Evaluation, names_of, reward_models_verdict
from rlhf_recipes.evaluation.reward_models import compare, rank, scores_of, winner


def _pairs(lengths, categories=None):
    """Return pairs whose answers have these numbers of characters."""
    chosen, rejected = ([["a" * pair[side]] for pair in lengths] for side in (0, 1))
    return PreferenceSet(Dataset.from_dict({"prompt": ["p"] * len(lengths)}), chosen, rejected, categories)


def _scores(*rows):
    return [np.array(row, dtype=float) for row in rows]


def test_accuracy_in_all_by_category_and_by_the_longer_answer():
    preferences = _pairs([(3, 1), (2, 1), (1, 4), (1, 1)], ["x", "x", "y", "y"])
    metrics = rank(preferences, _scores((1, 0), (0, 1), (2, 0), (1, 0))).metrics
    assert (metrics["accuracy"], metrics["rows"], metrics["unscored"]) == (0.75, 4.0, 0.0)
    assert (metrics["category/x/accuracy"], metrics["category/y/accuracy"]) == (0.5, 1.0)
    assert (metrics["accuracy_chosen_longer"], metrics["pairs_chosen_longer"]) == (0.5, 2.0)
    assert (metrics["accuracy_chosen_shorter"], metrics["pairs_chosen_shorter"]) == (1.0, 1.0)
    assert metrics["accuracy_low"] < 0.75 < metrics["accuracy_high"]
    assert "pair_accuracy" not in metrics


def test_a_row_without_all_scores_does_not_count():
    ranking = rank(_pairs([(1, 2)] * 3), _scores((1, 0), (np.nan, 0), (1, 0)))
    assert (ranking.metrics["accuracy"], ranking.metrics["unscored"]) == (1.0, 1.0)
    assert np.isnan(ranking.outcomes[1])
    with pytest.raises(ValueError, match="No row has a score for each of its answers"):
        rank(_pairs([(1, 2)]), _scores((np.nan, 0)))


def _second():
    """Return rows in the form of RewardBench 2: best of four, and one question with several right answers."""
    rows = {
        "id": ["7", "ref:1", "tied:1"],
        "prompt": ["p", "q", "r"],
        "chosen": [["a"], ["a"], ["a", "b"]],
        "rejected": [["x", "y", "z"], ["x", "y"], ["x", "y"]],
        "subset": ["Math", "Ties", "Ties"],
    }
    return Dataset.from_dict(rows)


def test_best_of_four_and_ties():
    ranking = rank(preference_set(_second()), _scores((2, 2, 0, 0), (2, 0, 1), (3, 2.5, 0, 1)))
    assert ranking.metrics["category/Math/accuracy"] == ranking.metrics["accuracy"] == 0.5
    assert_close(ranking.metrics["pair_accuracy"], 2 / 3, FP64)
    assert ranking.metrics["pairs"] == 3.0, "those of Ties do not count"
    assert_close(ranking.metrics["category/Ties/accuracy"], 1 + 0.01 * np.tanh(1.0), FP64)
    assert ranking.metrics["category/Ties/rows"] == 1.0


@pytest.mark.parametrize("ids", [["7", "ref:1", "tied:2"], ["7", "1", "2"], None])
def test_ties_need_both_rows_of_a_question(ids):
    rows = _second().remove_columns("id")
    rows = rows if ids is None else rows.add_column("id", ids)
    with pytest.raises(ValueError, match=r"`dataset_name` has the category Ties, but not both rows `ref:.*` and"):
        rank(preference_set(rows), _scores((2, 1, 0, 0), (2, 0, 1), (3, 2.5, 0, 1)))


def _rankings(count, **shares):
    """Return rankings that are right in these shares of the rows: of two models, on the same rows first."""
    preferences = _pairs([(1, 2)] * count)
    right = {name: np.arange(count) < share * count for name, share in shares.items()}
    return {name: rank(preferences, _scores(*zip(wins, ~wins, strict=True))) for name, wins in right.items()}


def test_a_winner_needs_an_interval_that_excludes_0():
    (far,) = compare(_rankings(100, good=0.9, bad=0.6))
    assert far.metrics["accuracy"] == pytest.approx(0.3)
    assert 0 < far.metrics["accuracy_low"] < 0.3 < far.metrics["accuracy_high"]
    assert far.better == winner([far]) == "good"
    assert compare(_rankings(100, bad=0.6, good=0.9))[0].better == "good"
    (near,) = compare(_rankings(100, good=0.62, bad=0.6))
    (same,) = compare(_rankings(100, one=0.6, other=0.6))
    (all_differ,) = compare(_rankings(100, one=1.0, other=0.0))
    assert near.better is same.better is all_differ.better is None, "an interval without width shows nothing"


def test_a_winner_is_better_than_every_other_one():
    names = {"best": 0.9, "middle": 0.6, "last": 0.3}
    compared = compare(_rankings(100, **names))
    assert len(compared) == 3
    assert winner(compared) == "best"
    assert winner(compare(_rankings(100, **names, close=0.89))) is None


def test_the_verdict_names_the_better_model():
    for shares, name, level in (({"b": 0.6, "a": 0.9}, "a", "good"), ({"b": 0.6, "a": 0.61}, "b", "doubtful")):
        rankings = _rankings(100, **shares)
        models = {key: Evaluated(f"runs/{key}", ranking) for key, ranking in rankings.items()}
        evaluation = Evaluation(models, compare(rankings))
        judged = reward_models_verdict(evaluation)
        assert judged[0].level == level
        assert judged[1].text.startswith(f"{name}: accuracy")
        assert evaluation.winner_path == ("runs/a" if level == "good" else None)
        assert len(judged) == 3
    single = Evaluation({"a": Evaluated("runs/a", _rankings(100, a=0.9)["a"])}, [])
    assert reward_models_verdict(single)[0].text.startswith("accuracy 0.90")
    assert single.winner_path == "runs/a"


def test_scores_are_asked_for_in_parts_and_come_back_by_row():
    sizes = []

    def judge(prompts, completions, topic):
        sizes.append(len(prompts))
        return [
            len(text) + int(prompt) + number for prompt, text, number in zip(prompts, completions, topic, strict=True)
        ]

    prompts, answers = [str(i) for i in range(200)], [["a", "bb"] for _ in range(200)]
    scores = scores_of(judge, prompts, answers, topic=[[1000, 2000]] * 200)
    assert sizes == [256, 144]
    assert [*scores[150]] == [1151.0, 2152.0]

    for counts, expected in (([3] * 90, [255, 15]), ([300, 1, 255, 1], [300, 256, 1]), ([0, 2], [2])):
        sizes.clear()
        answers = [["a"] * count for count in counts]
        columns = [[0] * count for count in counts]
        scores = scores_of(judge, [str(number) for number in range(len(counts))], answers, topic=columns)
        assert sizes == expected  # the answers to a prompt are not divided
        assert [len(row) for row in scores] == counts


def test_a_curve_is_the_mean_over_all_choices():
    rng = np.random.default_rng(0)
    scores, judged = rng.normal(size=(5, 6)), rng.normal(size=(5, 6))
    curve = curve_of(scores, {"gold": judged})["gold"]
    assert list(curve.values) == [1, 2, 4, 6]
    for n in curve.values:
        for row in range(5):
            chosen = [max(some, key=lambda i: scores[row, i]) for some in itertools.combinations(range(6), n)]
            assert_close(curve.values[n][row], np.mean(judged[row][chosen]), FP64)
    gain = curve.metrics["best_of_4/gold_gain"]
    assert_close(gain, curve.metrics["best_of_4/gold"] - curve.metrics["best_of_1/gold"], FP64)


def test_a_missing_score_is_never_chosen_and_never_counts():
    scores, judged = np.array([[np.nan, 1.0], [2.0, 1.0]]), np.array([[9.0, 3.0], [np.nan, 5.0]])
    curve = curve_of(scores, {"gold": judged})["gold"]
    assert curve.values[2][0] == 3.0
    assert np.isnan(curve.values[2][1])
    assert curve.metrics["best_of_2/gold"] == 3.0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            {"prompt": ["p"]},
            "`best_of_dataset_name` has no column 'completions' with a list of answers .*; it has 'prompt'",
        ),
        (
            {"prompt": ["p", "q"], "completions": [["a", "b"], ["c"]]},
            "has 1 answers as 'completions' in row 1, and 2 in",
        ),
        ({"prompt": ["p"], "completions": [["a", " "]]}, "no empty one"),
        ({"completions": [["a", "b"]]}, "`best_of_dataset_name` has no column 'prompt'"),
    ],
)
def test_answers_in_a_file_are_checked(rows, message):
    with pytest.raises(ValueError, match=message):
        given_candidates(Dataset.from_dict(rows))


def test_answers_keep_the_columns_of_judges():
    rows = {"prompt": ["p"], "completions": [["a", "b"]], "topic": [3]}
    candidates = given_candidates(Dataset.from_dict(rows))
    assert (candidates.answers, candidates.columns) == ([["a", "b"]], {"topic": [[3, 3]]})


def test_names_tell_models_apart():
    assert names_of(["runs/a/reward_modeling", "./runs/b"]) == ["reward_modeling", "b"]
    assert names_of(["seed0/rm", "seed1/rm/"]) == ["seed0-rm", "seed1-rm"]
    assert names_of(["http://127.0.0.1:8000", "models:/rm@best"]) == ["127.0.0.1:8000", "rm@best"]
