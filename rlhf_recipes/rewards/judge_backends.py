"""The two places where a judge may run: behind an OpenAI-compatible address, and in this process."""

import hashlib
import json
import logging
import threading
from typing import Any, Protocol

import requests
import torch
from accelerate import PartialState
from tenacity import RetryCallState, wait_exponential
from transformers import GenerationConfig
from transformers.integrations import is_deepspeed_zero3_enabled

from rlhf_recipes.console import visible
from rlhf_recipes.data.rendering import prompt_ids
from rlhf_recipes.models.fingerprint import fingerprint
from rlhf_recipes.models.loading import load_policy, load_tokenizer
from rlhf_recipes.models.presence import require_present
from rlhf_recipes.options.judge import SAMPLING, JudgeConfig
from rlhf_recipes.options.reward_calls import LONGEST_PAUSE_SECONDS
from rlhf_recipes.options.secrets import redact
from rlhf_recipes.rewards.attempts import PermanentRewardError, RewardCallError, describe_error, retrying
from rlhf_recipes.rewards.exchange import CONNECT_SECONDS, Exchange, RefusedForGoodError, RefusedRequestError
from rlhf_recipes.rewards.judge_answers import Answer

ANSWER_BYTES = 2**22
FILTERED = "content_filter"  # how servers say that they do not answer such a question
# How servers name the end of a whole answer. After another reason (`abort`, `error`) it is broken off.
WHOLE = (None, "", "stop", "eos", "eos_token", "stop_sequence", "end_turn")
logger = logging.getLogger(__name__)


class JudgeBackend(Protocol):
    """Answer questions.

    Args:
        identity: Text that is the same wherever the same model runs.
        batch_size: Questions per call.
        concurrency: Calls at the same time.
    """

    identity: str
    batch_size: int
    concurrency: int

    def answers(self, questions: list[str]) -> list[Answer]:
        """Return the answers to questions, in their order."""
        ...


class ChatServer:
    """Ask the model at an OpenAI-compatible address.

    Args:
        config: Description of the judge.

    Raises:
        ValueError: If the variable of the key is not set, the server refuses the key, or nothing answers.
    """

    batch_size = 1

    def __init__(self, config: JudgeConfig) -> None:
        assert config.address is not None
        self._config, self._key = config, config.key()
        self.identity, self.concurrency = f"the served model {config.model}", config.concurrency
        url = config.address.rstrip("/").removesuffix("/chat/completions")
        self._exchange = Exchange(url, self._authorize, "answers", self._hide)
        self._check()

    def answers(self, questions: list[str]) -> list[Answer]:
        """Return the answers to questions, in their order.

        Raises:
            RewardCallError: If the last attempt has failed, but a later one may succeed.
            PermanentRewardError: If the server refuses a request for good.
        """
        return [self._answer(question) for question in questions]

    def _check(self) -> None:
        """Ask for the list of models: a server that is not there, or refuses the key, is noticed before the run."""
        url, asked = self._exchange.url, ("GET", "/models", ANSWER_BYTES, CONNECT_SECONDS)
        try:
            listed = retrying(self._config.retries, self._note)(self._exchange, *asked)
        except PermanentRewardError as error:
            if " answered 404" in str(error) or " answered 405" in str(error):
                return  # it answers, but has no such list
            remedy = "Set `key_variable`" if self._key is None else f"Correct the key in {self._config.key_variable}"
            raise ValueError(f"The judge's server refuses: {error}. {remedy}, or `address`.") from None
        except RewardCallError as error:
            raise ValueError(f"No judge answers: {error}. Start the server, or correct `address`.") from None
        names = [str(entry.get("id")) for entry in listed.get("data") or [] if isinstance(entry, dict)]
        if names and self._config.model not in names:
            shown = ", ".join(names[:5])
            logger.warning(f"{url} does not list the model {self._config.model!r} of the judge, only {shown}.")

    def _answer(self, question: str) -> Answer:
        retry = retrying(self._config.retries, self._note).copy(wait=_pause)
        messages = [{"role": "user", "content": question}]
        body = json.dumps({"model": self._config.model, "messages": messages, **self._config.request})
        try:
            return retry(self._ask, body)
        except RefusedForGoodError as error:
            if _is_filtered(error.body):
                return Answer("", "refused", 0)
            raise

    def _ask(self, body: str) -> Answer:
        return self._read(self._exchange("POST", "/chat/completions", ANSWER_BYTES, self._config.timeout, body))

    def _read(self, reply: dict[str, Any]) -> Answer:
        try:
            choice = reply["choices"][0]
            message, tokens = choice["message"], (reply.get("usage") or {}).get("total_tokens") or 0
            text, refusal, end = message.get("content") or "", message.get("refusal"), choice.get("finish_reason")
            if not isinstance(text, str):
                text = "".join(part.get("text") or "" for part in text)
            if refusal or end == FILTERED:
                return Answer(str(refusal or text), "refused", int(tokens))
            if end != "length" and end not in WHOLE:
                shown = visible(self._hide(str(end)))[:50]
                raise RewardCallError(f"{self._exchange.url} broke off its answer (`finish_reason: {shown}`)")
            return Answer(text, "length" if end == "length" else "stop", int(tokens))
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise RewardCallError(
                f"{self._exchange.url} answered without a message in `choices`: it is not OpenAI-compatible"
            ) from error

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key is not None:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _hide(self, text: str) -> str:
        """Hide the key where a server repeats it."""
        return redact(text if self._key is None else text.replace(self._key, "***"))

    def _note(self, state: RetryCallState) -> None:
        assert state.outcome is not None
        assert state.next_action is not None
        error = state.outcome.exception()
        assert error is not None
        logger.info(f"{describe_error(error)}. Asked again in {state.next_action.sleep:g} s.")


