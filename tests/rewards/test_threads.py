"""A request has an end in time, and its last moment changes nothing about its answer."""

import threading
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from rlhf_recipes.rewards import threads
from rlhf_recipes.rewards.calls import RewardCalls
from rlhf_recipes.rewards.threads import in_time


class _LateFuture(Future):
    """Is ready at the moment at which its reader gives up."""

    def result(self, timeout=None):
        if timeout is not None:
            super().result(20)
            raise TimeoutError
        return super().result()


@pytest.mark.parametrize("error", [RuntimeError("already released"), ValueError("not set"), OSError("not connected")])
def test_the_time_limit_is_told_when_the_connection_is_already_released(error):
    shut, end = [], threading.Event()

    def shutdown():
        shut.append(True)
        raise error

    def exchange(opened):
        opened.extend([SimpleNamespace(raw=SimpleNamespace(shutdown=shutdown))] * 2)
        end.wait(20)

    with pytest.raises(TimeoutError, match=r"no whole answer in 0\.2 s"):
        in_time(exchange, 0.2)
    assert shut == [True, True]
    end.set()


def test_an_answer_of_the_last_moment_is_taken(monkeypatch):
    monkeypatch.setattr(threads, "Future", _LateFuture)
    assert in_time(lambda opened: [1.0], 5) == [1.0]
    guarded = RewardCalls(timeout=5, retries=0).guard(lambda prompts, **kwargs: [1.0] * len(prompts), name="late")
    assert guarded(prompts=["a"], completions=["b"]) == [1.0]


def test_an_error_of_the_function_itself_is_passed_on():
    def refuse(opened):
        raise TimeoutError("of the function")

    with pytest.raises(TimeoutError, match="of the function"):
        in_time(refuse, 5)
