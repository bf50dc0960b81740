"""PPO runs in a SQLite store are read, grouped and compared, and a winner is named only if the data shows one."""

import math
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
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

from rlhf_recipes.comparison.figures import compared_figures
from rlhf_recipes.comparison.groups import all_count_samples, group_runs, run_alarms
from rlhf_recipes.comparison.head_to_head import shared_answers, win_matrices
from rlhf_recipes.comparison.runs import Evaluation, TrackedRun, read_experiment
from rlhf_recipes.comparison.verdict import decide
from rlhf_recipes.evaluation.statistics import share_between

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
    verdict = decide(groups)
    assert {*verdict.frontier.best} == {"A", "B", "C"}
    assert min(verdict.frontier.best, key=lambda name: verdict.frontier.best[name].mean) == "C"
    assert [group.name for group in verdict.frontier.rows[-1].leaders] == ["A"]
    assert 7.5 < verdict.frontier.kl[-1] < 9, "what the run of the largest KL reaches"
    assert verdict.matrix.judge == "gold_score", "which trains no policy"
    assert "A (kl_coef 0.02) is ahead on held-out prompts, judged by gold_score" in verdict.headline
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
    verdict = decide(groups)
    assert verdict.headline == "One configuration, A (alone): its best score is 1.00 within a KL of 2.00 nats."
    assert (verdict.findings, verdict.missing, verdict.matrix) == ([], [], None)
    assert win_matrices({}) == []
    assert shared_answers({}, 4) == []


def test_scores_are_compared_within_every_kl(store):
    """B rises by 1.05 per nat and ends at 2 nats, A by 0.775 up to 4 nats: B leads until A passes its 2.1 at 2.7."""
    groups, _ = _experiment(
        store,
        "every-kl",
        ({"lam": 0.9}, _line(4, 3), {"seed": 0}),
        ({"lam": 0.9}, _line(4, 3.2), {"seed": 1}),
        ({"lam": 1.0}, _line(2, 2), {"seed": 0}),
        ({"lam": 1.0}, _line(2, 2.2), {"seed": 1}),
    )
    verdict = decide(groups)
    (b, a) = verdict.frontier.leads["B"], verdict.frontier.leads["A"]
    assert (round(b[0][1], 1), round(a[0][0], 1), a[0][1]) == (2.7, 2.7, 4.0)
    assert_close([verdict.frontier.best[name].mean for name in "AB"], [3.1, 2.1], FP64)
    assert verdict.findings[0].startswith(
        "By the score of the training, these groups lead within a KL (nats): B from 0.0"
    )
    assert verdict.headline == "No winner: no evaluation has compared answers to held-out prompts."
    assert verdict.missing == [
        "1 more seed of each of A, B",
        "evaluations of A0, A1, B0, B1 on the same prompts, with `rlhf evaluate`",
        "a judge that trains no policy: `--judge_functions` or `--judge_models` of `rlhf evaluate`",
    ]


def _run(rows, options, seed, curves):
    """Return a run as it is read from a store."""
    evaluation = Evaluation("e" * 32, "evaluation", {}, rows, "runs/rm") if rows else None
    history = {name: pd.Series(values, index=range(1, len(values) + 1)) for name, values in curves.items()}
    run_id = f"{options['lam']}-{seed}"
    options = {"reward_model_path": "runs/rm", **options}
    return TrackedRun(run_id, "ppo", "FINISHED", str(seed), options, {}, history, evaluation=evaluation)


def _judged(*groups, prompts=60, judge="gold_score", curves=None, more=()):
    """Decide between groups of runs. A group lists how much better each of its runs is than the baseline."""
    runs = []
    for number, advantages in enumerate(groups):
        for seed, advantage in enumerate(advantages):
            rows = [
                _row(row["prompt"], row[f"policy_{judge}"], row[f"baseline_{judge}"], judge)
                for row in evaluation_rows(10 * number + seed, advantage, prompts=prompts)
            ]
            runs.append(_run(rows, {"lam": number / 10}, seed, curves or _line(2, 1)))
    return decide(group_runs([*more, *runs])[0])


