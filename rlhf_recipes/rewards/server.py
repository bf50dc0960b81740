"""The application that serves a reward model over HTTP. The client is `rlhf_recipes.rewards.client.RemoteRewardModel`.

    GET /        {"name": .., "gives": .., "card": .., "weights": .., "position_limit": ..}: the kind of the answers,
                 `scores` or `step_rewards`; the card; a fingerprint of the weights and, for steps, of their rules; the
                 number of tokens that the model can read; `null` where there is none
    GET /health  {"status": "ok"}; needs no token
    POST /score  {"prompts": [..], "completions": [..], "finished": [..]} -> {"scores": [..]}, with `null` for NaN
    POST /head_scores  the same -> {"head_scores": [..]}: with several score heads, the scores of the first completion
                 by each head, then those of the second, ..; `/score` gives the mean of the heads
    POST /step_rewards  the same -> {"step_rewards": [..]}: of a process reward model, for each completion a list of
                 `[end, reward]`, where `end` counts characters, or `null`
    POST /lengths  {"prompts": [..]} -> {"lengths": [..]}: the tokens that the model reads beside those of an answer

Each answer also has the `weights` of `GET /`, so a client notices that a server has another model than before.
A request for a kind of numbers that the model does not give is refused: a sum of step rewards is no score.
Prompts and completions are texts or lists of messages. Errors: 401 without the token; 413 for a request or a text that
is too large; 422 for a request that cannot be scored, with the reason; 503 while too many requests wait.
`rlhf_recipes.rewards.serving` limits the connections.
"""

import asyncio
import hmac
import math
from collections.abc import Callable
from dataclasses import asdict
from queue import Full
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, HTTPException, Request
from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError, model_validator

from rlhf_recipes.options.recipes import MAX_REQUEST_BYTES, MAX_TOKENS
from rlhf_recipes.rewards.scoring_queue import ScoringQueue, Served, UnscorableError, kinds_of
from rlhf_recipes.rewards.transport import TOKEN_VARIABLE

MAX_ROWS = 4096
LONGEST_TOKEN = 16  # characters of a token, at most, on the mean of a text


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


def reward_app(
    scorer: Served,
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
        weights: Its identity (`Scorer.identity`). With it, a resumed run recognises the model at another address.
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
    async def lengths(request: Request) -> dict[str, Any]:
        batch = _parsed(LengthRequest, await _body(request, max_request_bytes))
        _check_sizes(batch.prompts, max_tokens)
        try:
            prompts = batch.model_dump(exclude_unset=True)["prompts"]
            return {"lengths": await asyncio.to_thread(scorer.prompt_lengths, prompts), "weights": weights}
        except Exception as error:  # a chat template may raise anything
            raise HTTPException(422, f"{type(error).__name__}: {error}") from error

    @app.post("/score", dependencies=authorized)
    async def score(request: Request) -> dict[str, Any]:
        return await scored(request, "scores")

    @app.post("/head_scores", dependencies=authorized)
    async def head_scores(request: Request) -> dict[str, Any]:
        answer = await scored(request, "head_scores")
        return answer | {"head_scores": [x for heads in answer["head_scores"] for x in heads]}

    @app.post("/step_rewards", dependencies=authorized)
    async def rewards_of_steps(request: Request) -> dict[str, Any]:
        return await scored(request, "step_rewards")

    async def scored(request: Request, kind: str) -> dict[str, Any]:
        batch = _parsed(ScoreRequest, await _body(request, max_request_bytes))
        _check_sizes([*batch.prompts, *batch.completions], max_tokens)
        return {kind: _without_nan(await _answered(queue, batch, kind)), "weights": weights}

    return app


def _without_nan(numbers: list[Any]) -> list[Any]:
    """Return numbers, and lists of numbers, as JSON can hold them."""
    nested = [_without_nan(list(x)) if isinstance(x, list | tuple) else x for x in numbers]
    return [None if isinstance(x, float) and math.isnan(x) else x for x in nested]


async def _answered(queue: ScoringQueue, batch: ScoreRequest, kind: str) -> list[Any]:
    try:
        return await asyncio.wrap_future(queue.submit(batch.model_dump(exclude_unset=True), kind))
    except UnscorableError as error:
        raise HTTPException(422, str(error)) from error
    except Full:
        raise HTTPException(503, "too many requests wait") from None
    except Exception as error:  # a model may raise anything
        raise HTTPException(500, f"{type(error).__name__}: {error}") from error


def _about(scorer: Served, weights: str | None) -> dict[str, Any]:
    """Return what a client reads about the model, if the card fits the tokenizer."""
    card = scorer.card
    if card is not None:
        separator = card.response_separator
        card.check(scorer.tokenizer, conversational=card.conversational, response_separator=separator)
    about = {"name": scorer.__name__, "gives": next(iter(kinds_of(scorer))), "weights": weights}
    limit = getattr(scorer, "position_limit", None)
    return about | {"position_limit": limit, "card": None if card is None else asdict(card)}


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
