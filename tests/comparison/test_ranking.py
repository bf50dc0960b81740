"""PPO runs in a SQLite store are read, grouped and ranked."""

import math
import shutil

import numpy as np
import pytest
from mlflow import MlflowClient
from tolerances import EXACT, FP64, assert_close
from tracked_experiments import (
    evaluation_metrics,
    evaluation_rows,
    learning_curves,
    log_evaluation,
    log_ppo_run,
)

from rlhf_recipes.comparison.head_to_head import shared_answers, win_matrices
from rlhf_recipes.comparison.ranking import all_count_samples, group_runs, held_out_winner, rank_groups, run_alarms
from rlhf_recipes.comparison.runs import read_experiment

CONFIGURATIONS = {0.02: {"gain": 2.6, "kl": 8.0}, 0.05: {"gain": 2.2, "kl": 5.0}, 0.2: {"gain": 0.8, "kl": 4.0}}


@pytest.fixture(scope="module")
def store(tmp_path_factory, empty_store):
    """Write experiment `sweep`: three configurations with two seeds each, all evaluated."""
    uri = f"sqlite:///{shutil.copy(empty_store, tmp_path_factory.mktemp('store'))}"
    for number, (kl_coef, shape) in enumerate(CONFIGURATIONS.items()):
        for seed in (0, 1):
            curves = learning_curves(10 * number + seed, **shape)
            run = log_ppo_run(uri, "sweep", curves, {"kl_coef": kl_coef}, seed=seed, name=f"runs/seed-{seed}/ppo")
            rows = evaluation_rows(10 * number + seed, 1.0 - 0.5 * number)
            log_evaluation(uri, "sweep", run, rows, evaluation_metrics(0.7 - 0.1 * number))
    return uri


def _experiment(uri, name, *runs):
    """Record runs given as (options, curves, keywords), and read them back in groups."""
    for options, curves, keywords in runs:
        log_ppo_run(uri, name, curves, options, **keywords)
    return group_runs(read_experiment(name, [], uri))


def _line(kl, score, points=3):
    """Return a straight path from (0, 0) to (kl, score), too short for smoothing."""
    share = np.linspace(0, 1, points)
    return {"objective/kl": kl * share, "objective/scores": score * share}


def test_a_label_names_what_tells_its_group_from_each_other(store):
    """A label omits an option that separates no more groups: here `kl_controller`, because of `kl_coef`."""
    common = {"kl_coef": 0.09, "kl_controller": "adaptive", "max_steps": 100, "value_head_learning_rate": 0.002}
    changes = [
        {},
        {"max_steps": 160},
        {"kl_coef": 0.03, "kl_controller": "fixed"},
        {"value_head_learning_rate": 0.0002},
    ]
    runs = [(common | change, _line(1, 1), {}) for change in changes]
    groups, _ = _experiment(store, "labels", *runs)
    assert [group.label for group in groups] == [
        "kl_coef 0.09, max_steps 100, value_head_learning_rate 0.002",
        "kl_coef 0.09, max_steps 160, value_head_learning_rate 0.002",
        "kl_coef 0.03, max_steps 100, value_head_learning_rate 0.002",
        "kl_coef 0.09, max_steps 100, value_head_learning_rate 0.0002",
    ]


def test_three_configurations_of_two_seeds(store):
    groups, differing = group_runs(read_experiment("sweep", [], store))
    assert [group.name for group in groups] == ["A", "B", "C"]
    assert [group.label for group in groups] == ["kl_coef 0.02", "kl_coef 0.05", "kl_coef 0.2"]
    assert [[group.run_name(run) for run in group.runs] for group in groups] == [
        ["A0", "A1"], ["B0", "B1"], ["C0", "C1"],
    ]  # fmt: skip
    assert differing == {"kl_coef": ["0.02", "0.05", "0.2"]}, "seeds, names and directories do not count"
    verdict = rank_groups(groups)
    assert {ranked.group.name for ranked in verdict.ranking} == {"A", "B", "C"}
    assert verdict.ranking[-1].group.name == "C"
    assert 3.5 < verdict.common_kl < 4.2, "what the group of the smallest KL reaches"
    assert "which trains no policy, A beats its baseline most often: win rate 0.70" in held_out_winner(groups)
    assert all(run.evaluation is not None and run_alarms(run) == [] for group in groups for run in group.runs)


def test_a_run_is_read_back_whole(store):
    run = read_experiment("sweep", [], store)[0]
    expected = learning_curves(0, **CONFIGURATIONS[0.02])
    assert_close(run.curves["objective/scores"].tolist(), expected["objective/scores"].tolist(), EXACT)
    assert list(run.curves["objective/kl"].index) == list(range(1, 41))
    assert (run.seed, run.status, run.options["kl_coef"]) == ("0", "FINISHED", 0.02)
    assert run.peak_memory == {"system": 3.4}, "the largest of three, in gigabytes"
    assert 0.14 < run.hours < 0.17
    assert run.link == "", "a file has no pages"
    assert len(run.evaluation.rows) == 24