def test_a_winner_beats_each_other_group_over_seeds_and_prompts():
    verdict = _judged([2.0, 2.2, 1.9], [0.0, 0.1, -0.2], [0.3, 0.2, 0.4])
    assert verdict.headline.startswith(
        "Winner: A (lam 0.0). It beats every other group on held-out prompts, judged by gold_score: 0."
    )
    assert verdict.headline.endswith(" against C (lam 0.2), the closest of the others.")
    assert verdict.missing == []
    shares = [verdict.matrix.cell("A", rival) for rival in "BC"]
    assert all(0.5 < share.low < share.share < share.high and share.separates for share in shares)


def _ordered(*scores, prompts=120, judge="gold_score"):
    """Return three runs of each group. `scores` lists the scores of the groups on prompts 0, 1, 2 and so on."""
    return [
        _run([_row(str(n), scores[n % len(scores)][number], 0, judge) for n in range(prompts)], {"lam": number}, seed,
             _line(2, 1))
        for number in range(len(scores[0]))
        for seed in range(3)
    ]  # fmt: skip


def test_a_winner_need_not_have_the_highest_mean_share():
    """A beats B and C on 12 of 20 prompts each. B beats C on 19 of 20, so its mean share is higher."""
    verdict = decide(group_runs(_ordered(*[(3, 2, 1)] * 12, *[(1, 3, 2)] * 7, (1, 2, 3), prompts=240))[0])
    assert verdict.matrix.cell("B", "C").share > 0.9
    assert verdict.headline.startswith("Winner: A (lam 0). It beats every other group")


@pytest.mark.parametrize(("prompts", "seeds"), [(2, 2), (4, 2), (4, 3)])
def test_wins_on_all_of_few_prompts_name_no_winner(prompts, seeds):
    verdict = _judged([9.0] * seeds, [0.0] * seeds, prompts=prompts)
    share = verdict.matrix.cell("A", "B")
    assert share.share == 1.0
    assert share.low < 0.5
    assert verdict.headline.startswith("No winner: A (lam 0.0) is ahead")


def test_seeds_far_apart_name_no_winner_though_all_prompts_are_won():
    """Each run of A beats each run of B on all prompts. Yet the runs of one group differ as much as the groups."""
    share = _judged([30.0, 20.0], [10.0, 0.0]).matrix.cell("A", "B")
    assert share.share == 1.0
    assert share.low < 0.5


def test_held_out_judges_that_disagree_name_no_winner():
    first, second = _ordered((2, 1), judge="a"), _ordered((1, 2), judge="b")
    runs = []
    for run, other in zip(first, second, strict=True):
        rows = [row | more for row, more in zip(run.evaluation.rows, other.evaluation.rows, strict=True)]
        runs.append(replace(run, evaluation=replace(run.evaluation, rows=rows)))
    verdict = decide(group_runs(runs)[0])
    assert verdict.headline.startswith(
        "No winner: the held-out judges disagree. By a, A (lam 0) beats every other group; by b, B (lam 1) beats it: "
    )
    assert verdict.missing[0].startswith("a choice between a and b: ")


def test_a_judge_is_the_reward_of_a_run_by_its_path_not_by_its_name():
    """The first judge is the reward of PPO under another name. The second one has the name alone."""
    runs = _ordered((2, 1), judge="reward_modeling")
    judged = {"judge_paths": {"reward_modeling": "runs/p/reward_modeling/"}}
    trained = [
        replace(
            run,
            options=run.options | {"reward_model_path": "runs/p/reward_modeling"},
            evaluation=replace(run.evaluation, **judged),
        )
        for run in runs
    ]
    assert "the only judge, reward_modeling, trained the policies" in decide(group_runs(trained)[0]).headline
    free = [
        replace(run, options=run.options | {"reward_model_path": None, "reward_functions": ["rewards:length"]})
        for run in _ordered((2, 1), judge="reward_model")
    ]
    assert decide(group_runs(free)[0]).headline.startswith("Winner: A")
    unknown = [replace(run, options={}) for run in _ordered((2, 1), judge="reward_model")]
    assert "the only judge, reward_model, trained the policies" in decide(group_runs(unknown)[0]).headline


