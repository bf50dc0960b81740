"""The application that serves a reward model over HTTP. The client is `rlhf_recipes.rewards.client.RemoteRewardModel`.

    GET /        {"name": .., "card": .., "weights": .., "position_limit": ..}: the reward model card, a fingerprint of
                 the weights, and the number of tokens that the model can read; `null` where there is none
    GET /health  {"status": "ok"}; needs no token
    POST /score  {"prompts": [..], "completions": [..], "finished": [..]} -> {"scores": [..]}, with `null` for NaN
    POST /head_scores  the same -> {"head_scores": [..]}: with several score heads, the scores of the first completion
                 by each head, then those of the second, ..; `/score` gives the mean of the heads
    POST /lengths  {"prompts": [..]} -> {"lengths": [..]}: the tokens that the model reads beside those of an answer

Prompts and completions are texts or lists of messages. Errors: 401 without the token; 413 for a request or a text that
is too large; 422 for a request that cannot be scored, with the reason; 503 while too many requests wait.
`rlhf_recipes.rewards.serving` limits the connections.
"""

import asyncio
import hmac
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict
from queue import Empty, Full, Queue
from threading import Thread
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, HTTPException, Request
from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError, model_validator

from rlhf_recipes.options.recipes import MAX_REQUEST_BYTES, MAX_TOKENS
from rlhf_recipes.rewards.client import TOKEN_VARIABLE
from rlhf_recipes.rewards.scorer import RewardModelScorer

GATHER_SECONDS = 0.01  # time for related requests, for example those of several ranks, to arrive
MAX_ROWS = 4096
LONGEST_TOKEN = 16  # characters of a token, at most, on the mean of a text
logger = logging.getLogger(__name__)


class Message(BaseModel):
    """Describe one message of a chat."""

    model_config = ConfigDict(extra="allow")
    role: str
    content: str


Parsed = TypeVar("Parsed", bound=BaseModel)
Text = str | Annotated[list[Message], Field(min_length=1)]


class ScoreRequest(BaseModel):
    """Describe the completions to score."""

    model_config = ConfigDict(extra="forbid")
    prompts: Annotated[list[Text], Field(min_length=1, max_length=MAX_ROWS)]
    completions: list[Text]
    finished: list[StrictBool]

    @model_validator(mode="after")
    def _check_rows(self) -> "ScoreRequest":
        if not len(self.prompts) == len(self.completions) == len(self.finished):
            raise ValueError("`prompts`, `completions` and `finished` must be equally long")
        if any(type(p) is not type(c) for p, c in zip(self.prompts, self.completions, strict=True)):
            raise ValueError("a prompt and its completion must both be text, or both messages")
        return self


class LengthRequest(BaseModel):
    """Describe the prompts to count."""

    model_config = ConfigDict(extra="forbid")
    prompts: Annotated[list[Text], Field(max_length=MAX_ROWS)]


class UnscorableError(ValueError):
    """Report a request that the reward model cannot read."""


class ScoringQueue:
    """Score waiting requests in one batch. One thread scores one batch at a time.

    Args:
        scorer: Reward model.
        max_waiting: Largest number of waiting requests.
        max_tokens: Largest number of tokens of a prompt with its completion.
    """

    def __init__(self, scorer: RewardModelScorer, max_waiting: int, max_tokens: int = MAX_TOKENS) -> None:
        self._scorer, self._max_tokens = scorer, max_tokens
        self._waiting: Queue[tuple[ScoreRequest, bool, Future[list[float]]]] = Queue(max_waiting)
        Thread(target=self._run, name="scoring", daemon=True).start()

    def submit(self, request: ScoreRequest, *, by_head: bool = False) -> "Future[list[float]]":
        """Add a request to the queue, and return a future of its scores.

        Args:
            request: Completions.
            by_head: Whether the scores of each head are wanted: those of the first completion, then of the second, ..

        Raises:
            queue.Full: If too many requests wait.
        """
        answer: Future[list[float]] = Future()
        self._waiting.put_nowait((request, by_head, answer))
        return answer

    def _run(self) -> None:
        while True:
            requests = [self._waiting.get()]
            time.sleep(GATHER_SECONDS)
            with suppress(Empty):
                while True:
                    requests.append(self._waiting.get_nowait())
            for kind in (False, True):
                self._answer([(request, answer) for request, by_head, answer in requests if by_head is kind], kind)

    def _answer(self, requests: "list[tuple[ScoreRequest, Future[list[float]]]]", by_head: bool) -> None:
        read = [(answer, ids) for request, answer in requests if (ids := self._read(request, answer)) is not None]
        if not read:
            return
        try:
            token_ids = [ids for _, rows in read for ids in rows]
            score = self._by_head if by_head else self._scorer.score_token_ids
            scored = score(token_ids)
            if any(map(math.isinf, scored)):
                raise FloatingPointError("an infinite score")
        except Exception as error:  # a model may raise anything, and the server must live on
            logger.exception("The reward model has failed.")
            for answer, _ in read:
                answer.set_exception(error)
            return
        scores, each = iter(scored), len(scored) // len(token_ids)
        for answer, rows in read:
            answer.set_result([next(scores) for _ in range(each * len(rows))])

    def _by_head(self, token_ids: list[list[int]]) -> list[float]:
        return self._scorer.head_scores(token_ids).flatten().tolist()

    def _read(self, request: ScoreRequest, answer: "Future[list[float]]") -> list[list[int]] | None:
        """Return the token ids of one request; `None` if it cannot be read. The others in the batch are scored."""
        texts = request.model_dump(exclude_unset=True)
        try:
            token_ids = self._scorer.token_ids(texts["prompts"], texts["completions"], texts["finished"])
            if not all(token_ids):
                raise ValueError("a completion and its prompt have no token")
            if (longest := max(map(len, token_ids))) > self._max_tokens:
                raise ValueError(f"a text has {longest} tokens: `max_tokens` of this server allows {self._max_tokens}")
        except Exception as error:  # a chat template may raise anything
            answer.set_exception(UnscorableError(f"{type(error).__name__}: {error}"))
            return None
        return token_ids