@pytest.mark.parametrize("choose", [lambda run: run.run_id, lambda run: run.run_id[:12]])
def test_runs_are_chosen_by_id_or_its_beginning(store, choose):
    runs = read_experiment("sweep", [], store)
    chosen = read_experiment("sweep", [choose(runs[4]), choose(runs[1])], store)
    assert [run.run_id for run in chosen] == [runs[1].run_id, runs[4].run_id]


def test_runs_are_chosen_by_name(store):
    assert [run.seed for run in read_experiment("sweep", ["runs/seed-1/ppo"], store)] == ["1", "1", "1"]


def test_a_run_that_does_not_exist_is_answered_by_those_that_do(store):
    message = r"^`runs`: no run 'deadbeef' in experiment 'sweep', which has: .*\(runs/seed-1/ppo\).*$"
    with pytest.raises(ValueError, match=message):
        read_experiment("sweep", ["deadbeef"], store)


def test_an_experiment_without_ppo(store):
    log_evaluation(store, "only-evaluations", "0" * 32, [], {})
    with pytest.raises(
        ValueError, match=r"'only-evaluations' has no run of PPO, RLOO, GRPO or DPO \(runs there: 1 evaluation\)"
    ):
        read_experiment("only-evaluations", [], store)


def test_a_store_that_does_not_exist_is_not_created(tmp_path):
    with pytest.raises(FileNotFoundError, match="which does not exist"):
        read_experiment("sweep", [], f"sqlite:///{tmp_path}/mlflow.db")
    assert not list(tmp_path.iterdir())


def test_a_store_that_cannot_be_read_says_why():
    with pytest.raises(ValueError, match=r"`tracking_uri` gopher://x cannot be read: ") as error:
        read_experiment("sweep", [], "gopher://x")
    assert "\n" not in str(error.value)


def test_a_single_run(store):
    groups, differing = _experiment(store, "single", ({}, _line(2, 1), {"name": "alone"}))
    assert (len(groups), differing) == (1, {})
    verdict = rank_groups(groups)
    assert verdict.headline == "One configuration, A (alone): its best score is 1.00 within a KL of 2.00 nats."
    assert held_out_winner(groups) == ""
    assert win_matrices({}) == []
    assert shared_answers({}, 4) == []


def test_scores_are_compared_at_the_kl_that_all_reach(store):
    """At 2 nats, A has 2 * 3 / 4 = 1.5, and B ends with 2. A ends higher, at a larger KL."""
    groups, _ = _experiment(
        store,
        "equal-kl",
        ({"lam": 0.9}, _line(4, 3), {"seed": 0}),
        ({"lam": 0.9}, _line(4, 3.2), {"seed": 1}),
        ({"lam": 1.0}, _line(2, 2), {"seed": 0}),
        ({"lam": 1.0}, _line(2, 2.2), {"seed": 1}),
    )
    verdict = rank_groups(groups)
    assert verdict.common_kl == 2.0
    assert [ranked.group.name for ranked in verdict.ranking] == ["B", "A"]
    numbers = [(r.score, r.low, r.high, r.final_kl) for r in verdict.ranking]
    assert_close(numbers, [(2.1, 2.0, 2.2, 2.0), (1.55, 1.5, 1.6, 4.0)], FP64)
    assert verdict.headline.startswith("Best at equal KL: B (lam 1.0) scores 2.10 against 1.55 of A (lam 0.9)")
    assert verdict.caveats == []


def test_overlapping_seeds_have_no_winner(store):
    groups, _ = _experiment(
        store,
        "overlap",
        ({"lam": 0.9}, _line(2, 1.0), {"seed": 0}),
        ({"lam": 0.9}, _line(2, 2.0), {"seed": 1}),
        ({"lam": 1.0}, _line(2, 1.5), {"seed": 0}),
        ({"lam": 1.0}, _line(2, 1.9), {"seed": 1}),
    )
    headline = rank_groups(groups).headline
    assert headline.startswith("No clear winner at equal KL: B (lam 1.0) scores 1.70 against 1.50 of A (lam 0.9)")


def test_one_seed_each_is_said(store):
    groups, _ = _experiment(store, "one-seed", ({"lam": 0.9}, _line(2, 1), {}), ({"lam": 1.0}, _line(2, 2), {}))
    assert any("One seed cannot show the effect of chance" in caveat for caveat in rank_groups(groups).caveats)