def test_a_run_that_does_not_count_is_no_seed_and_no_evaluation():
    """The third run of A has no numbers for score and KL, and that of B failed. Both were evaluated."""
    runs = _ordered((2, 1))
    runs[2] = replace(runs[2], curves={}, evaluation=replace(runs[2].evaluation, rows=[_row("other", 0, 9)]))
    runs[5] = replace(runs[5], status="FAILED", evaluation=replace(runs[5].evaluation, metrics={"policy/kl": 60.0}))
    groups = group_runs(runs)[0]
    verdict = decide(groups)
    assert "Not ranked: A2 (no numbers for score and KL), B2 (failed)." in verdict.caveats
    assert verdict.headline.startswith("Winner: A"), "on prompts that the run without numbers did not answer"
    known = [replace(run, evaluation=replace(run.evaluation, metrics={"policy/kl": 2.0})) for run in runs[:2]]
    (_, chart, *_) = compared_figures(group_runs([*known, *runs[3:]])[0], verdict)
    assert [trace["x"] for trace in chart["data"]] == [[2.0]], "not moved by the KL of the failed run"
    near = decide(group_runs([replace(run, evaluation=runs[0].evaluation) for run in runs])[0])
    assert near.missing[0] == "1 more seed of each of A, B"


def test_one_seed_never_names_a_winner():
    """A wins on all prompts. Only seeds are missing."""
    verdict = _judged([9.0], [0.0])
    assert verdict.headline == (
        "No winner: A (lam 0.0) is ahead on held-out prompts, judged by gold_score, but one seed does not show that "
        "it is better than B (lam 0.1): 1.00 [0.94, 1.00] over prompts only."
    )
    assert verdict.missing == ["2 more seeds of each of A, B"]


def test_one_seed_of_the_rival_names_no_winner_either():
    verdict = _judged([9.0, 9.1, 9.2], [0.0])
    assert verdict.headline.startswith("No winner: A (lam 0.0) is ahead")
    assert verdict.missing == ["2 more seeds of B"]


def test_a_group_that_is_not_beaten_is_in_question():
    verdict = _judged([1.5, 1.6, 1.7], [0.0, 0.1, 0.2], [1.4, 1.5, 1.6], [9.0])
    assert verdict.headline.startswith("No winner: D (lam 0.3) is ahead")
    assert verdict.headline.endswith("In question: A, B, C.")


@pytest.mark.parametrize(
    ("judge", "end"),
    [
        ("gold_score", "on held-out prompts, judged by gold_score."),
        ("reward_model", "but the only judge, reward_model, trained the policies."),
    ],
)
def test_groups_with_equal_shares_are_level(judge, end):
    """First, each of three wins and loses as often as the others. Then two answer alike, and C loses to both."""
    level = decide(group_runs(_ordered((3, 2, 1), (1, 3, 2), (2, 1, 3), judge=judge))[0])
    assert level.headline.startswith("No winner: A (lam 0) and B (lam 1) and C (lam 2) are level")
    assert level.headline.endswith(end)
    two = decide(group_runs(_ordered((2, 2, 1), judge=judge))[0])
    assert two.headline.startswith("No winner: A (lam 0) and B (lam 1) are level")
    assert two.headline.endswith(end)


def test_groups_of_one_label_stay_apart():
    """Runs without a recorded configuration are groups of their own, and may have one name."""
    runs = [_run([_row(p, lam, 0) for p in "pqr"], {"lam": lam}, 0, _line(2, 1)) for lam in (0, 1, 2)]
    verdict = decide(group_runs([replace(run, options={}) for run in runs])[0])
    assert verdict.headline.startswith("No winner: C (ppo) is ahead")


def test_what_makes_the_uncertainty_is_named():
    """Seeds that differ by 3 make most of it in the first case. In the second they agree on each of 12 prompts."""
    seeds = _judged([3.0, 0.0, 1.5], [0.4, 0.5, 0.6])
    assert seeds.missing == ["more seeds of A and B, which make most of the uncertainty between A and B"]
    assert "but the interval over seeds and prompts does not show that it beats B" in seeds.headline
    rows = {0.0: [_row(str(n), (-1) ** (n % 3), 0) for n in range(12)], 0.1: [_row(str(n), 0, 0) for n in range(12)]}
    runs = [_run(own, {"lam": lam}, seed, _line(2, 1)) for lam, own in rows.items() for seed in range(3)]
    prompts = decide(group_runs(runs)[0])
    assert prompts.missing == ["more held-out prompts, which make most of the uncertainty between A and B"]


