"""Score completions with a reward model that vLLM or text-embeddings-inference (TEI) serves.

These servers know neither separator nor card, and answer with a sigmoid of the score unless they are asked not to. So
the client reads the tokenizer and the card of the reward model here, writes the whole text itself, and compares a few
answers of the server before it trusts the others.

Source: vLLM 0.28, `/v1/models` and `/classify`; text-embeddings-inference 1.8, `/info`, `/tokenize` and `/predict`.
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import AutoConfig

from rlhf_recipes.data.messages import answer_to
from rlhf_recipes.data.rendering import answered_ids, answered_text, appended_end
from rlhf_recipes.models.fingerprint import fingerprint
from rlhf_recipes.models.process_reward_model import refuse_process_reward_model
from rlhf_recipes.models.safe_loading import safe_loading
from rlhf_recipes.models.vocabulary import with_end_token
from rlhf_recipes.rewards.attempts import PermanentRewardError, RewardCallError
from rlhf_recipes.rewards.card import CARD_FILE, RewardModelCard
from rlhf_recipes.rewards.protocol import Scorer, ScoringRun
from rlhf_recipes.rewards.reading import cut_front, read_position, trained_pad_id
from rlhf_recipes.rewards.scorer import load_scorer_tokenizer
from rlhf_recipes.rewards.transport import INFO_BYTES, Server, finished_completions

ROW_BYTES = 2**10  # of one score in an answer: a label stands beside it
PROBES = ("a", "the fox is red and sleeps all day")
# Relative difference between a score alone and in a batch: half precision rounds by up to 1 %.
SAME = 0.05
logger = logging.getLogger(__name__)
Rows = Sequence[Any]


class PooledRewardModel(Server, Scorer):
    """Score completions with a server that knows the model and nothing about its text.

    Args:
        url: Address of the server.
        described: What the server says about its model, at the path `about`.
        files: Directory or Hub name of the reward model, with its tokenizer, configuration and card. Default: the name
            that the server says.
        batch_size: Completions per request.
        concurrency: Number of requests at the same time.
        timeout: Seconds for a whole request; `None` sets no limit.

    Raises:
        ValueError: If `files` has no tokenizer, or if the answers of the server are not single, raw scores.
    """

    gives_log_odds = True
    server: str
    about: str
    tokenizer: Any

    def __init__(
        self,
        url: str,
        described: dict[str, Any],
        files: str = "",
        *,
        batch_size: int = 32,
        concurrency: int = 4,
        timeout: float | None = 300.0,
    ) -> None:
        super().__init__(url, batch_size, concurrency, timeout)
        self.policy_eos_token_ids: list[int] | None = None
        self._described = self._names(described)
        files = files or self.named(described)
        self.files, self.__name__ = files, Path(files).name
        try:
            with safe_loading(files):
                config = AutoConfig.from_pretrained(files, trust_remote_code=False)
            self.tokenizer = with_end_token(load_scorer_tokenizer(files), files)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self.server} serves {files} at {self.url}, and this machine needs the tokenizer and `config.json` "
                f"of it: {error}. Write a directory that has both behind the address: `{self.url}#DIRECTORY`."
            ) from error
        self._appended = len(appended_end(self.tokenizer))
        self._take_rules(config)

    def _take_rules(self, config: Any) -> None:
        """Take the rules by which a text is read from the card and the configuration."""
        refuse_process_reward_model(self.files, self.server)
        self.card = RewardModelCard.load(self.files)
        if self.card is None:
            logger.warning(f"{self.files} has no {CARD_FILE}, so its separator and chat template cannot be checked.")
        self.pad_token_id = trained_pad_id(SimpleNamespace(config=config), self.tokenizer, self.card)

    @staticmethod
    def named(described: dict[str, Any]) -> str:
        """Return the directory or Hub name that the server says."""
        raise NotImplementedError

    @staticmethod
    def _names(described: dict[str, Any]) -> list[Any]:
        """Return what tells the model of the server from another one."""
        raise NotImplementedError

    def _check_model(self) -> None:
        """Ask the server for its model, and check that it is the first one.

        Raises:
            PermanentRewardError: If it names another one.
        """
        found = self._request("GET", self.about, INFO_BYTES, self.timeout)
        try:
            same = self._names(found) == self._described
        except (KeyError, TypeError, IndexError) as error:
            raise RewardCallError(f"{self.url} does not say which model it serves") from error
        self._require_same(same)

    def identity(self) -> str:
        """Return the fingerprint of the weights, if they are here; else the name of the model."""
        return fingerprint(self.files)

    def prepare(self, run: ScoringRun) -> None:
        """Take the limits of a run."""
        self.timeout, self.policy_eos_token_ids = run.timeout, run.policy_eos_token_ids

    def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]] | None = None, **kwargs: Any
    ) -> list[float | None]:
        """Return one score per completion.

        Raises:
            RewardCallError: If a request fails, but a later one may succeed.
            PermanentRewardError: If the server refuses a request for good, or gives several numbers for a completion.
        """
        self._check_model()
        finished = finished_completions(len(prompts), completion_ids, self.policy_eos_token_ids)
        given = zip(prompts, completions, finished, strict=True)
        return self._sent(lambda batch: self._scores(batch["rows"]), rows=[self._row(*row) for row in given])

    def prompt_lengths(self, prompts: list[Any]) -> list[int]:
        """Return the number of tokens that the model reads beside those of an answer, one per prompt."""
        return [len(self._token_ids(prompt, answer_to(prompt, "a"), False)) - 1 for prompt in prompts]

    def check(self) -> None:
        """Compare a few answers of the server.

        Raises:
            ValueError: If it answers with activated scores, or if a score depends on the other rows of its request.
        """
        rows = [self._row(text, text, finished) for text, finished in zip(PROBES, (True, False), strict=True)]
        try:
            together = self._probed(rows)
            alone = [number for row in rows for number in self._probed([row])]
            activated = self._probed(rows, raw=False)
        except (RewardCallError, PermanentRewardError) as error:
            raise ValueError(f"{self.server} at {self.url} does not score: {error}") from error
        if together == activated and all(0 <= score <= 1 for score in together):
            raise ValueError(
                f"{self.server} at {self.url} answers with {together} to two texts, whether raw scores are asked for "
                "or not: this is a sigmoid, which hides how good an answer is. Take a newer version of the server."
            )
        if not all(math.isclose(*pair, rel_tol=SAME, abs_tol=SAME) for pair in zip(together, alone, strict=True)):
            raise ValueError(
                f"{self.server} at {self.url} gives two texts the scores {together} in one request and {alone} in "
                "two: it does not read their padding as padding. Serve the model in another precision or version."
            )

    def _token_ids(self, prompt: Any, answer: Any, finished: bool) -> list[int]:
        return answered_ids(self.tokenizer, prompt, answer, finished, appended=self._appended)

    def _row(self, prompt: Any, answer: Any, finished: bool) -> Any:
        """Return what the server gets for one completion."""
        raise NotImplementedError

    def _scores(self, rows: Rows, raw: bool = True) -> list[float]:
        """Return the scores of one request; `raw=False` asks for the server's activation."""
        raise NotImplementedError

    def _probed(self, rows: Rows, raw: bool = True) -> list[float]:
        """Return all numbers that are read in one request, in the order of the rows."""
        return self._scores(rows, raw)

    def _single(self, numbers: list[Any]) -> float:
        """Return the only number of a completion."""
        if len(numbers) != 1:
            raise PermanentRewardError(
                f"{self.files} has {len(numbers)} labels at {self.url}, and a reward model has one. Write a reward "
                "function that calls it."
            )
        return numbers[0]


