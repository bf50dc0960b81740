"""The guards: a skipped step changes no bit, a rollback continues from its checkpoint, and a limit ends the run."""

import json
import logging

import pytest
import tiny
import torch
from faults import explode, poison, rates_of, samplings_of, snapshots_of, still_steps
from tolerances import EXACT, assert_close
from transformers import TrainerCallback

from rlhf_recipes.durability.checkpoints import (
    abandon,
    checkpoints_by_age,
    find_defect,
    has_files,
    is_abandoned,
    last_checkpoint,
    publish,
)
from rlhf_recipes.tracking.callback import RunCallback
from rlhf_recipes.tracking.description import Description
from rlhf_recipes.trainers.guard import TrainingGuard
from rlhf_recipes.trainers.rollback import DivergedError, RollbackError

pytestmark = pytest.mark.tiny

PEFT = [pytest.param(False, id="full"), pytest.param(True, id="lora")]
CHECKPOINTS = {"save_strategy": "steps", "save_steps": 4, "max_steps": 12}
SMALL = {"per_device_train_batch_size": 2}


def _trainer(directory, peft=False, **kwargs):
    return tiny.ppo_trainer(directory, peft=tiny.lora() if peft else None, **{"max_steps": 8, **kwargs})


@pytest.mark.parametrize("peft", PEFT)
def test_a_step_that_is_not_finite_leaves_everything_as_it_was(tmp_path, peft, caplog):
    trainer = _trainer(tmp_path, peft)
    snapshots = snapshots_of(trainer)
    poison(trainer, {3: 1, 6: 1})
    trainer.train()
    assert still_steps(snapshots) == [3, 6]
    assert tiny.logged(trainer, "guard/skipped_steps") == {1: 0, 2: 0, 3: 1, 4: 1, 5: 1, 6: 2, 7: 2, 8: 2}
    assert trainer.state.global_step == 8
    assert [m for m in caplog.messages if "not finite" in m] == [
        f"Step {step}: the loss or its gradient is not finite: the step is left out (1 in a row, `max_skipped_steps` "
        "is 3)."
        for step in (3, 6)
    ]


def test_one_infinite_micro_batch_of_a_step_is_enough(tmp_path):
    trainer = _trainer(tmp_path, steps_per_generation=4, gradient_accumulation_steps=2, **SMALL)
    snapshots = snapshots_of(trainer)
    poison(trainer, {3: 1}, value=float("inf"))
    trainer.train()
    assert still_steps(snapshots) == [3]


def test_the_schedule_goes_on_over_a_skipped_step(tmp_path):
    plain, skipping = _trainer(tmp_path / "a"), _trainer(tmp_path / "b")
    rates = rates_of(plain), rates_of(skipping)
    poison(skipping, {3: 1})
    plain.train()
    skipping.train()
    assert rates[0] == rates[1]
    assert len({rate for _, rate, _ in rates[0]}) == 8


@pytest.mark.parametrize("peft", PEFT)
def test_three_in_a_row_go_back_to_the_checkpoint_with_half_the_rate(tmp_path, peft, caplog):
    trainer = _trainer(tmp_path, peft, kl_controller="adaptive", kl_horizon=64, **CHECKPOINTS)
    rates, snapshots = rates_of(trainer), snapshots_of(trainer)
    poison(trainer, {9: 1, 10: 1, 11: 1})
    trainer.train()
    steps = [step for step, _, _ in rates]
    assert steps == [*range(1, 11), *range(9, 13)], "the step that was the third has got no optimiser step"
    by_step = {step: (policy, head) for step, policy, head in rates[-4:]}
    for step, policy, head in rates[:10]:
        assert head == pytest.approx(10 * policy)
        if step in by_step:
            assert by_step[step] == (policy / 2, head / 2)
    assert by_step[12][0] == pytest.approx(0.5 * trainer.args.learning_rate * (12 - 11) / 12)
    assert tiny.logged(trainer, "learning_rate")[9] == by_step[9][0]
    assert not still_steps(snapshots)
    assert trainer.state.global_step == 12
    assert tiny.logged(trainer, "guard/rollbacks") == {step: float(step > 8) for step in range(1, 13)}
    assert tiny.logged(trainer, "guard/skipped_steps")[12] == 3
    (line,) = [m for m in caplog.messages if "Going back" in m]
    assert line == (
        f"Step 11: the loss or its gradient is not finite, 3 steps in a row. Going back to {tmp_path}/checkpoint-8 "
        "with 0.5 of the learning rate (rollback 1 of 3)."
    )
    # There were three rollouts, and one of them was sampled twice. The statistics count three.
    weight = trainer.reward_normalizer.state_dict()["weight"]
    assert weight == pytest.approx(1 - trainer.args.reward_norm_decay**3)