def test_a_winner_with_alarms_is_no_plain_winner(store):
    suspicious = learning_curves(3, gain=3.0, rising_length=1.0)
    groups, _ = _experiment(
        store, "suspicious", ({"lam": 0.9}, suspicious, {}), ({"lam": 1.0}, learning_curves(4, gain=1.0), {})
    )
    assert "scores highest at equal KL" in (headline := rank_groups(groups).headline)
    assert "raises alarms" in headline


def test_failed_runs_and_runs_without_numbers_are_named_not_ranked(store):
    broken = learning_curves(1)
    broken["objective/scores"][:] = math.nan
    cut = {name: values[:12] for name, values in learning_curves(2, gain=9.0).items()}
    groups, _ = _experiment(
        store,
        "failures",
        ({"lam": 0.9}, learning_curves(0), {"seed": 0}),
        ({"lam": 0.9}, cut, {"seed": 1, "status": "FAILED"}),
        ({"lam": 1.0}, broken, {"seed": 0}),
        ({"lam": 1.0}, {}, {"seed": 1, "status": "KILLED"}),
    )
    verdict = rank_groups(groups)
    assert [ranked.group.name for ranked in verdict.ranking] == ["A"]
    assert verdict.ranking[0].low == verdict.ranking[0].high, "of the finished seed alone"
    assert "Not ranked: A1 (failed), B0 (no numbers for score and KL), B1 (killed)." in verdict.caveats
    assert run_alarms(groups[1].runs[0]) == ["The score is not a number at 40 of 40 steps, first at step 1."]


def test_nothing_to_rank(store):
    groups, _ = _experiment(store, "crashes", ({}, _line(2, 1), {"status": "FAILED"}))
    verdict = rank_groups(groups)
    assert "nothing to rank" in verdict.headline
    assert (verdict.ranking, verdict.common_kl) == ([], None)


def test_a_running_run_counts_and_is_named(store):
    groups, _ = _experiment(store, "running", ({}, _line(2, 1), {"status": "RUNNING"}))
    verdict = rank_groups(groups)
    assert verdict.ranking
    assert any("Still running, or MLflow did not record the end" in caveat for caveat in verdict.caveats)


def test_an_infinity_is_no_number_and_a_step_logged_twice_counts_once(store):
    run_id = log_ppo_run(store, "twice", {"objective/scores": [1.0, math.inf, 3.0]}, {})
    MlflowClient(store).log_metric(run_id, "objective/scores", 4.0, timestamp=2_000_000_000_000, step=3)
    (run,) = read_experiment("twice", [], store)
    assert list(run.curves["objective/scores"].index) == [1, 2, 3]
    assert run.curves["objective/scores"].tolist()[::2] == [1.0, 4.0]
    assert math.isnan(run.curves["objective/scores"][2])


def test_different_rewards_are_not_ranked_against_each_other(store):
    groups, differing = _experiment(
        store,
        "rewards",
        ({"lam": 0.9}, _line(2, 1), {"tags": {"lineage.reward_model": "a" * 32}}),
        ({"lam": 1.0}, _line(2, 9), {"tags": {"lineage.reward_model": "b" * 32}}),
    )
    verdict = rank_groups(groups)
    assert "different rewards" in verdict.headline
    assert verdict.ranking == []
    assert groups[0].runs[0].lineage == {"reward model": "aaaaaaaa"}, "a run that is gone keeps its short id"


def test_lineage_names_the_runs(store):
    source = log_ppo_run(store, "sources", {}, {}, name="my reward model")
    groups, _ = _experiment(store, "descendants", ({}, _line(2, 1), {"tags": {"lineage.reward_model": source}}))
    assert groups[0].runs[0].lineage == {"reward model": f"my reward model ({source[:8]})"}


def test_a_run_that_hardly_moves_is_named(store):
    groups, _ = _experiment(
        store,
        "still",
        ({"lr": 0.1}, _line(4, 3), {}),
        ({"lr": 0.2}, _line(5, 3), {}),
        ({"lr": 0.0}, _line(0.1, 0), {}),
    )
    assert any(caveat.startswith("C has the smallest KL, which limits") for caveat in rank_groups(groups).caveats)


def test_a_run_without_a_configuration_is_a_group_of_its_own(store):
    for name in ("first", "second"):
        run = MlflowClient(store).create_run(
            MlflowClient(store).get_experiment_by_name("single").experiment_id, run_name=name, tags={"stage": "ppo"}
        )
        MlflowClient(store).set_terminated(run.info.run_id)
    groups, differing = group_runs(read_experiment("single", [], store))
    assert [group.label for group in groups] == ["alone", "first", "second"]
    assert differing == {}


def test_samples_are_the_axis_only_if_every_run_counts_them(store):
    counting = read_experiment("sweep", [], store)
    assert all_count_samples(counting)
    assert not all_count_samples([*counting, *read_experiment("equal-kl", [], store)])