class VLLMRewardModel(PooledRewardModel):
    """Score completions with vLLM's endpoint for classifiers, which reads token ids.

    vLLM reads the score at the last token. A model that was trained to read another one gets the row up to that.
    """

    server = "vLLM"
    about = "/v1/models"

    def __init__(self, url: str, described: dict[str, Any], files: str = "", **kwargs: Any) -> None:
        model = described["data"][0]
        self.model_id, self.position_limit = model["id"], model.get("max_model_len")
        super().__init__(url, described, files, **kwargs)

    @staticmethod
    def named(described: dict[str, Any]) -> str:
        """Return the directory or Hub name that the server says."""
        return described["data"][0].get("root") or described["data"][0]["id"]

    @staticmethod
    def _names(described: dict[str, Any]) -> list[Any]:
        return [described["data"][0].get(name) for name in ("id", "root")]

    def _row(self, prompt: Any, answer: Any, finished: bool) -> list[int]:
        ids = self._token_ids(prompt, answer, finished)
        return cut_front(
            ids[: read_position(ids, self.pad_token_id) + 1], self.position_limit, self.tokenizer.bos_token_id
        )

    def _scores(self, rows: Rows, raw: bool = True) -> list[float]:
        asked = {"model": self.model_id, "input": list(rows), "use_activation": not raw}
        answer = self._post("/classify", asked, ROW_BYTES * (len(rows) + 16))
        try:
            data = sorted(answer["data"], key=lambda each: each["index"])
            numbers = [self._single(each["probs"]) for each in data]
        except (KeyError, TypeError) as error:
            raise RewardCallError(f"{self.url} answered with something else than scores") from error
        return self._numbers(numbers, "scores", len(rows))