def test_going_back_twice_halves_twice_and_samples_otherwise(tmp_path):
    trainer = _trainer(tmp_path, **CHECKPOINTS, lr_scheduler_type="constant", rollback_learning_rate_factor=0.1)
    rates, rollouts = rates_of(trainer), samplings_of(trainer)
    poison(trainer, {5: 2, 6: 2, 7: 2})
    trainer.train()
    assert [rate for step, rate, _ in rates if step == 5] == pytest.approx([1e-3, 1e-4, 1e-5])
    assert trainer.optimizer.param_groups[0]["initial_lr"] == pytest.approx(1e-5)
    assert sorted(trainer.lr_scheduler.base_lrs) == pytest.approx([1e-5, 1e-5, 1e-4, 1e-4])
    first, second, third = (
        dict(zip(map(str, prompts), ids, strict=True)) for step, prompts, ids in rollouts if step == 4
    )
    assert first.keys() == second.keys() == third.keys()
    assert first != second != third != first
    state = json.loads((tmp_path / "checkpoint-12" / "ppo_state.json").read_text())["guard"]
    assert state["rollbacks"] == 2
    assert state["skipped_steps"] == 6
    assert state["learning_rate_factor"] == pytest.approx(0.01)


def test_a_resume_goes_on_with_the_lowered_rate_and_the_counts(tmp_path):
    first = _trainer(tmp_path, **CHECKPOINTS, lr_scheduler_type="constant")
    poison(first, {5: 1, 6: 1, 7: 1})
    first.train()
    options = {**CHECKPOINTS, "max_steps": 16, "lr_scheduler_type": "constant"}
    second = _trainer(tmp_path, **options)
    rates = rates_of(second)
    poison(second, {13: 1, 14: 1, 15: 1})
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert dict((step, rate) for step, rate, _ in rates[:6])[9] == pytest.approx(5e-4)
    assert dict((step, rate) for step, rate, _ in rates[6:])[13] == pytest.approx(2.5e-4)
    assert second.guard.rollback.count == 2
    assert second.guard.skipped_steps == 6


def test_a_retry_from_within_a_rollout_samples_another(tmp_path):
    """The rollout in the checkpoint may be the cause. A checkpoint after the first bad step is not good."""
    trainer = _trainer(tmp_path, **{**CHECKPOINTS, "save_steps": 1})
    rates, rollouts = rates_of(trainer), samplings_of(trainer)
    poison(trainer, {6: 1, 7: 1, 8: 1})
    trainer.train()
    assert [step for step, _, _ in rates] == [*range(1, 8), *range(6, 13)]
    assert [step for step, *_ in rollouts] == [0, 4, 5, 8]


def test_evaluations_go_on_after_a_rollback(tmp_path):
    trainer = _trainer(
        tmp_path,
        **CHECKPOINTS,
        eval_data=tiny.prompts(),
        eval_strategy="steps",
        eval_steps=4,
        per_device_eval_batch_size=4,
    )
    poison(trainer, {5: 1, 6: 1, 7: 1})
    trainer.train()
    assert list(tiny.logged(trainer, "eval_win_rate")) == [0, 4, 8, 12]
    assert tiny.logged(trainer, "eval_prompts")[12] == 8


def test_without_a_checkpoint_the_run_ends_with_what_to_change(tmp_path):
    trainer = _trainer(tmp_path)
    poison(trainer, {1: 1, 2: 1, 3: 1})
    message = r"Step 3: .*no checkpoint from before that .*lower `save_steps` .*is 4 steps.* Lower `learning_rate`"
    with pytest.raises(DivergedError, match=message):
        trainer.train()