def _row(prompt, policy, baseline, judge="gold_score", text="a"):
    return {
        "prompt": prompt,
        "policy_completion": text,
        "baseline_completion": "b",
        f"policy_{judge}": policy,
        f"baseline_{judge}": baseline,
    }


def _evaluations(store, name, *row_lists, tags=({}, {})):
    for number, (rows, own) in enumerate(zip(row_lists, tags, strict=False)):
        run = log_ppo_run(store, name, _line(2, 1), {"lam": number / 10})
        log_evaluation(store, name, run, rows, evaluation_metrics(), tags=own)
    return {run.options["lam"]: run.evaluation for run in read_experiment(name, [], store)}


def test_win_rates_by_hand(store):
    """On the common prompts p, q, r and s, the first policy wins twice, ties once and loses once: 2.5 of 4."""
    first = [_row(p, s, 0.0) for p, s in zip("pqrsx", [1.0, 2.0, 3.0, 0.0, 9.0], strict=True)]
    second = [_row(p, s, 5.0) for p, s in zip("srqpy", [1.0, 3.0, 1.0, 0.0, 9.0], strict=True)]
    (matrix,) = win_matrices(_evaluations(store, "by-hand", first, second))
    assert (matrix.judge, matrix.num_prompts) == ("gold_score", 5)
    assert matrix.cells[0][0] is None
    assert matrix.cells[1][1] is None
    share, low, high = matrix.cells[0][1]
    assert share == 0.625
    assert low < share < high
    assert matrix.cells[1][0][0] == 0.375
    assert matrix.cells[0][2][0] == 0.9, "the baseline is beaten on four of five and tied on one"
    assert matrix.cells[1][2][0] == 0.2


def test_samples_of_a_prompt_are_one_prompt(store):
    """One prompt is won in one of two samples, the other in all: 0.75. A missing score is no loss."""
    first = [_row("p", 2.0, 0), _row("p", 0.0, 0), _row("q", 3.0, 0), _row("q", None, 0)]
    second = [_row("p", 1.0, 0), _row("p", 1.0, 0), _row("q", 1.0, 0), _row("q", 1.0, 0)]
    (matrix,) = win_matrices(_evaluations(store, "samples", first, second))
    assert matrix.cells[0][1][0] == 0.75


def test_policies_without_common_prompts_or_scores_are_not_compared(store):
    (matrix,) = win_matrices(_evaluations(store, "disjoint", [_row("p", 1, 0)], [_row("q", None, 0)]))
    assert matrix.cells[0][1] is None
    assert matrix.cells[1][2] is None


def test_scores_of_different_reward_models_are_not_compared(store):
    rows = [_row("p", 1, 0, judge="reward_model"), _row("q", 1, 0, judge="reward_model")]
    tags = ({"lineage.reward_model": "a"}, {"lineage.reward_model": "b"})
    (matrix,) = win_matrices(_evaluations(store, "two-judges", rows, rows, tags=tags))
    assert matrix.cells[0][1] is None
    assert matrix.cells[0][2][0] == 1.0, "against the own baseline they do"


def test_held_out_judges_come_first(store):
    evaluations = {run.name: run.evaluation for run in read_experiment("sweep", [], store)}
    assert [matrix.judge for matrix in win_matrices(evaluations)] == ["gold_score", "reward_model"]


def test_the_latest_finished_evaluation_counts(store):
    run = log_ppo_run(store, "latest", _line(2, 1), {})
    log_evaluation(store, "latest", run, [_row("old", 1, 0)], {})
    log_evaluation(store, "latest", run, [_row("new", 1, 0)], {})
    (read,) = read_experiment("latest", [], store)
    assert [row["prompt"] for row in read.evaluation.rows] == ["new"]


def test_answers_side_by_side(store):
    chat = [{"role": "user", "content": "hello"}]
    first = [_row("p", 1, 0, text="1p"), _row(chat, 1, 0, text="1c"), _row("only first", 1, 0)]
    second = [_row(chat, None, 0, text="2c"), _row("p", 3, 0, text="2p")]
    shown = shared_answers(_evaluations(store, "answers", first, second), 4)
    assert [prompt for prompt, _ in shown] == ["p", chat], "of three, two have both answers"
    assert [(answer.name, answer.text) for answer in shown[1][1]] == [("baseline", "b"), (0.0, "1c"), (0.1, "2c")]
    assert shown[1][1][2].scores == {"gold_score": None}


def test_baselines_that_differ_are_told_apart(store):
    first, second = [_row("p", 1, 0)], [_row("p", 1, 0) | {"baseline_completion": "another"}]
    ((_, answers),) = shared_answers(_evaluations(store, "two-baselines", first, second), 4)
    assert [answer.name for answer in answers] == ["baseline of 0.0", "baseline of 0.1", 0.0, 0.1]
