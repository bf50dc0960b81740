"""A run with reward functions that raise errors, hang, or return something invalid."""

import asyncio
import functools
import math
import threading
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tenacity
import tiny
import torch
from accelerate import PartialState
from processes import run_command, run_in_processes
from tolerances import EXACT, assert_close

from rlhf_recipes import PPOConfig
from rlhf_recipes.rewards.attempts import PermanentRewardError, RewardCallError, checked_rewards, retrying
from rlhf_recipes.rewards.calls import RewardCalls

pytestmark = pytest.mark.tiny

ROWS = {"prompts": ["a", "b", "c"], "completions": ["x", "yy", "zzz"]}
HUNG = """
import asyncio, sys, time
from rlhf_recipes.rewards.calls import RewardCalls

async def patient(**kwargs):
    time.sleep(600)  # blocks the loop, which no cancellation reaches

def hangs(**kwargs):
    time.sleep(600)

guard = RewardCalls(timeout=0.2, retries=0).guard
call = guard(hangs) if sys.argv[1] == "sync" else guard(patient).now
call(prompts=["a"])
"""


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """Skip the pauses between attempts, and record them."""
    made = []
    monkeypatch.setattr(tenacity.nap, "time", SimpleNamespace(sleep=made.append))
    return made


def _returns(value):
    def judge(**kwargs):
        return value

    return judge


GONE = ConnectionError("gone")


def _fails(times, error=GONE, then=(1.0, 2.0, 3.0)):
    """Return a function that fails in its first calls. Its `calls` counts them."""

    def flaky(prompts, log_metric=None, **kwargs):
        flaky.calls += 1
        if log_metric:
            log_metric("seen", flaky.calls)
        if flaky.calls <= times:
            raise error
        return list(then)[: len(prompts)]

    flaky.calls = 0
    return flaky


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (None, "it returned None instead of a list of 3 rewards"),
        (1.0, "it returned 1.0 instead of a list"),
        ([1.0, 2.0], "it returned 2 rewards for 3 completions"),
        ([1.0] * 4, "it returned 4 rewards for 3 completions"),
        ([1.0, "2.0", 3.0], "it returned '2.0' for completion 1, not a number"),
        ("abc", "it returned 'a' for completion 0"),
        ([1.0, 2.0, math.inf], "it returned inf for completion 2"),
        ([1.0, 1e39, 2.0], "it returned 1e+39 for completion 1"),  # infinite in float32
        (torch.zeros(3, 2), "it returned [0.0, 0.0] for completion 0"),
        (torch.tensor(1.0), "instead of a list of 3 rewards"),
        ([[1.0], 2.0, 3.0], "it returned [1.0] for completion 0"),
        ({"scores": [1.0] * 3}, "it returned {'scores': [1.0, 1.0, 1.0]} instead of a list of 3 rewards"),
        ({0: 0.5, 1: 0.5, 2: 0.5}, "it returned {0: 0.5, 1: 0.5, 2: 0.5} instead of a list of 3 rewards"),
        (pd.DataFrame([[1.0, 2.0, 3.0]]), "instead of a list of 3 rewards"),  # its iterator gives the columns
        ({1.0, 2.0, 3.0}, "it returned {1.0, 2.0, 3.0} instead of a list of 3 rewards"),  # a set has no order
        ({1.0: "a", 2.0: "b", 3.0: "c"}.keys(), "instead of a list of 3 rewards"),
        (b"abc", "instead of a list of 3 rewards"),
        ("123", "it returned '1' for completion 0"),
        (True, "it returned True instead of a list"),
        (np.zeros((3, 1)), "it returned [0.0] for completion 0"),
        (np.zeros((1, 3)), "it returned 1 rewards for 3 completions"),
        (torch.zeros(3, 1, requires_grad=True), "it returned [0.0] for completion 0"),
        ([1.0, 2.0, 3j], "it returned 3j for completion 2"),
    ],
)
def test_an_odd_answer_is_an_error_that_names_function_reason_and_option(answer, reason, pauses):
    with pytest.raises(RewardCallError) as error:
        RewardCalls(retries=2).guard(_returns(answer))(**ROWS)
    for part in ("`judge` failed 3 times", reason, "`reward_retries`", "`failed_rewards: mask`"):
        assert part in str(error.value)
    assert pauses == [1, 2]


