"""The queue between the requests to a server and its reward model: requests that wait are scored in one batch."""

import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, Queue
from threading import Thread
from typing import Any, NamedTuple

from rlhf_recipes.options.recipes import MAX_TOKENS
from rlhf_recipes.rewards.process import ProcessRewardModelScorer
from rlhf_recipes.rewards.scorer import RewardModelScorer

GATHER_SECONDS = 0.01  # time for related requests, for example those of several ranks, to arrive
logger = logging.getLogger(__name__)
Texts = dict[str, list[Any]]  # `prompts`, `completions` and `finished`, one of each per completion
Served = RewardModelScorer | ProcessRewardModelScorer


class UnscorableError(ValueError):
    """Report a request that the reward model cannot read."""


class Kind(NamedTuple):
    """Say how the numbers of one kind are made.

    Args:
        read: Function of `Texts` that returns a row of tokens for each completion.
        score: Function of such rows that returns the answer for each of them.
    """

    read: Callable[[Texts], list[Any]]
    score: Callable[[list[Any]], list[Any]]


def kinds_of(scorer: Any) -> dict[str, Kind]:
    """Return the kinds of numbers that a reward model gives, by name."""
    if getattr(scorer, "gives_steps", False):
        return {"step_rewards": Kind(lambda x: scorer.rows(x["prompts"], x["completions"]), scorer.judged)}

    def read(texts: Texts) -> list[list[int]]:
        return scorer.token_ids(texts["prompts"], texts["completions"], texts["finished"])

    by_head = Kind(read, lambda rows: scorer.head_scores(rows).tolist())
    return {"scores": Kind(read, scorer.score_token_ids), "head_scores": by_head}


class ScoringQueue:
    """Score waiting requests in one batch. One thread scores one batch at a time.

    Args:
        scorer: Reward model.
        max_waiting: Largest number of waiting requests.
        max_tokens: Largest number of tokens of a prompt with its completion.
    """

    def __init__(self, scorer: Served, max_waiting: int, max_tokens: int = MAX_TOKENS) -> None:
        self._kinds, self._max_tokens = kinds_of(scorer), max_tokens
        self._waiting: Queue[tuple[Texts, str, Future[list[Any]]]] = Queue(max_waiting)
        Thread(target=self._run, name="scoring", daemon=True).start()

    def submit(self, texts: Texts, kind: str = "scores") -> Future[list[Any]]:
        """Add a request to the queue, and return a future of its answers, one per completion.

        Args:
            texts: Completions.
            kind: Name of the wanted numbers.

        Raises:
            queue.Full: If too many requests wait.
            UnscorableError: If the model does not give such numbers.
        """
        if kind not in self._kinds:
            given = " and ".join(f"`{name}`" for name in self._kinds)
            raise UnscorableError(f"this model gives {given} and no `{kind}`: use a client of this server's version")
        answer: Future[list[Any]] = Future()
        self._waiting.put_nowait((texts, kind, answer))
        return answer

    def _run(self) -> None:
        while True:
            requests = [self._waiting.get()]
            time.sleep(GATHER_SECONDS)
            with suppress(Empty):
                while True:
                    requests.append(self._waiting.get_nowait())
            for name, kind in self._kinds.items():
                self._answer([(texts, answer) for texts, wanted, answer in requests if wanted == name], kind)

    def _answer(self, requests: list[tuple[Texts, Future[list[Any]]]], kind: Kind) -> None:
        read = [(answer, rows) for texts, answer in requests if (rows := self._read(texts, kind, answer))]
        if not read:
            return
        try:
            scored = kind.score([row for _, rows in read for row in rows])
            if any(map(_is_infinite, scored)):
                raise FloatingPointError("an infinite score")
        except Exception as error:  # a model may raise anything, and the server must live on
            logger.exception("The reward model has failed.")
            for answer, _ in read:
                answer.set_exception(error)
            return
        scores = iter(scored)
        for answer, rows in read:
            answer.set_result([next(scores) for _ in rows])

    def _read(self, texts: Texts, kind: Kind, answer: Future[list[Any]]) -> list[Any]:
        """Return the rows of one request; none if it cannot be read. The others in the batch are scored."""
        try:
            rows = kind.read(texts)
            if not all(rows):
                raise ValueError("a completion and its prompt have no token")
            if (longest := max(map(len, rows))) > self._max_tokens:
                raise ValueError(f"a text has {longest} tokens: `max_tokens` of this server allows {self._max_tokens}")
        except Exception as error:  # a chat template may raise anything
            answer.set_exception(UnscorableError(f"{type(error).__name__}: {error}"))
            return []
        return rows


def _is_infinite(answer: Any) -> bool:
    return any(map(_is_infinite, answer)) if isinstance(answer, list | tuple) else answer in (math.inf, -math.inf)