def test_a_checkpoint_of_an_earlier_run_is_none_of_this_one(tmp_path):
    _trainer(tmp_path, **CHECKPOINTS).train()
    trainer = _trainer(tmp_path)
    poison(trainer, {6: 1, 7: 1, 8: 1})
    with pytest.raises(DivergedError, match="Step 8: .* no checkpoint from before that"):
        trainer.train()


def test_the_checkpoint_that_a_run_resumes_from_may_be_gone_back_to(tmp_path):
    _trainer(tmp_path, **CHECKPOINTS).train()
    trainer = _trainer(tmp_path / "other", **CHECKPOINTS)
    poison(trainer, {9: 1, 10: 1, 11: 1})
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert trainer.guard.rollback.count == 1
    assert trainer.state.global_step == 12


@pytest.mark.parametrize("limit", [0, 2])
def test_a_run_goes_back_no_more_often_than_it_may(tmp_path, limit):
    trainer = _trainer(tmp_path, **CHECKPOINTS, max_rollbacks=limit)
    poison(trainer, {5: 9, 6: 9, 7: 9})
    message = f"has gone back to a checkpoint {limit} times, .*`max_rollbacks`.* {0.5**limit:g} of the learning rate"
    with pytest.raises(DivergedError, match=message):
        trainer.train()
    assert trainer.guard.skipped_steps == 3 * (limit + 1)


def test_a_skipped_step_between_good_ones_does_not_add_up(tmp_path):
    trainer = _trainer(tmp_path, max_skipped_steps=2)
    poison(trainer, {1: 1, 3: 1, 5: 1, 7: 1})
    trainer.train()
    assert trainer.guard.skipped_steps == 4


def test_a_policy_that_answers_no_number_does_not_poison_what_is_kept(tmp_path):
    """Whitening spreads one NaN among the logits of a rollout to every advantage. It must spread no further."""
    trainer = _trainer(
        tmp_path, **CHECKPOINTS, kl_controller="adaptive", kl_horizon=64, max_completion_length=6, max_skipped_steps=4
    )
    reference_logps, generate, seen = trainer._reference_logps, trainer._generate_and_score_completions, []

    def poisoned(batch):
        logps = reference_logps(batch)
        if trainer.state.global_step == 4 and not seen:
            batch["completion_mask"][0, 0], logps[0, 0] = 1, float("nan")
            seen.append(trainer.kl_controller.kl_coef)
        return logps

    def watched(inputs):
        batch = generate(inputs)
        if len(seen) == 1:
            seen.append(trainer.kl_controller.kl_coef)
            assert batch["advantages"].isnan().any()
        return batch

    trainer._reference_logps, trainer._generate_and_score_completions = poisoned, watched
    trainer.train()
    assert seen[0] == seen[1], "the controller takes no KL that is no number"
    assert trainer.guard.rollback.count == 1
    states = [trainer.reward_normalizer.state_dict(), trainer.kl_controller.state_dict()]
    assert all(torch.tensor(list(state.values())).isfinite().all() for state in states)
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    assert trainer.state.global_step == 12


@pytest.mark.parametrize("peft", PEFT)
def test_a_kl_out_of_hand_goes_back_before_the_policy_that_has_it(tmp_path, peft, caplog):
    """The checkpoint of the same step holds the policy that sampled the rollout."""
    trainer = _trainer(tmp_path, peft, **CHECKPOINTS, max_kl=15.0)
    rates = rates_of(trainer)
    explode(trainer, step=8)
    trainer.train()
    assert [step for step, _, _ in rates] == [*range(1, 9), *range(5, 13)]
    assert trainer.guard.rollback.count == 1
    assert max(tiny.logged(trainer, "objective/kl").values()) < 15
    (line,) = [m for m in caplog.messages if "Going back" in m]
    assert line.startswith("Step 8: the KL to the reference is ")
    assert f"over `max_kl` (15). Going back to {tmp_path}/checkpoint-4 with 0.5" in line