@pytest.mark.parametrize(
    "answer",
    [
        [1, 2.0, True],
        (1.0, 2.0, 1.0),
        torch.tensor([1.0, 2.0, 1.0], requires_grad=True),
        torch.tensor([1.0, 2.0, 1.0], dtype=torch.bfloat16),
        [torch.tensor(1.0), torch.tensor([2.0]), np.float32(1.0)],
        np.array([1.0, 2.0, 1.0]),
        (float(x) for x in (1, 2, 1)),
        map(float, (1, 2, 1)),
        {"a": 1.0, "b": 2.0, "c": 1.0}.values(),
        pd.Series([1.0, 2.0, 1.0], index=["a", "b", "c"]),
        np.array([True, 2.0, True]),
    ],
    ids=lambda answer: type(answer).__name__,
)
def test_what_is_a_list_of_numbers_is_taken(answer):
    rewards = RewardCalls().guard(_returns(answer))(**ROWS)
    assert rewards == [1.0, 2.0, 1.0]
    assert {type(reward) for reward in rewards} == {float}


@pytest.mark.parametrize("nothing", [None, math.nan, np.nan, torch.tensor(math.nan)])
def test_nothing_to_say_is_no_error(nothing):
    rewards = RewardCalls(retries=0).guard(_returns([1.0, nothing, 3.0]))(**ROWS)
    assert str(rewards) == "[1.0, nan, 3.0]"


def test_a_function_that_recovers_is_tried_again(pauses, caplog):
    logged = []
    calls = RewardCalls(retries=4)
    flaky = _fails(3)
    assert calls.guard(flaky)(**ROWS, log_metric=lambda *entry: logged.append(entry)) == [1.0, 2.0, 3.0]
    assert pauses == [1, 2, 4]
    assert "`flaky`: attempt 1 of 5 failed: ConnectionError: gone (test_calls.py, line" in caplog.text
    assert logged == [("seen", 4)], "what a failed attempt has logged does not count"
    assert calls.settle() == {"flaky/failed_attempts": 3.0, "flaky/failed_calls": 0.0}
    assert calls.settle() == {"flaky/failed_attempts": 0.0, "flaky/failed_calls": 0.0}


def test_pauses_do_not_grow_for_ever(pauses):
    RewardCalls(retries=9).guard(_fails(9))(**ROWS)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]


@pytest.mark.parametrize("error", [NameError("name 'x' is not defined"), PermanentRewardError("never")])
def test_a_mistake_in_the_program_is_not_tried_again(error):
    flaky = _fails(1, error)
    with pytest.raises(RewardCallError, match=f"`flaky` failed at the first attempt: {type(error).__name__}"):
        RewardCalls().guard(flaky)(**ROWS)
    assert flaky.calls == 1


def test_a_call_that_hangs_is_given_up():
    release = threading.Event()

    def hangs(**kwargs):
        release.wait(60)

    start = time.monotonic()
    with pytest.raises(
        RewardCallError, match=r"failed 2 times: TimeoutError: no answer within 0.2 s \(`reward_timeout`"
    ):
        RewardCalls(timeout=0.2, retries=1).guard(hangs)(**ROWS)
    assert time.monotonic() - start < 10
    release.set()


def test_an_attempt_after_a_hung_one_does_not_wait_for_it():
    release, attempts = threading.Event(), []

    def hangs_once(prompts, **kwargs):
        attempts.append(len(attempts))
        if len(attempts) == 1:
            release.wait(60)
        return [2.0] * len(prompts)

    assert RewardCalls(timeout=1.0, retries=1).guard(hangs_once)(**ROWS) == [2.0] * 3
    assert attempts == [0, 1]
    release.set()


