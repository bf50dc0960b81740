"""Score completions with a reward model on another machine, which `recipes/serve_reward_model.py` serves."""

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_recipes.algorithm.heads import combine_heads
from rlhf_recipes.rewards.attempts import PermanentRewardError, RewardCallError, retrying
from rlhf_recipes.rewards.card import CARD_FILE, RewardModelCard, heads_of
from rlhf_recipes.rewards.heads import combined
from rlhf_recipes.rewards.protocol import Scorer, ScoringRun
from rlhf_recipes.rewards.transport import Server, finished_completions

NUMBER_BYTES = 64  # of one score in an answer, at most
logger = logging.getLogger(__name__)


class RemoteRewardModel(Server, Scorer):
    """Score completions with a reward model that `recipes/serve_reward_model.py` serves.

    A reward model with several heads sends the scores of each. They are combined here, by the rule of the run.

    Args:
        url: Address of the server, for example `http://127.0.0.1:8000`.
        batch_size: Completions per request.
        concurrency: Number of requests at the same time.
        timeout: Seconds for a whole request, however slowly its answer arrives; `None` sets no limit.
        retries: Further attempts to reach a server that is still starting.
        policy_eos_token_ids: Ids that end a completion of the policy; `None` counts every completion as finished.

    Raises:
        ValueError: If the address holds a password, or if no reward model answers there.
    """

    gives_log_odds = True
    combine: Callable[[Tensor], Tensor] = staticmethod(combine_heads)  # `(B, K)` of several heads to `(B,)`

    def __init__(
        self,
        url: str,
        *,
        batch_size: int = 32,
        concurrency: int = 4,
        timeout: float | None = 300.0,
        retries: int = 4,
        policy_eos_token_ids: list[int] | None = None,
    ) -> None:
        super().__init__(url, batch_size, concurrency, timeout)
        self.policy_eos_token_ids = policy_eos_token_ids
        try:
            info = retrying(retries, self._note_waiting)(self.describe, "/")
            self.__name__ = str(info["name"])
            self.card = None if info["card"] is None else RewardModelCard(**info["card"])
            self.weights: str | None = info.get("weights")  # a fingerprint
            self.position_limit: int | None = info.get("position_limit")
        except (KeyError, TypeError, RewardCallError, PermanentRewardError) as error:
            raise ValueError(
                f"No reward model is served at {self.url} ({error}). Start it there: "
                "`rlhf serve --model_name_or_path DIRECTORY`."
            ) from error
        if self.card is None:
            logger.warning(
                f"The reward model at {self.url} has no {CARD_FILE}, so its separator and its chat template cannot be "
                "checked."
            )

    def identity(self) -> str:
        """Return the fingerprint of the weights; the address if the server does not know it."""
        return self.weights or self.url

    def prepare(self, run: ScoringRun) -> None:
        """Take the limits of a run, and its rule for several heads."""
        self.timeout, self.policy_eos_token_ids = run.timeout, run.policy_eos_token_ids
        self.combine = run.combine

    def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]] | None = None, **kwargs: Any
    ) -> list[float | None]:
        """Return one score per completion; `None` where the score is NaN.

        Raises:
            RewardCallError: If a request fails, but a later one may succeed.
            PermanentRewardError: If the server refuses a request for good.
        """
        finished = finished_completions(len(prompts), completion_ids, self.policy_eos_token_ids)
        columns = {"prompts": prompts, "completions": completions, "finished": finished}
        if heads_of(self.card) == 1:
            return self._sent(self._score, **columns)
        scores = torch.tensor(self._sent(self._head_scores, **columns))
        return [*combined(scores, self.combine, self.__name__, self.card, kwargs.get("log_metric"))]

    def prompt_lengths(self, prompts: list[Any]) -> list[int]:
        """Return the number of tokens that the model reads beside those of an answer, one per prompt."""
        return self._sent(self._lengths, prompts=prompts)

    def _score(self, batch: dict[str, list[Any]]) -> list[float | None]:
        return self._answer("scores", "/score", batch)

    def _lengths(self, batch: dict[str, list[Any]]) -> list[int]:
        return self._answer("lengths", "/lengths", batch)

    def _head_scores(self, batch: dict[str, list[Any]]) -> list[list[float]]:
        """Return the scores of each completion by each head."""
        heads = heads_of(self.card)
        flat = self._answer("head_scores", "/head_scores", batch, each=heads)
        numbers = [math.nan if x is None else float(x) for x in flat]
        return [numbers[start : start + heads] for start in range(0, len(numbers), heads)]

    def _answer(self, kind: str, path: str, batch: dict[str, list[Any]], each: int = 1) -> list[Any]:
        count = len(batch["prompts"])
        answer = self._post(path, batch, NUMBER_BYTES * (each * count + 16))
        return self._numbers(answer.get(kind), kind, count, each)
