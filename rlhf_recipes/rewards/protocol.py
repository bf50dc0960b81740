"""The contract of everything that scores a completion.

The trainer, the preflight and the identity of a run use this contract alone. They know no class of reward models.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf_recipes.algorithm.heads import combine_heads
from rlhf_recipes.models.fingerprint import fingerprint
from rlhf_recipes.rewards.card import RewardModelCard


@dataclass(frozen=True)
class ScoringRun:
    """Hold what a run tells its scorers before their first call.

    Args:
        policy: Model in training. A reward adapter joins it.
        policy_eos_token_ids: Ids that end a completion.
        batch_size: Completions per forward pass if all are equally long. More of the short ones share one, within the
            tokens of the longest. On a GPU this is a multiple of the micro-batch.
        timeout: Seconds for one request; `None` sets no limit.
        prepare_frozen: Function that puts a model without gradients on the devices of the run.
        combine: Function of the scores of several heads, `(B, K)`, that returns one score each, `(B,)`.
        output_dir: Output directory of the run.
    """

    policy: Any
    policy_eos_token_ids: list[int]
    batch_size: int
    timeout: float | None
    prepare_frozen: Callable[[Any], Any]
    combine: Callable[[Tensor], Tensor] = combine_heads
    output_dir: str = "."


class Scorer(Protocol):
    """Score completions. A subclass may keep the defaults.

    Args:
        model: Network that runs in this process, if there is one. All processes then call the scorer equally often.
        tokenizer: Tokenizer of the reward model, if this process has it.
        card: Card of the reward model, if it has one.
        gives_states: Whether a critic can read the hidden states of its model: it then has `take_states`,
            `hidden_size` and `score_with_states` of `RewardModelScorer`.
        position_limit: Number of tokens that the model can read at most, if its architecture sets a limit.
        gives_steps: Whether it returns the rewards of steps.
        gives_log_odds: Whether the difference of two scores is the log-odds that the first answer is preferred.
        origin: Module and qualified name of a plain function.
        unknown_tokens: Tokens of its tokenizer, by id, for which it has no embedding. With one of them or with a
            `position_limit`, it has `prompt_lengths` of `RewardModelScorer`.
        is_relative: Whether a score compares an answer with the other answers of the same call. Such scores of two
            policies cannot be compared.
    """

    __name__: str
    model: nn.Module | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    card: RewardModelCard | None = None
    gives_states: bool = False
    gives_steps: bool = False
    gives_log_odds: bool = False
    origin: str = ""
    position_limit: int | None = None
    unknown_tokens: Mapping[int, str] = MappingProxyType({})
    is_relative: bool = False

    def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: Any = None, **kwargs: Any
    ) -> Sequence[float | None]:
        """Return one score per completion; `None` or NaN where there is none. TRL calls reward functions like this.

        A list in place of a score has the rewards of steps or tokens: see `dense.py`.
        """
        ...

    def identity(self) -> str:
        """Return a text that is the same when a run is resumed with the same scorer."""
        return self.__name__

    def prepare(self, run: ScoringRun) -> None:
        """Get ready for the calls of a run."""
        return

    def take_counts(self) -> "Counter[str]":
        """Return what the scorer has counted since the last time. `RewardCalls.settle` adds those of all processes."""
        return Counter()

    def figures(self, counts: "Counter[str]") -> dict[str, float]:
        """Return metrics from the counts of all processes, by name."""
        return {}

    def scores_alone(self, prompts: list[Any], completions: list[Any]) -> tuple[list[float], list[float]] | None:
        """Return scores in the run, and by plain transformers without the run; `None` if they cannot be compared."""
        return None


class FunctionScorer(Scorer):
    """Give a plain function, or a module that is called like one, the contract of a scorer."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__name__ = str(getattr(function, "__name__", type(function).__name__))
        self.model = function if isinstance(function, nn.Module) else None
        named = function if hasattr(function, "__qualname__") else type(function)
        self.origin = f"{named.__module__}.{named.__qualname__}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.function(*args, **kwargs)

    def identity(self) -> str:
        """Return the name of a function, or a hash of a module's weights."""
        return fingerprint(self.function)


def scorer_of(function: Any) -> Scorer:
    """Return a reward function as a `Scorer`: itself, or an adapter around it. TRL keeps the function itself."""
    # The class is asked, because some objects (a proxy of a remote service) answer to every name.
    methods = ("identity", "prepare")
    return function if all(hasattr(type(function), name) for name in methods) else FunctionScorer(function)