class TEIRewardModel(PooledRewardModel):
    """Score completions with text-embeddings-inference, which reads text and adds special tokens itself."""

    server = "text-embeddings-inference"
    about = "/info"

    def __init__(self, url: str, described: dict[str, Any], files: str = "", **kwargs: Any) -> None:
        self.position_limit = described.get("max_input_length")
        super().__init__(url, described, files, **kwargs)
        self.batch_size = min(self.batch_size, described.get("max_client_batch_size") or self.batch_size)

    @staticmethod
    def named(described: dict[str, Any]) -> str:
        """Return the directory or Hub name that the server says."""
        return described["model_id"]

    @staticmethod
    def _names(described: dict[str, Any]) -> list[Any]:
        return [described.get(name) for name in ("model_id", "model_sha")]

    def check(self) -> None:
        """Compare its tokens with those of the tokenizer here, and then its scores.

        Raises:
            ValueError: If they differ.
        """
        for text, finished in zip(PROBES, (True, False), strict=True):
            ours = self._token_ids(text, text, finished)
            asked = {"inputs": [self._row(text, text, finished)[0]], "add_special_tokens": True}
            try:
                theirs = [
                    token["id"] for token in self._post("/tokenize", asked, ROW_BYTES * (len(ours) + 16), list)[0]
                ]
            except (KeyError, TypeError, IndexError, RewardCallError, PermanentRewardError) as error:
                raise ValueError(f"{self.server} at {self.url} does not tokenize: {error!r}") from error
            if ours != theirs:
                raise ValueError(
                    f"{self.server} at {self.url} reads the tokens {theirs} where {self.files} was trained on {ours}. "
                    "It adds other special tokens. Serve the model with `rlhf serve` or with vLLM."
                )
        super().check()

    def _row(self, prompt: Any, answer: Any, finished: bool) -> list[str]:
        return [answered_text(self.tokenizer, prompt, answer, finished)]

    def _scores(self, rows: Rows, raw: bool = True) -> list[float]:
        asked = {"inputs": list(rows), "raw_scores": raw, "truncate": False}
        answer = self._post("/predict", asked, ROW_BYTES * (len(rows) + 16), list)
        try:
            numbers = [self._single([each["score"] for each in labels]) for labels in answer]
        except (KeyError, TypeError) as error:
            raise RewardCallError(f"{self.url} answered with something else than scores") from error
        return self._numbers(numbers, "scores", len(rows))
