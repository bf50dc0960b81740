"""The reaction to a signal, in one process. For real signals see `test_preemption_of_recipes.py`."""

import signal
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState

from rlhf_recipes.durability import preemption
from rlhf_recipes.durability.preemption import PreemptionCallback
from rlhf_recipes.durability.termination import ECHO_SECONDS, EXIT_CODE, STOPS, TerminatedError

ARGS = SimpleNamespace(device="cpu", output_dir="out")


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets, in seconds."""
    now = [100.0]
    monkeypatch.setattr(preemption.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(("later", "ends"), [(ECHO_SECONDS - 0.1, False), (ECHO_SECONDS + 0.1, True)])
def test_the_echo_of_a_launcher_is_no_second_signal(clock, later, ends):
    """A scheduler signals the launcher and its processes, and then the launcher signals its processes again."""
    callback = PreemptionCallback()
    callback._note(signal.SIGTERM, None)
    clock[0] += later
    if not ends:
        callback._note(signal.SIGTERM, None)
        return
    with pytest.raises(TerminatedError) as error:
        callback._note(signal.SIGTERM, None)
    assert error.value.code == 128 + signal.SIGTERM


def test_ctrl_c_is_answered_at_once_by_the_first_process(monkeypatch, capfd):
    monkeypatch.setenv("RANK", "1")
    PreemptionCallback()._note(signal.SIGINT, None)
    monkeypatch.setenv("RANK", "0")
    PreemptionCallback()._note(signal.SIGTERM, None)
    assert capfd.readouterr().err == ""
    PreemptionCallback()._note(signal.SIGINT, None)
    assert capfd.readouterr().err == preemption.INTERRUPTED.decode()


@pytest.fixture
def handlers():
    """Keep the signal handlers of pytest, and restore them."""
    before = {number: signal.getsignal(number) for number in STOPS}
    yield list(before.values())
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOPS)
def test_a_process_that_has_given_way_is_not_cut_short_by_the_next_signal(handlers, number):
    callback, control, state = PreemptionCallback(), TrainerControl(), TrainerState(is_world_process_zero=True)
    callback.on_train_begin(ARGS, state, control)
    signal.raise_signal(number)
    callback.on_step_end(ARGS, state, control)
    with pytest.raises(TerminatedError) as error:
        callback.on_train_end(ARGS, state, control)
    assert error.value.code == EXIT_CODE
    assert [signal.getsignal(n) for n in STOPS] == [signal.SIG_IGN] * len(STOPS)


def test_a_run_without_a_signal_ends_like_any_other(handlers):
    callback, control, state = PreemptionCallback(), TrainerControl(should_evaluate=True), TrainerState()
    callback.on_train_begin(ARGS, state, control)
    callback.on_step_end(ARGS, state, control)
    assert [signal.getsignal(n) for n in STOPS] == [callback._note] * len(STOPS)
    callback.on_train_end(ARGS, state, control)
    assert [signal.getsignal(n) for n in STOPS] == handlers
    assert not control.should_save
    assert not control.should_training_stop
    assert control.should_evaluate


@pytest.mark.parametrize("is_same", [False, True], ids=["another instance", "the same instance"])
@pytest.mark.parametrize("number", STOPS)
def test_a_training_that_goes_back_keeps_the_signal_and_puts_back_the_first_handlers(handlers, number, is_same):
    """A rollback leaves a training without its end. A signal may come in the step that failed, or later."""
    failed, state = PreemptionCallback(), TrainerState()
    failed.on_train_begin(ARGS, state, TrainerControl())
    callback = failed if is_same else PreemptionCallback()
    callback.on_train_begin(ARGS, state, TrainerControl())
    callback.on_train_end(ARGS, state, TrainerControl())
    assert [signal.getsignal(n) for n in STOPS] == handlers

    failed = PreemptionCallback()
    failed.on_train_begin(ARGS, state, TrainerControl())
    signal.raise_signal(number)
    callback, control = failed if is_same else PreemptionCallback(), TrainerControl()
    callback.on_train_begin(ARGS, state, control)
    callback.on_step_end(ARGS, state, control)
    assert control.should_training_stop
    assert control.should_save
    with pytest.raises(TerminatedError):
        callback.on_train_end(ARGS, state, control)