class _Interrupt(TrainerCallback):
    """End the run at the first step after a rollback."""

    def __init__(self, guard):
        self._guard = guard

    def on_step_begin(self, args, state, control, **kwargs):
        if self._guard.rollback.count:
            raise KeyboardInterrupt


@pytest.mark.parametrize("resumed", [False, True], ids=["its own", "of the run that it resumes"])
def test_a_run_killed_after_going_back_is_not_taken_up_from_what_it_went_back_from(tmp_path, resumed, caplog):
    """The checkpoint of step 8 holds the policy with too large a KL. It is the latest until step 8 comes again."""
    options = {**CHECKPOINTS, "max_kl": 15.0, "lr_scheduler_type": "constant"}
    stranger = tmp_path / "checkpoint-99"  # another run's
    stranger.mkdir()
    if resumed:
        _trainer(tmp_path, **{**options, "max_steps": 8}).train()
    trainer = _trainer(tmp_path, **options)
    explode(trainer, step=8)
    trainer.add_callback(_Interrupt(trainer.guard))
    with pytest.raises(KeyboardInterrupt):
        trainer.train(resume_from_checkpoint=resumed)
    assert find_defect(tmp_path / "checkpoint-8") is None, "whoever wants it has it"
    assert f"{tmp_path}/checkpoint-8 stays for a look" in caplog.text
    assert not is_abandoned(stranger)
    stranger.rmdir()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")

    trainer = _trainer(tmp_path, **options)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 12
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-12")
    assert not any(map(is_abandoned, checkpoints_by_age(tmp_path)))


def test_a_run_goes_back_to_nothing_that_it_went_back_from(tmp_path):
    guard = TrainingGuard(tiny.ppo_config(tmp_path, max_kl=1.0), is_main=True)
    (tmp_path / "staged" / "8").mkdir(parents=True)
    publish(tmp_path / "staged" / "8", tmp_path / "checkpoint-8")
    guard.rollback._saved_steps = {8}
    assert guard.rollback._last_good_checkpoint(12, has_files) == (8, str(tmp_path / "checkpoint-8"))
    abandon(tmp_path / "checkpoint-8", "the KL")
    with pytest.raises(DivergedError, match="no checkpoint from before that"):
        guard.roll_back(RollbackError("", "", 12))


def test_a_kl_out_of_hand_without_an_earlier_checkpoint_ends_the_run(tmp_path):
    trainer = _trainer(tmp_path, **CHECKPOINTS, max_kl=15.0)
    explode(trainer, step=4)
    with pytest.raises(DivergedError, match=r"Step 4: .* no checkpoint from before that .* raise `kl_coef`"):
        trainer.train()


def test_without_the_option_no_kl_is_too_large(tmp_path):
    trainer = _trainer(tmp_path, **CHECKPOINTS)
    explode(trainer, step=8)
    trainer.train()
    assert trainer.guard.rollback.count == 0


def _set_update_kl(trainer, kl_by_step):
    """Set the KL per token to the sampling policy at some optimiser steps, and to 0 at the others."""
    calls, observe = [], trainer.guard.observe_update

    def observed(weight, metrics):
        step = trainer.state.global_step + 1
        calls.append(step)
        kls = kl_by_step.get(step, [0.0])
        kl = kls[calls.count(step) - 1] if len(kls) > 1 else kls[0]
        observe(weight, {**metrics, "policy/approx_kl": weight * kl})

    trainer.guard.observe_update = observed
    return calls


@pytest.mark.parametrize("peft", PEFT)
def test_the_rest_of_a_rollout_is_left_out_beyond_the_update_kl(tmp_path, peft, caplog):
    """A rollout has four steps. The second step finds the policy too far away. The next rollout trains again."""
    trainer = _trainer(tmp_path, peft, max_update_kl=0.05)
    snapshots, rates = snapshots_of(trainer), rates_of(trainer)
    calls = _set_update_kl(trainer, {2: [0.051], 3: [0.9], 5: [0.0], 6: [0.049], 8: [0.06]})
    rollouts = samplings_of(trainer)
    trainer.train()
    assert still_steps(snapshots) == [2, 3, 4, 8]
    assert calls == [1, 2, 5, 6, 7, 8], "no forward for what is left out"
    assert [step for step, *_ in rollouts] == [0, 4]
    assert trainer._step == 8
    assert [rate for _, rate, _ in rates] == pytest.approx([1e-3 * (8 - step) / 8 for step in range(8)])
    assert tiny.logged(trainer, "guard/stopped_steps") == {1: 0, 2: 1, 3: 2, 4: 3, 5: 3, 6: 3, 7: 3, 8: 4}
    assert tiny.logged(trainer, "episode")[3] == 8
    assert len([m for m in caplog.messages if "`max_update_kl`" in m]) == 1