def test_a_timeout_of_the_functions_own_is_its_error():
    with pytest.raises(RewardCallError, match="TimeoutError: mine"):
        RewardCalls(retries=0).guard(_fails(1, TimeoutError("mine")))(**ROWS)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_hung_call_does_not_keep_the_process(kind, tmp_path):
    (tmp_path / "hung.py").write_text(HUNG)
    result = run_command(tmp_path / "hung.py", kind, directory=tmp_path)
    assert result.returncode == 1
    assert "no answer within 0.2 s" in result.stderr


def test_without_a_limit_a_function_runs_in_the_callers_thread():
    seen = {}

    def where(prompts, **kwargs):
        seen[threading.current_thread()] = True
        return [0.0] * len(prompts)

    RewardCalls(timeout=None).guard(where)(**ROWS)
    assert list(seen) == [threading.current_thread()]
    guarded = RewardCalls().guard(where)
    guarded(**ROWS)
    guarded(**ROWS)
    assert len(seen) == 2, "a function keeps its thread, and what is bound to it"


def test_what_works_in_the_main_thread_only_says_so():
    error = ValueError("signal only works in main thread of the main interpreter")
    with pytest.raises(RewardCallError, match="`reward_timeout: null` calls the function in the main thread"):
        RewardCalls(retries=0).guard(_fails(1, error))(**ROWS)


class _AsyncJudge:
    def __init__(self, value, barrier=None):
        self.value, self.barrier = value, barrier

    async def __call__(self, prompts, **kwargs):
        if self.barrier is not None:
            self.barrier.append(self.value)
            while len(self.barrier) < 2:
                await asyncio.sleep(0.01)
        return [self.value] * len(prompts)


def test_async_functions_run_at_once_and_keep_their_names(tmp_path):
    """Each function waits for the other one."""
    barrier = []
    first = _AsyncJudge(1.0, barrier)
    second = functools.partial(_AsyncJudge(2.0, barrier).__call__)
    trainer = tiny.ppo_trainer(tmp_path, rewards=[first, second, tiny.length_reward], reward_timeout=30.0)
    tiny.rollout(trainer)
    assert trainer.reward_func_names == ["_AsyncJudge", "__call__", "length_reward"]
    assert trainer._metrics["train"]["rewards/_AsyncJudge/mean"] == [1.0]
    assert trainer._metrics["train"]["rewards/__call__/mean"] == [2.0]
    assert trainer.scorers[0].function is first


def test_an_async_function_fails_like_any_other(pauses):
    calls = RewardCalls(timeout=0.2, retries=1)

    async def sleeps(**kwargs):
        await asyncio.sleep(60)

    async def wrong(**kwargs):
        return ["good"] * 3

    for function, reason in ((sleeps, "no answer within 0.2 s"), (wrong, "it returned 'good'")):
        with pytest.raises(RewardCallError, match=f"`{function.__name__}` failed 2 times: .*{reason}"):
            asyncio.run(calls.guard(function)(**ROWS))


def test_a_model_in_this_process_is_left_alone(tmp_path):
    tok = tiny.tokenizer()
    trainer = tiny.ppo_trainer(tmp_path, rewards=tiny.reward_model(tok), reward_tok=tok)
    (scorer,) = trainer.reward_funcs
    assert trainer.reward_calls.guard(scorer) is scorer
    module = torch.nn.Linear(1, 1)
    assert trainer.reward_calls.guard(module) is module