def _is_filtered(body: bytes) -> bool:
    """Return whether a refusal names the filter as its reason. Its message may quote any text, so it is not read."""
    try:
        error = json.loads(body)["error"]
        return FILTERED in (error.get("code"), error.get("type"))
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return False


def _pause(state: RetryCallState) -> float:
    """Return the seconds before the next attempt: growing ones, or as many as the server asks for."""
    error = None if state.outcome is None else state.outcome.exception()
    asked = error.after if isinstance(error, RefusedRequestError) else 0.0
    return min(max(asked, wait_exponential(max=LONGEST_PAUSE_SECONDS)(state)), LONGEST_PAUSE_SECONDS)


class LocalModel:
    """Ask a chat model in this process. It is loaded at the first question, and each process has a whole copy.

    Args:
        config: Description of the judge.

    Raises:
        ValueError: If there is no such model, or if it has no chat template.
    """

    concurrency = 1

    def __init__(self, config: JudgeConfig) -> None:
        self._path = require_present("model", config.model)
        self.identity, self.batch_size = fingerprint(self._path), config.batch_size
        self._sampling = config.request
        self.tokenizer = load_tokenizer(self._path, padding_side="left")
        if self.tokenizer.chat_template is None:
            raise ValueError(f"`model` {config.model} has no chat template, so it cannot judge. Name a chat model.")
        self._model: Any = None
        self._lock = threading.Lock()

    @torch.inference_mode()
    def answers(self, questions: list[str]) -> list[Answer]:
        """Return the answers to questions, in their order. The random numbers of the run do not change."""
        with self._lock:
            model = self._model = self._model or self._load()
            ids = prompt_ids(self.tokenizer, [[{"role": "user", "content": question}] for question in questions])
            inputs = self.tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt").to(model.device)
            devices = [] if model.device.type == "cpu" else [model.device]
            with torch.random.fork_rng(devices):
                torch.manual_seed(_seed(questions))
                output = model.generate(**inputs, generation_config=self._generation(model))
        rows = output[:, inputs["input_ids"].size(1) :].tolist()
        return [self._answer(row, len(asked)) for row, asked in zip(rows, ids, strict=True)]

    def _load(self) -> Any:
        if is_deepspeed_zero3_enabled():
            raise PermanentRewardError("a judge in this process does not go with ZeRO-3: serve it, and set `address`")
        return load_policy(self._path, dtype="auto", device_map=PartialState().device).eval()

    def _generation(self, model: Any) -> GenerationConfig:
        given = {name: value for name, value in self._sampling.items() if name in ("top_p", "top_k")}
        temperature = self._sampling.get("temperature", 1.0)
        sampling = {"do_sample": True, "temperature": temperature, **given} if temperature else {"do_sample": False}
        return GenerationConfig(
            max_new_tokens=self._sampling.get("max_tokens", SAMPLING["max_tokens"]),
            eos_token_id=self._ends(model),
            pad_token_id=self.tokenizer.pad_token_id,
            bos_token_id=self.tokenizer.bos_token_id,
            **sampling,
        )

    def _ends(self, model: Any) -> list[int]:
        own = model.generation_config.eos_token_id
        return [*{self.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}]

    def _answer(self, row: list[int], asked: int) -> Answer:
        ends = self._ends(self._model)
        end = next((place for place, token in enumerate(row) if token in ends), None)
        text = self.tokenizer.decode(row[:end], skip_special_tokens=True)
        return Answer(text, "length" if end is None else "stop", asked + (len(row) if end is None else end + 1))


def _seed(questions: list[str]) -> int:
    return int.from_bytes(hashlib.sha256("\0".join(questions).encode("utf-8", "surrogatepass")).digest()[:4], "big")