def test_figures_of_an_interrupted_step_are_not_counted(tmp_path):
    """A call of `train` ends after one of two micro-batches. An evaluation and the next call see their own tokens."""
    options = {"steps_per_generation": 2, "gradient_accumulation_steps": 2, "num_iterations": 1, **SMALL}
    trainer = _trainer(tmp_path, max_steps=1, **options)
    note, noted, logged, observed = trainer.note_update, [], [], []

    def interrupted(sums):
        note(sums)
        raise KeyboardInterrupt

    def counted(sums):
        noted.append(float(sums[""]))
        note(sums)

    trainer.note_update = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.note_update = counted
    trainer._log_counts = lambda count, names: logged.append(count)
    trainer.model.eval()
    trainer._compute_loss(trainer.model, trainer._buffered_inputs[0])
    assert logged == noted
    noted.clear()
    trainer.guard.observe_update = lambda count, means: observed.append(count)
    trainer.train()
    assert len(noted) == 2
    assert observed == noted


def test_no_half_optimiser_step_is_taken(tmp_path):
    options = {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "max_update_kl": 0.05, **SMALL}
    trainer = _trainer(tmp_path, **options)
    snapshots = snapshots_of(trainer)
    calls = _set_update_kl(trainer, {3: [0.0, 9.0]})
    trainer.train()
    assert still_steps(snapshots) == [3, 4]
    assert calls == [1, 1, 2, 2, 3, 3, 5, 5, 6, 6, 7, 7, 8, 8]


@pytest.mark.parametrize(
    ("weights", "kls", "stops"),
    [((1.5, 0.5), (0.06, 0.0), False), ((0.5, 1.5), (0.0, 0.07), True), ((0.4, 0.4), (0.06, 0.06), True)],
)
def test_the_update_kl_of_a_step_is_its_mean_over_tokens(tmp_path, weights, kls, stops):
    guard = TrainingGuard(tiny.ppo_config(tmp_path, max_update_kl=0.05), is_main=True)
    for weight, kl in zip(weights, kls, strict=True):
        guard.observe_update(weight, {"policy/approx_kl": weight * kl})
    guard.finish_step(torch.nn.Linear(1, 1), 1.0, 0)
    assert guard.has_stopped is stops


def test_the_update_kl_is_that_which_is_logged(tmp_path):
    """The limit is between the logged values of two steps. The first skipped step is the one beyond it."""
    plain = _trainer(tmp_path / "plain", max_steps=4, learning_rate=1e-2)
    plain.train()
    kl = tiny.logged(plain, "policy/approx_kl")
    assert kl[1] < kl[2] < kl[3]
    trainer = _trainer(tmp_path / "stopping", max_steps=4, learning_rate=1e-2, max_update_kl=(kl[2] + kl[3]) / 2)
    snapshots = snapshots_of(trainer)
    trainer.train()
    assert still_steps(snapshots) == [3, 4]


def test_a_rollout_that_has_stopped_stays_so_in_a_checkpoint():
    args = tiny.ppo_config("unused", max_update_kl=0.1)
    guard, restored = TrainingGuard(args, is_main=True), TrainingGuard(args, is_main=True)
    guard.observe_update(1.0, {"policy/approx_kl": 0.2})
    guard.finish_step(torch.nn.Linear(1, 1), 1.0, 0)
    restored.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert restored.has_stopped
    assert restored.metrics() == guard.metrics() != TrainingGuard(args, is_main=True).metrics()