def test_a_failed_call_masks_its_own_function_only(tmp_path, caplog):
    flaky = _fails(2, then=[5.0] * 8)
    trainer = tiny.ppo_trainer(
        tmp_path, rewards=[tiny.length_reward, flaky], failed_rewards="mask", reward_retries=1, reward_norm=False
    )
    batch = tiny.rollout(trainer)
    lengths = trainer.rollout.own_scores["length_reward"]
    assert_close(trainer.rollout.scores, lengths, EXACT)
    assert batch["completion_mask"].any(dim=1).all()
    assert "Its 8 completions get no score (`failed_rewards: mask`)" in caplog.text
    metrics = trainer._metrics["train"]
    assert metrics["rewards/flaky/failed_calls"] == [1.0]
    assert metrics["rewards/flaky/failed_attempts"] == [2.0]
    assert metrics["objective/unscorable"] == [0.0]
    tiny.rollout(trainer)
    assert_close(trainer.rollout.scores, trainer.rollout.own_scores["length_reward"] + 5.0, EXACT)
    assert metrics["rewards/flaky/failed_calls"] == [1.0, 0.0]


def test_unscorable_completions_are_counted(tmp_path):
    trainer = tiny.ppo_trainer(tmp_path, rewards=_returns([1.0, None] * 4))
    tiny.rollout(trainer)
    assert trainer._metrics["train"]["objective/unscorable"] == [0.5]
    assert trainer.reward_normalizer.mean == 1.0


@pytest.mark.parametrize("rewards", [_fails(9), _returns([None] * 8)])
def test_a_rollout_without_any_score_ends_the_run(tmp_path, rewards):
    trainer = tiny.ppo_trainer(tmp_path, rewards=rewards, failed_rewards="mask", reward_retries=0)
    named = rf"None of the 8 completions of this rollout has a score: every reward function \(`{rewards.__name__}`\)"
    with pytest.raises(RewardCallError, match=named):
        trainer.train()


def test_a_function_that_keeps_failing_ends_the_run():
    calls = RewardCalls(retries=0, failed="mask")
    guarded = calls.guard(_fails(5))
    for _ in range(4):
        assert all(map(math.isnan, guarded(**ROWS)))
        assert calls.settle()["flaky/failed_calls"] == 1.0
    guarded(**ROWS)
    with pytest.raises(RewardCallError, match="`flaky` has failed in 5 batches in a row. .*ConnectionError: gone"):
        calls.settle()


def test_a_success_ends_the_row():
    calls = RewardCalls(retries=0, failed="mask")
    guarded = calls.guard(_fails(4))
    for _ in range(5):
        guarded(**ROWS)
        calls.settle()
    guarded.function = _fails(4)
    for _ in range(4):
        guarded(**ROWS)
        calls.settle()


def test_an_error_ends_the_training(tmp_path):
    trainer = tiny.ppo_trainer(tmp_path, rewards=_fails(9), reward_retries=1)
    with pytest.raises(RewardCallError, match="`flaky` failed 2 times: ConnectionError: gone"):
        trainer.train()


def _prefers_longer(prompts, completions_a, completions_b, **kwargs):
    raise ConnectionError("no judge today")


EVALUATION = {"eval_strategy": "steps", "eval_steps": 4, "max_steps": 4, "per_device_eval_batch_size": 8}