def reward_app(
    scorer: RewardModelScorer,
    *,
    weights: str | None = None,
    max_request_bytes: int = MAX_REQUEST_BYTES,
    max_waiting: int = 64,
    max_tokens: int = MAX_TOKENS,
    token: str | None = None,
) -> FastAPI:
    """Return the application that serves a reward model.

    Args:
        scorer: Reward model.
        weights: Fingerprint of its weights. With it, a resumed run recognises the model at another address.
        max_request_bytes: Largest size of a request. The server does not read a larger one to its end.
        max_waiting: Largest number of waiting requests.
        max_tokens: Largest number of tokens of a prompt with its completion.
        token: Token that clients must send, if there is one.

    Raises:
        ValueError: If the card names another tokenizer than the scorer has.
    """
    about, queue = _about(scorer, weights), ScoringQueue(scorer, max_waiting, max_tokens)
    authorized = [Depends(_require(token))]
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/", dependencies=authorized)
    async def info() -> dict[str, Any]:
        return about

    @app.post("/lengths", dependencies=authorized)
    async def lengths(request: Request) -> dict[str, list[int]]:
        batch = _parsed(LengthRequest, await _body(request, max_request_bytes))
        _check_sizes(batch.prompts, max_tokens)
        try:
            prompts = batch.model_dump(exclude_unset=True)["prompts"]
            return {"lengths": await asyncio.to_thread(scorer.prompt_lengths, prompts)}
        except Exception as error:  # a chat template may raise anything
            raise HTTPException(422, f"{type(error).__name__}: {error}") from error

    @app.post("/score", dependencies=authorized)
    async def score(request: Request) -> dict[str, list[float | None]]:
        return {"scores": await scored(request, by_head=False)}

    @app.post("/head_scores", dependencies=authorized)
    async def head_scores(request: Request) -> dict[str, list[float | None]]:
        return {"head_scores": await scored(request, by_head=True)}

    async def scored(request: Request, *, by_head: bool) -> list[float | None]:
        batch = _parsed(ScoreRequest, await _body(request, max_request_bytes))
        _check_sizes([*batch.prompts, *batch.completions], max_tokens)
        scores = await _answered(queue, batch, by_head)
        return [None if math.isnan(x) else x for x in scores]

    return app


async def _answered(queue: ScoringQueue, batch: ScoreRequest, by_head: bool) -> list[float]:
    try:
        return await asyncio.wrap_future(queue.submit(batch, by_head=by_head))
    except UnscorableError as error:
        raise HTTPException(422, str(error)) from error
    except Full:
        raise HTTPException(503, "too many requests wait") from None
    except Exception as error:  # a model may raise anything
        raise HTTPException(500, f"{type(error).__name__}: {error}") from error


def _about(scorer: RewardModelScorer, weights: str | None) -> dict[str, Any]:
    """Return what a client reads about the model, if the card fits the tokenizer."""
    card = scorer.card
    if card is not None:
        separator = card.response_separator
        card.check(scorer.tokenizer, conversational=card.conversational, response_separator=separator)
    about = {"name": scorer.__name__, "weights": weights, "position_limit": getattr(scorer, "position_limit", None)}
    return about | {"card": None if card is None else asdict(card)}


def _require(token: str | None) -> Callable[[Request], None]:
    def check(request: Request) -> None:
        sent = request.headers.get("Authorization", "")
        if token and not hmac.compare_digest(sent.encode(), f"Bearer {token}".encode()):
            close = {"Connection": "close"}  # whatever else a stranger sends is not read
            raise HTTPException(401, f"set {TOKEN_VARIABLE} to the token of this server", close)

    return check


def _parsed(kind: type[Parsed], body: bytes) -> Parsed:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        reasons = error.errors(include_url=False, include_input=False, include_context=False)
        raise HTTPException(422, reasons[:10]) from error


async def _body(request: Request, limit: int) -> bytes:
    too_large = HTTPException(413, f"a request may have {limit} bytes: send fewer completions at a time")
    if request.headers.get("Content-Length", "").isdecimal() and int(request.headers["Content-Length"]) > limit:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large
    return bytes(body)


def _check_sizes(texts: list[Text], max_tokens: int) -> None:
    """Refuse a text that cannot have few enough tokens, before it is tokenised."""
    limit = LONGEST_TOKEN * max_tokens
    for text in texts:
        size = len(text) if isinstance(text, str) else sum(len(message.content) for message in text)
        if size > limit:
            raise HTTPException(413, f"a text has {size} characters: `max_tokens` of this server allows {limit}")
