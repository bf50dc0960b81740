"""Score completions with a reward model on another machine, which `recipes/serve_reward_model.py` serves."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_recipes.algorithm.heads import combine_heads
from rlhf_recipes.console import visible
from rlhf_recipes.data.messages import as_text
from rlhf_recipes.rewards.attempts import PermanentRewardError, RewardCallError, retrying
from rlhf_recipes.rewards.card import CARD_FILE, RewardModelCard, heads_of
from rlhf_recipes.rewards.dense import read_answers
from rlhf_recipes.rewards.heads import combined
from rlhf_recipes.rewards.protocol import Scorer, ScoringRun
from rlhf_recipes.rewards.steps import ProcessRewardModelCard, Steps
from rlhf_recipes.rewards.transport import NUMBER_BYTES, Server, finished_completions

CARDS = {"scores": RewardModelCard, "step_rewards": ProcessRewardModelCard}  # by the numbers that a server gives
logger = logging.getLogger(__name__)


class RemoteRewardModel(Server, Scorer):
    """Score completions with a reward model that `recipes/serve_reward_model.py` serves.

    A reward model with several heads sends the scores of each. They are combined here, by the rule of the run. A
    process reward model sends the rewards of steps.

    Args:
        url: Address of the server, for example `http://127.0.0.1:8000`.
        batch_size: Completions per request.
        concurrency: Number of requests at the same time.
        timeout: Seconds for a whole request, however slowly its answer arrives; `None` sets no limit.
        retries: Further attempts to reach a server that is still starting.
        policy_eos_token_ids: Ids that end a completion of the policy; `None` counts every completion as finished.

    Raises:
        ValueError: If the address holds a password, if no reward model answers there, or if its answers are of an
            unknown kind.
    """

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
            gives = info.get("gives", "scores")  # an older version does not say it, and serves no other kind
            if gives not in CARDS:
                found = visible(str(gives))[:80]
                raise ValueError(f"{self.url} gives `{found}`, which this version cannot read. Update this library.")
            self.gives_steps, self.gives_log_odds = gives == "step_rewards", gives == "scores"
            self.__name__ = str(info["name"])
            self.card = None if info["card"] is None else CARDS[gives](**info["card"])
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

    def __call__(  # type: ignore[override]
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]] | None = None, **kwargs: Any
    ) -> Sequence[float | None] | list[Steps | None]:
        """Return one score per completion, or the rewards of its steps; `None` where the score is NaN.

        Raises:
            RewardCallError: If a request fails, but a later one may succeed.
            PermanentRewardError: If the server refuses a request for good.
        """
        finished = finished_completions(len(prompts), completion_ids, self.policy_eos_token_ids)
        columns = {"prompts": prompts, "completions": completions, "finished": finished}
        if self.gives_steps:
            return self._sent(self._step_rewards, **columns)
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

    def _step_rewards(self, batch: dict[str, list[Any]]) -> list[Steps | None]:
        """Return the rewards of the steps of each completion. A step has one character at least."""
        prompts, completions = batch["prompts"], batch["completions"]
        most = sum(map(len, map(as_text, completions)))
        found = self._asked("/step_rewards", batch, NUMBER_BYTES * (most + len(prompts) + 16)).get("step_rewards")
        if not isinstance(found, list) or not all(steps is None or isinstance(steps, list) for steps in found):
            raise RewardCallError(f"{self.url} answered with no step rewards for {len(prompts)} completions")
        try:
            read_answers(found, {"prompts": prompts, "completions": completions})
        except (TypeError, ValueError) as error:
            raise RewardCallError(f"{self.url} answered with wrong step rewards: {visible(str(error))}") from error
        return [None if steps is None else [(end, float(reward)) for end, reward in steps] for steps in found]

    def _answer(self, kind: str, path: str, batch: dict[str, list[Any]], each: int = 1) -> list[Any]:
        count = len(batch["prompts"])
        answer = self._asked(path, batch, NUMBER_BYTES * (each * count + 16))
        return self._numbers(answer.get(kind), kind, count, each)

    def _asked(self, path: str, batch: dict[str, list[Any]], limit: int) -> dict[str, Any]:
        """Return the answer to a request.

        Raises:
            PermanentRewardError: If the server has other weights than at first. An older version does not say it.
        """
        answer = self._post(path, batch, limit)
        self._require_same(answer.get("weights", self.weights) == self.weights)
        return answer