def test_a_judge_that_trained_the_policies_names_no_winner():
    verdict = _judged([9.0, 9.1, 9.2], [0.0, 0.1, 0.2], judge="reward_model")
    assert (
        verdict.headline == "No winner: A (lam 0.0) is ahead, but the only judge, reward_model, trained the policies."
    )
    assert "a judge that trains no policy" in verdict.missing[0]


def test_groups_whose_evaluations_share_nothing_have_no_winner():
    runs = [_run([_row(prompt, 1, 0)], {"lam": number}, 0, _line(2, 1)) for number, prompt in enumerate("pq")]
    verdict = decide(group_runs(runs)[0])
    assert verdict.headline == "No winner: no two groups have answered the same held-out prompts for the same judge."
    assert verdict.missing[0] == "2 more seeds of each of A, B"


def test_a_group_without_evaluation_is_missing():
    verdict = _judged([9.0, 9.1, 9.2], [0.0, 0.1, 0.2], more=[_run([], {"lam": 9.0}, 0, _line(2, 1))])
    assert verdict.headline.startswith("No winner: B (lam 0.0) is ahead")
    assert "but nothing compares it with A (lam 9.0)." in verdict.headline
    assert verdict.missing == [
        "2 more seeds of A",
        "evaluations of A on the same prompts, with `rlhf evaluate`",
    ]


def test_a_winner_with_alarms_is_no_plain_winner():
    suspicious = learning_curves(3, gain=3.0, rising_length=1.0)
    verdict = _judged([9.0, 9.1], [0.0, 0.1], curves=suspicious)
    assert verdict.headline.startswith("A (lam 0.0) beats every other group on held-out prompts")
    assert verdict.headline.endswith("But it raises alarms: read them first.")


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
    verdict = decide(groups)
    assert [*verdict.frontier.best] == ["A"]
    assert math.isnan(verdict.frontier.best["A"].low), "of the finished seed alone"
    assert "Not ranked: A1 (failed), B0 (no numbers for score and KL), B1 (killed)." in verdict.caveats
    assert run_alarms(groups[1].runs[0]) == ["The score is not a number at 40 of 40 steps, first at step 1."]


def test_nothing_to_rank(store):
    groups, _ = _experiment(store, "crashes", ({}, _line(2, 1), {"status": "FAILED"}))
    verdict = decide(groups)
    assert "nothing to rank" in verdict.headline
    assert (verdict.frontier, verdict.matrices) == (None, [])


def test_a_running_run_counts_and_is_named(store):
    groups, _ = _experiment(store, "running", ({}, _line(2, 1), {"status": "RUNNING"}))
    verdict = decide(groups)
    assert verdict.frontier.best
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
    verdict = decide(groups)
    assert any("different rewards" in caveat for caveat in verdict.caveats)
    assert verdict.frontier is None
    assert groups[0].runs[0].lineage == {"reward model": "aaaaaaaa"}, "a run that is gone keeps its short id"


def test_lineage_names_the_runs(store):
    source = log_ppo_run(store, "sources", {}, {}, name="my reward model")
    groups, _ = _experiment(store, "descendants", ({}, _line(2, 1), {"tags": {"lineage.reward_model": source}}))
    assert groups[0].runs[0].lineage == {"reward model": f"my reward model ({source[:8]})"}


def test_a_run_that_hardly_moves_limits_nothing(store):
    moving = [({"lr": 0.1}, _line(4, 3), {}), ({"lr": 0.2}, _line(5, 3), {})]
    groups, _ = _experiment(store, "still", *moving, ({"lr": 0.0}, _line(0.1, 0), {}))
    ours, without = decide(groups).frontier, decide(groups[:2]).frontier
    assert [(row.kl, [group.name for group in row.leaders]) for row in ours.rows] == [
        (row.kl, [group.name for group in row.leaders]) for row in without.rows
    ]
    assert ours.leads["C"] == []


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
    assert not all_count_samples([*counting, *read_experiment("every-kl", [], store)])


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


def _alone(evaluations):
    """Make each evaluation a group."""
    return {name: [evaluation] for name, evaluation in evaluations.items()}