@pytest.mark.parametrize(
    ("options", "place", "name"),
    [
        ({"max_update_kl": 0.1}, {"deepspeed": True}, "`max_update_kl` is not available with DeepSpeed"),
        ({"max_kl": 10.0}, {"deepspeed": True}, "`max_kl` is not available with DeepSpeed or FSDP"),
        ({"max_kl": 10.0}, {"fsdp": True}, "`max_kl` is not available with DeepSpeed or FSDP"),
    ],
)
def test_what_cannot_be_kept_is_refused(tmp_path, options, place, name):
    with pytest.raises(ValueError, match=name):
        TrainingGuard(tiny.ppo_config(tmp_path, **options), is_main=True, **place)


@pytest.mark.parametrize("place", [{"deepspeed": True}, {"fsdp": True}])
def test_where_a_run_cannot_go_back_it_ends_after_as_many_steps(tmp_path, place):
    guard = TrainingGuard(tiny.ppo_config(tmp_path), is_main=True, **place)
    for step in range(3):
        guard.observe_update(1.0, {"policy/approx_kl": float("nan")})
        if step < 2:
            guard.finish_step(torch.nn.Linear(1, 1), 1.0, step)
    with pytest.raises(RollbackError) as error:
        guard.finish_step(torch.nn.Linear(1, 1), 1.0, 2)
    with pytest.raises(DivergedError, match="does not go back by itself: resume it"):
        guard.roll_back(error.value)


def test_an_overflow_under_fp16_is_left_to_the_loss_scale(tmp_path):
    config = tiny.ppo_config(tmp_path)
    config.fp16 = True
    guard = TrainingGuard(config, is_main=True)
    guard.observe_update(1.0, {"policy/approx_kl": 0.0})
    guard.finish_step(torch.nn.Linear(1, 1), float("inf"), 0)
    assert guard.skipped_steps == 0


def test_a_run_without_trouble_trains_the_same_with_and_without_limits(tmp_path):
    plain = _trainer(tmp_path / "plain")
    plain.train()
    guarded = _trainer(tmp_path / "guarded", max_update_kl=1e3, max_kl=1e6, max_skipped_steps=1)
    guarded.train()
    for (_, actual), (_, expected) in zip(
        guarded.model.named_parameters(), plain.model.named_parameters(), strict=True
    ):
        assert_close(actual, expected, EXACT)


def _alarming(trainer):
    """Make the log show rising scores and growing answers."""
    report = trainer._report

    def reported(rollout, group_size):
        report(rollout, group_size)
        step = trainer.state.global_step
        trainer._metrics["train"]["objective/scores"] = [float(step)]
        trainer._metrics["train"]["completions/mean_length"] = [10.0 + step]

    trainer._report = reported


def test_an_alarm_is_raised_once_while_the_run_goes_on(tmp_path, caplog):
    options = {"num_iterations": 1, "steps_per_generation": 1, "save_strategy": "steps", "save_steps": 2}
    trainer = _trainer(tmp_path, max_steps=14, **options)
    _alarming(trainer)
    heard = []

    class Listener(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            heard.extend(state.global_step for m in caplog.messages if "answers grow" in m and not heard)

    trainer.add_callback(Listener())
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert heard == [8], "eight points are the fewest that an alarm needs"
    (alarm,) = [m for m in caplog.messages if "answers grow" in m]
    assert alarm.endswith(f"Read some completions: {tmp_path}/samples")


def test_the_tag_of_a_run_names_an_alarm_while_it_goes_on(tmp_path):
    tags = []
    trainer = _trainer(
        tmp_path, num_iterations=1, steps_per_generation=1, save_strategy="steps", save_steps=4, max_steps=12
    )

    class Store:
        def set_tags(self, new):
            tags.append((trainer.state.global_step, new["alarms"]))

        def log_metrics(self, metrics, step):
            pass

    callback = RunCallback(Store(), str(tmp_path), {"run_id": "run"}, Description("ppo"))
    trainer.args.logged_samples = 0
    trainer.add_callback(callback)
    _alarming(trainer)
    trainer.train()
    (begin, none), (step, alarm), *later = tags
    assert (begin, none) == (4, "none")
    assert step == 8
    assert "answers grow" in alarm
    assert [step for step, _ in later] == [12], "its figures have changed"