def test_a_judge_that_fails_leaves_a_gap(tmp_path):
    flaky = _fails(1, then=range(8))  # at step 0: nothing to compare with later
    trainer = tiny.ppo_trainer(
        tmp_path, eval_data=tiny.prompts(), judges={"first": _AsyncJudge(1.0), "second": flaky},
        pairwise_judges={"pairs": _prefers_longer}, failed_rewards="mask", reward_retries=0, **EVALUATION,
    )  # fmt: skip
    trainer.train()
    start, end = (entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert (start["eval_second/failed_calls"], end["eval_second/failed_calls"]) == (1.0, 0.0)
    assert end["eval_first/win_rate"] == 0.5
    assert math.isnan(end["eval_second/win_rate"])
    assert end["eval_second/policy"] == 3.5
    assert end["eval_pairs/failed_calls"] == 2.0, "asked in both orders"
    assert math.isnan(end["eval_pairs/win_rate"])


def test_a_judge_that_fails_ends_the_run(tmp_path):
    trainer = tiny.ppo_trainer(
        tmp_path, eval_data=tiny.prompts(), pairwise_judges={"pairs": _prefers_longer}, reward_retries=0, **EVALUATION
    )
    with pytest.raises(RewardCallError, match="`pairs` failed at the first attempt: ConnectionError: no judge today"):
        trainer.train()


@pytest.mark.parametrize(
    ("timeout", "retries", "seconds"), [(10.0, 0, 10), (10.0, 3, 4 * 10 + 7), (1.0, 8, 9 + 63 + 2 * 60)]
)
def test_the_longest_call_is_all_attempts_and_the_pauses_that_are_made(
    tmp_path, monkeypatch, timeout, retries, seconds
):
    pauses = []
    monkeypatch.setattr(tenacity.nap, "time", SimpleNamespace(sleep=pauses.append))

    def failing():
        raise ConnectionError

    with pytest.raises(ConnectionError):
        retrying(retries, lambda state: None)(failing)
    config = tiny.ppo_config(tmp_path, reward_timeout=timeout, reward_retries=retries)
    assert config.longest_call() == seconds == (1 + retries) * timeout + sum(pauses)


def test_without_a_limit_a_call_may_take_for_ever(tmp_path):
    assert tiny.ppo_config(tmp_path, reward_timeout=None).longest_call() == math.inf


def test_others_wait_long_enough_for_a_call(tmp_path, monkeypatch):
    options = {"reward_timeout": 600.0, "reward_retries": 2}
    tiny.ppo_config(tmp_path, **options)  # nobody waits
    monkeypatch.setattr(PPOConfig, "world_size", 2)
    tiny.ppo_config(tmp_path)
    with pytest.raises(ValueError, match="take 1803 s, and the other processes wait for 1800 s only"):
        tiny.ppo_config(tmp_path, **options)
    with pytest.raises(ValueError, match="lower these, or raise `ddp_timeout`"):
        tiny.ppo_config(tmp_path, **options, ddp_timeout=1803)
    tiny.ppo_config(tmp_path, **options, ddp_timeout=1804)
    tiny.ppo_config(tmp_path, reward_timeout=None)


def _on_one_rank_only(rank, world_size, failed):
    def judge(prompts, **kwargs):
        if rank == 1:
            raise ConnectionError(f"no judge for {rank}")
        return [1.0] * len(prompts)

    PartialState(cpu=True)  # as an accelerator does
    calls = RewardCalls(retries=0, failed=failed)
    rewards = calls.guard(judge)(**ROWS)
    try:
        return rewards, calls.settle()
    except RewardCallError as error:
        return str(error)


def _unreadable_on_one_rank_only(rank):
    """Use a scorer with a model, which has no guard: the steps of its answer do not rise on one rank."""

    class Model(torch.nn.Module):
        def forward(self, prompts, **kwargs):
            return [[(1, 1.0), (1 - rank, 1.0)][: rank + 1]] * len(prompts)

    calls = RewardCalls()
    try:
        return calls.readable(calls.guard(Model()))(**ROWS), calls.settle()
    except RewardCallError as error:
        return str(error)


def _both_on_one_rank_only(rank, world_size):
    return _on_one_rank_only(rank, world_size, "raise"), _unreadable_on_one_rank_only(rank)


@pytest.mark.distributed
def test_a_failure_of_one_rank_ends_all_with_the_same_message():
    (first, unread), (second, unread_there) = run_in_processes(_both_on_one_rank_only, 2)
    assert first == second
    assert unread == unread_there
    assert "`Model` failed at the first attempt on process 1: ValueError: it returned the end 0 for step 1" in unread
    assert "`judge` failed at the first attempt on process 1: ConnectionError: no judge for 1" in first


@pytest.mark.distributed
def test_a_failure_of_one_rank_masks_that_rank():
    metrics = {"judge/failed_attempts": 1.0, "judge/failed_calls": 1.0}
    (first, of_first), (second, of_second) = run_in_processes(_on_one_rank_only, 2, "mask")
    assert first == [1.0] * 3
    assert all(map(math.isnan, second))
    assert of_first == of_second == metrics


def test_checked_rewards_of_no_completions():
    assert checked_rewards([], 0) == []