def test_win_rates_by_hand(store):
    """On the common prompts p, q, r and s, the first policy wins twice, ties once and loses once: 2.5 of 4."""
    first = [_row(p, s, 0.0) for p, s in zip("pqrsx", [1.0, 2.0, 3.0, 0.0, 9.0], strict=True)]
    second = [_row(p, s, 5.0) for p, s in zip("srqpy", [1.0, 3.0, 1.0, 0.0, 9.0], strict=True)]
    (matrix,) = win_matrices(_alone(_evaluations(store, "by-hand", first, second)))
    assert (matrix.judge, matrix.num_prompts) == ("gold_score", 5)
    assert matrix.cells[0][0] is None
    assert matrix.cells[1][1] is None
    against = matrix.cells[0][1]
    assert against.share == 0.625
    assert against.low < against.share < against.high
    assert not against.separates, "one run each"
    assert matrix.cells[1][0].share == 0.375
    assert matrix.cells[0][2].share == 0.9, "the baseline is beaten on four of five and tied on one"
    assert matrix.cells[1][2].share == 0.2


def test_samples_of_a_prompt_are_one_prompt(store):
    """One prompt is won in one of two samples, the other in all: 0.75. A missing score is no loss."""
    first = [_row("p", 2.0, 0), _row("p", 0.0, 0), _row("q", 3.0, 0), _row("q", None, 0)]
    second = [_row("p", 1.0, 0), _row("p", 1.0, 0), _row("q", 1.0, 0), _row("q", 1.0, 0)]
    (matrix,) = win_matrices(_alone(_evaluations(store, "samples", first, second)))
    assert matrix.cells[0][1].share == 0.75


def test_win_rates_of_groups_are_means_over_all_pairs_of_runs():
    """Three runs against two on the prompts p and q. Run 0 has no score for r, so r does not count."""
    first = [[_row(p, s, 0) for p, s in zip("pqr", row, strict=True)] for row in ([1, 0, None], [3, 3, 9], [2, 1, 9])]
    second = [[_row(p, s, 0) for p, s in zip("pqr", row, strict=True)] for row in ([2, 1, 0], [0, 0, 0])]
    groups = {"A": first, "B": second}
    (matrix,) = win_matrices(
        {name: [Evaluation("", "", {}, rows, "") for rows in runs] for name, runs in groups.items()}
    )
    wins = np.array([[[0, 0], [1, 0.5]], [[1, 1], [1, 1]], [[0.5, 0.5], [1, 1]]])
    scores = np.array([[1, 0], [3, 3], [2, 1], [2, 1], [0, 0]])
    expected = share_between((np.sign(scores[:, None] - scores) + 1) / 2, 3)
    found = matrix.cell("A", "B")
    assert_close([found.share, *found.sources], [wins.mean(), *expected.shares], FP64)
    assert_close([found.low, found.high], [max(expected.low, 0), min(expected.high, 1)], FP64)
    assert_close(matrix.over_baseline("A").share, np.mean([[1, 0.5], [1, 1], [1, 1]]), FP64)
    assert len(matrix.over_baseline("A").sources) == 2, "runs and prompts"


def test_policies_without_common_prompts_or_scores_are_not_compared(store):
    (matrix,) = win_matrices(_alone(_evaluations(store, "disjoint", [_row("p", 1, 0)], [_row("q", None, 0)])))
    assert matrix.cells[0][1] is None
    assert matrix.cells[1][2] is None


def test_scores_of_different_reward_models_are_not_compared(store):
    rows = [_row("p", 1, 0, judge="reward_model"), _row("q", 1, 0, judge="reward_model")]
    tags = ({"lineage.reward_model": "a"}, {"lineage.reward_model": "b"})
    (matrix,) = win_matrices(_alone(_evaluations(store, "two-judges", rows, rows, tags=tags)))
    assert matrix.cells[0][1] is None
    assert matrix.cells[0][2].share == 1.0, "against the own baseline they do"


def test_held_out_judges_come_first(store):
    evaluations = {run.name: run.evaluation for run in read_experiment("sweep", [], store)}
    assert [matrix.judge for matrix in win_matrices(_alone(evaluations))] == ["gold_score", "reward_model"]


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
