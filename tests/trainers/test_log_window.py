"""A logged figure is the mean over all tokens or completions since the latest log, computed here from each of them."""

import math

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import FP32, SPLIT, assert_close

from rlhf_recipes.trainers import ppo
from rlhf_recipes.trainers.update import COUNT_OF, weigh_means

pytestmark = pytest.mark.tiny

FIGURES = ("policy/approx_kl", "policy/clip_fraction", "loss/value", "val/clip_fraction")
RUN = {"max_steps": 11, "learning_rate": 1e-2, "cliprange_value": 0.02, "epsilon": 0.02}
numbers = st.floats(-1e3, 1e3) | st.just(math.nan)
windows = st.lists(st.lists(numbers, max_size=5), min_size=1, max_size=6)


@given(windows)
def test_a_mean_of_means_with_their_counts_is_the_mean_over_all(rows):
    """Each inner list is a micro-batch, which may be empty; one that is not a number counts for nothing."""
    rows = [[x for x in row if not math.isnan(x)] if not all(map(math.isnan, row)) else row[:1] for row in rows]
    means = [sum(row) / len(row) if row else 0.0 for row in rows]
    metrics = {"figure": means, f"{COUNT_OF}figure": [float(len(row)) for row in rows], "other": [1.0, 2.0]}
    weigh_means(metrics)
    every = [x for row in rows for x in row if not math.isnan(x)]
    (mean,) = metrics.pop("figure")
    assert metrics == {"other": [1.0, 2.0]}, "TRL averages it"
    if every:
        assert mean == pytest.approx(sum(every) / len(every))
    else:
        assert math.isnan(mean) or mean == 0


def test_a_checkpoint_without_counts_goes_on():
    metrics = {"figure": [9.0, 9.0, 1.0, 3.0], f"{COUNT_OF}figure": [1.0, 3.0]}
    weigh_means(metrics)
    assert metrics == {"figure": [2.5]}


@pytest.fixture
def micro_batches(monkeypatch):
    """Record the tokens of each micro-batch: mask, and figure by name."""
    seen, compute = [], ppo.critic_loss

    def recorded(batch, average, *, inside, cliprange):
        kept = [x.double() for x in (batch.values.detach(), batch.old_values, batch.returns)]
        moved = [x.double() for x in (batch.old_per_token_logps, batch.per_token_logps)]
        seen.append((batch.mask.bool(), inside, cliprange, *kept, *moved))
        return compute(batch, average, inside=inside, cliprange=cliprange)

    monkeypatch.setattr(ppo, "critic_loss", recorded)
    return seen


def _figures(mask, inside, cliprange, values, old_values, returns, old, new):
    """Return the figures of each token of a micro-batch by their definitions."""
    clipped = torch.minimum(torch.maximum(values, old_values - cliprange), old_values + cliprange)
    error = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2) / 2
    kl = (new - old).exp() - 1 - (new - old)
    named = (kl, 1 - inside, error, ((values - old_values).abs() > cliprange).double())
    return {name: figure[mask] for name, figure in zip(FIGURES, named, strict=True)}


def _check(trainer, micro_batches, per_step, *, first=0):
    """Compare each log with the tokens of its window. `per_step` is the number of micro-batches of a step."""
    steps = [entry for entry in trainer.state.log_history if "policy/approx_kl" in entry]
    assert steps
    assert not [name for entry in steps for name in entry if COUNT_OF in name]
    start = first
    for entry in steps:
        window = micro_batches[(start - first) * per_step : (entry["step"] - first) * per_step]
        tokens = [_figures(*batch) for batch in window]
        for name in FIGURES:
            direct = torch.cat([figures[name] for figures in tokens]).double().mean().item()
            assert_close(entry[name], direct, SPLIT)
        start = entry["step"]
    return steps


@pytest.mark.parametrize(
    ("logging_steps", "accumulation", "options"),
    [
        (1, 1, {}),
        (3, 1, {}),
        (5, 2, {"steps_per_generation": 4, "per_device_train_batch_size": 2}),
        (4, 2, {"loss_type": "dapo", "steps_per_generation": 4, "per_device_train_batch_size": 2}),
        (7, 1, {"logging_first_step": True}),
        (20, 1, {}),
    ],
)
def test_the_figures_of_an_update(tmp_path, micro_batches, logging_steps, accumulation, options):
    """Windows do not end with rollouts. The last one is logged with the summary of the run."""
    counts = {"logging_steps": logging_steps, "gradient_accumulation_steps": accumulation}
    trainer = tiny.ppo_trainer(tmp_path, **{**RUN, **counts, **options})
    trainer.train()
    steps = _check(trainer, micro_batches, accumulation)
    rows = [len(row[0]) for row in micro_batches]
    assert sum(rows) == len(rows) * trainer.args.per_device_train_batch_size
    assert len({int(row[0].sum()) for row in micro_batches}) > 1, "the micro-batches must differ in size"
    assert all(0 <= entry[name] <= 1 for entry in steps for name in FIGURES if name.endswith("fraction"))
    assert max(entry["val/clip_fraction"] for entry in steps) > 0.1


def test_a_run_that_resumes_inside_a_window(tmp_path, micro_batches):
    options = {**RUN, "logging_steps": 5, "save_strategy": "steps", "save_steps": 3}
    whole = tiny.ppo_trainer(tmp_path, **options)
    whole.train()
    _check(whole, micro_batches, 1)
    again = tiny.ppo_trainer(tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    for name in FIGURES:
        assert tiny.logged(again, name) == tiny.logged(whole, name)


def test_skipped_steps_have_no_figures(tmp_path, micro_batches):
    """The guard leaves out the rest of each rollout after the step that is too far away."""
    trainer = tiny.ppo_trainer(tmp_path, **{**RUN, "logging_steps": 4, "max_update_kl": 1e-5, "max_steps": 8})
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "policy/approx_kl" in entry]
    assert trainer.guard.stopped_steps > 0
    assert len(steps) == 2
    half = len(micro_batches) // 2
    assert half * 2 == len(micro_batches) < 8
    for entry, window in zip(steps, (micro_batches[:half], micro_batches[half:]), strict=True):
        tokens = torch.cat([_figures(*batch)["val/clip_fraction"] for batch in window])
        assert_close(entry["val/clip_fraction"], tokens.mean().item(), FP32)


def _score(completion_ids, **kwargs):
    return [None if sum(ids) % 3 == 0 else float(sum(ids) % 7) for ids in completion_ids]


def test_an_evaluation_with_a_smaller_last_batch(tmp_path):
    """Eight rows and three per batch: the last batch has two. A row without a score does not count."""
    trainer = tiny.ppo_trainer(tmp_path, rewards=_score, eval_data=tiny.prompts(), per_device_eval_batch_size=3)
    rows = []
    add = trainer.held_out.add
    trainer.held_out.add = lambda samples, *answers: (rows.extend(samples), add(samples, *answers))[1]
    trainer.evaluate()
    known = [row for row in rows if row["score"] is not None and math.isfinite(row["score"])]
    assert 0 < len(known) < len(rows) == 8
    direct = sum(row["score"] for row in known) / len(known)
    logged = next(entry for entry in trainer.state.log_history if "eval_objective/scores" in entry)
    assert logged["eval_objective/scores"] == pytest.approx(direct)
