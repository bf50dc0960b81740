"""Rewards of single steps or tokens: a completion's score is their sum, and PPO also uses the parts.

A reward function or a scorer may return, for a completion, one of two lists in place of its score:

- pairs `(end, reward)`, one per step: `end` is the number of characters of the completion's text up to the end of the
  step. The ends rise, and none is beyond the text. The list may be empty.
- numbers, one per token of `completion_ids`.
"""

import bisect
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from os.path import commonprefix
from typing import Any

from trl.trainer.utils import get_callable_name, is_async_callable

from rlhf_recipes.data.messages import Text
from rlhf_recipes.rewards.attempts import RewardCallError, checked_number, checked_rewards, describe_error, short


class DenseReward(float):
    """The score of a completion, which also knows the rewards of its steps or tokens. A pickle holds the score alone.

    Args:
        rewards: Rewards in order; the score is their sum.
        ends: Characters of the text up to the end of each step, or `None` if each token has a reward.
    """

    rewards: tuple[float, ...]
    ends: tuple[int, ...] | None

    def __new__(cls, rewards: Iterable[float], ends: Iterable[int] | None = None) -> "DenseReward":
        """Sum the rewards."""
        rewards = tuple(rewards)
        score = super().__new__(cls, math.fsum(rewards))
        score.rewards, score.ends = rewards, None if ends is None else tuple(ends)
        return score

    def __reduce__(self) -> tuple[Any, ...]:
        return float, (float(self),)

    def by_token(self, text: str, ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[float]:
        """Return the reward of each token of the completion.

        A step belongs to the token in which it ends. A step that ends with the text belongs to the last token, which
        is the EOS if there is one: there the score of a whole completion is, too.

        Args:
            text: Text of the completion, or of its one message.
            ids: Token ids of the completion.
            decode: Function that returns the text of token ids, without special tokens.

        Raises:
            ValueError: If the tokens do not spell the text.
        """
        if self.ends is None:
            return list(self.rewards)
        whole = decode(ids)
        begin = whole.rfind(text)  # a template may take a message's thoughts out of its content
        if begin < 0:
            raise ValueError(
                "its tokens do not spell its text, so its steps have no place in them: return one number per token"
            )
        spelled = functools.cache(lambda count: len(commonprefix([decode(ids[:count]), whole])))
        rewards, place = [0.0] * len(ids), 1
        for end, reward in zip(self.ends, self.rewards, strict=True):
            place = bisect.bisect_left(range(len(ids)), begin + end, lo=place, key=spelled)
            rewards[-1 if end == len(text) else place - 1] += reward
        return rewards


def read_answers(answer: Any, given: dict[str, Any]) -> list[float]:
    """Return the answer of a reward function as one number per completion, NaN for `None`, or a `DenseReward`.

    Args:
        answer: Numbers, `None`, and lists of steps or tokens, in the order of the completions.
        given: Arguments of the call: `prompts`, and for lists `completions` and `completion_ids`.

    Raises:
        TypeError: If something else is among them.
        ValueError: If a list breaks the rules, or if there are more or fewer rewards than completions.
    """

    def read(reward: Any, row: int) -> float:
        parts = reward.tolist() if hasattr(reward, "tolist") else reward
        single = hasattr(reward, "numel") and reward.numel() == 1
        if isinstance(reward, DenseReward) or not isinstance(parts, list | tuple) or single:
            return reward if isinstance(reward, DenseReward) else checked_number(reward, row)
        return _dense(list(parts), row, given)

    return checked_rewards(answer, len(given["prompts"]), read)


def _dense(parts: list[Any], row: int, given: dict[str, Any]) -> DenseReward:
    """Return the rewards of one completion."""
    if "completions" in given and all(isinstance(part, list | tuple) and len(part) == 2 for part in parts):
        rewards = [_part(reward, parts, row) for _, reward in parts]
        ends = [end.item() if hasattr(end, "item") else end for end, _ in parts]  # NumPy's and torch's numbers
        return DenseReward(rewards, _checked_ends(ends, given["completions"][row], row))
    ids = given.get("completion_ids")
    if ids is None:
        raise TypeError(f"it returned {short(parts)} for completion {row}, not a number or `None`")
    if len(parts) != len(ids[row]):
        raise ValueError(
            f"it returned {short(parts)} for completion {row}: {len(parts)} rewards for its {len(ids[row])} tokens. "
            "Return one number per token of `completion_ids`, or pairs `(end, reward)`"
        )
    return DenseReward(_part(part, parts, row) for part in parts)


def _part(reward: Any, parts: list[Any], row: int) -> float:
    """Return the reward of a step or token. It cannot be missing alone: then the sum has no value."""
    number = math.nan if isinstance(reward, list | tuple) else checked_number(reward, row)
    if math.isnan(number):
        raise ValueError(
            f"it returned {short(parts)} for completion {row}, which holds {short(reward)} in place of a number. "
            "Return `None` for the whole completion if it has no reward"
        )
    return number


def _checked_ends(ends: list[Any], completion: Text, row: int) -> list[int]:
    """Return the ends of the steps of a completion, which must rise up to the length of its text at most."""
    length = len(step_text(completion, row))
    for step, (before, end) in enumerate(itertools.pairwise([-1, *ends])):
        where = f"it returned the end {short(end)} for step {step} of completion {row}"
        if not isinstance(end, int) or isinstance(end, bool):
            raise TypeError(f"{where}, not a whole number of characters")
        if end <= before:
            problem = "is negative" if step == 0 else f"is not behind the end {before} of the step before"
            raise ValueError(f"{where}, which {problem}: the ends of the steps must rise")
        if end > length:
            raise ValueError(f"{where}, whose text has only {length} characters")
    return ends


def step_text(completion: Text, row: int) -> str:
    """Return the text in which the ends of steps are counted: the completion, or the content of its one message.

    Raises:
        ValueError: If there are several messages, as with tools, or a message without text.
    """
    if isinstance(completion, str):
        return completion
    content = completion[0].get("content") if len(completion) == 1 else None
    if not isinstance(content, str):
        raise ValueError(
            f"it returned steps for completion {row}, which is not one message of text: return one number per token "
            "of `completion_ids`"
        )
    return content


class KeptAnswer:
    """Call a reward function, and keep its answer: TRL takes the scores only.

    A scorer with a model in this process is not guarded, so its lists are read here.

    Args:
        function: Reward function.
        fail: Function of name, completions and error, which returns the scores of a call whose lists break the rules.
            Without it, the call raises.
        decode: Function that returns the text of token ids, without special tokens. It is needed for `by_token`.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        fail: Callable[[str, int, Exception], list[float]] | None = None,
        decode: Callable[[Sequence[int]], str] | None = None,
    ) -> None:
        self.function, self.__name__ = function, get_callable_name(function)
        self._fail, self._decode = fail, decode
        self.answer: Sequence[Any] = ()
        """Scores of the latest call. Those with parts are a `DenseReward`."""
        self.by_token: list[list[float] | None] = []
        """Rewards of the tokens of each completion, `None` where there is only a score."""

    def __call__(self, **kwargs: Any) -> Sequence[Any]:
        """Return one number per completion."""
        return self.keep(self.function(**kwargs), kwargs)

    def keep(self, answer: Sequence[Any], given: dict[str, Any]) -> Sequence[Any]:
        """Read the lists of an answer, keep it and return it. An answer without lists stays as it is.

        Raises:
            RewardCallError: If a list breaks the rules, or if the tokens of a completion do not spell its text.
        """
        try:
            has_lists = any(isinstance(reward, list | tuple) for reward in answer)
            self.answer = read_answers(answer, given) if has_lists else answer
            if self._decode is not None:
                self.by_token = self.rewards_by_token(given["completions"], given["completion_ids"], self._decode)
        except (TypeError, ValueError) as error:
            if self._fail is None:
                raise RewardCallError(f"`{self.__name__}` failed: {describe_error(error)}.") from error
            self.by_token = [None] * len(given["prompts"])
            self.answer = self._fail(self.__name__, len(given["prompts"]), error)
        return self.answer

    def rewards_by_token(
        self, completions: Sequence[Text], ids: Sequence[Sequence[int]], decode: Callable[[Sequence[int]], str]
    ) -> list[list[float] | None]:
        """Return the reward of each token of each completion, `None` where there is only a score.

        Raises:
            ValueError: If the tokens of a completion do not spell its text.
        """
        rows: list[list[float] | None] = [None] * len(completions)
        for row, reward in enumerate(self.answer):
            if isinstance(reward, DenseReward):
                text = "" if reward.ends is None else step_text(completions[row], row)
                try:
                    rows[row] = reward.by_token(text, ids[row], decode)
                except ValueError as error:
                    raise ValueError(f"it returned steps for completion {row}: {error}") from error
        return rows


class AsyncKeptAnswer(KeptAnswer):
    """Call an async function."""

    async def __call__(self, **kwargs: Any) -> Sequence[Any]:  # type: ignore[override]
        """Return one number per completion."""
        return self.keep(await self.function(**kwargs), kwargs)


def with_kept_answer(function: Callable[..., Any], **given: Any) -> KeptAnswer:
    """Return a reward function that keeps its answers, sync or async as before. `given` is that of `KeptAnswer`."""
    return (AsyncKeptAnswer if is_async_callable(function) else KeptAnswer)(function, **given)
