"""Shape the scores of a rollout by the scores of reference answers, which are asked for once per prompt."""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from rlhf_recipes.algorithm.par import preference_as_reward
from rlhf_recipes.data.messages import answer_to
from rlhf_recipes.data.prompts import column_names, rows_of
from rlhf_recipes.options.ppo import PPOConfig
from rlhf_recipes.rewards.protocol import Scorer

COLUMN = "reference_answers"
logger = logging.getLogger(__name__)


class ReferenceAnswers:
    """Know the scores of reference answers, and shape other scores by them.

    A checkpoint keeps the scores: after a resume they are not computed again, in batches that would round otherwise.

    Args:
        score: Reward function: the reward model, with time limits and retries.
        weight: Weight of the reward.
        source: Identity of the reward model, and the rule for its heads. Scores of another one are not taken over.
    """

    def __init__(self, score: Callable[..., Sequence[float | None]], weight: float, source: str = "") -> None:
        self._score, self._weight, self._source = score, weight, source
        self._known: dict[str, list[float]] = {}  # by prompt and answers

    def shaped(self, scores: Tensor, rows: Sequence[dict[str, Any]]) -> Tensor:
        """Return the shaped scores. Every rank must call this.

        Args:
            scores: Weighted scores of this rank, `(B,)`.
            rows: Rows of the data set, one per score, with `prompt` and `reference_answers`.
        """
        new = {key(row): (row["prompt"], row[COLUMN]) for row in rows if key(row) not in self._known}
        new = {name: asked for part in gather_object([new]) for name, asked in part.items()}
        for _, texts in new.values():  # only the first row of a stream was checked before
            check_texts(texts, "the data set")
        self._learn(new)
        known = [torch.tensor(self._known.get(key(row), [torch.nan])) for row in rows]
        references = torch.nn.utils.rnn.pad_sequence(known, batch_first=True, padding_value=torch.nan)
        return preference_as_reward(scores, self._weight * references.to(scores.device, scores.dtype))

    def _learn(self, new: dict[str, tuple[Any, list[str]]]) -> None:
        """Score the reference answers of prompts that are new, each answer on one rank."""
        asked = [(prompt, answer_to(prompt, text)) for prompt, texts in new.values() for text in texts]
        if not asked:
            return
        state = PartialState()
        asked += asked[-1:] * (-len(asked) % state.num_processes)  # every rank calls the model equally often
        with state.split_between_processes(asked) as share:
            prompts, answers = zip(*share, strict=True)
            scores = self._score(prompts=list(prompts), completions=list(answers))
        found = iter(torch.nan if x is None else float(x) for x in gather_object(list(scores)))
        of_prompts = {name: [next(found) for _ in texts] for name, (_, texts) in new.items()}
        # A call that has failed is made again for the next answer to its prompt.
        self._known |= {name: each for name, each in of_prompts.items() if torch.tensor(each).isfinite().any()}

    def state_dict(self) -> dict[str, Any]:
        """Return the scores by prompt, and what they are of."""
        return {"source": self._source, "scores": self._known}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, if the scores are of the same reward model."""
        if state["source"] == self._source:
            self._known = dict(state["scores"])
        elif PartialState().is_main_process:
            logger.warning(
                "The checkpoint has scores of reference answers by another reward model, or by another rule for its "
                "heads. They are computed again."
            )


def key(row: dict[str, Any]) -> str:
    """Return a digest of a prompt and its reference answers."""
    return hashlib.sha256(json.dumps([row["prompt"], row[COLUMN]]).encode()).hexdigest()[:20]


def check_texts(texts: Any, place: str) -> None:
    """Check the reference answers to a prompt.

    Args:
        texts: Value of the column.
        place: Row, for the message.

    Raises:
        ValueError: If it is not a list of texts, or an empty one.
    """
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"`{COLUMN}` in {place} is {str(texts)[:80]!r}, and `reward_shaping: par` needs a list of one or more "
            "texts for each prompt. Complete or remove the row."
        )


def check_reference_answers(args: PPOConfig, scorers: Sequence[Scorer], datasets: dict[str, Any]) -> None:
    """Check that the rewards can be shaped as `reward_shaping` says.

    Args:
        args: Options.
        scorers: Rewards of the run.
        datasets: Data sets by name; `None` for one that is not there.

    Raises:
        ValueError: If there is another reward than one reward model, or a row of a data set has no reference answers.
    """
    if args.reward_shaping == "none":
        return
    if len(scorers) != 1 or not getattr(scorers[0], "gives_log_odds", False):
        raise ValueError(
            "`reward_shaping: par` needs one reward model and no other reward, because only a reward model's score is "
            "a log-odds: leave out `reward_functions`, further reward models, judges and process reward models, or "
            "`reward_shaping`."
        )
    for name, dataset in datasets.items():
        if dataset is not None and COLUMN not in column_names(dataset):
            raise ValueError(
                f"`reward_shaping: par` compares answers with reference answers, and `{name}` has no column "
                f"'{COLUMN}'. Let the SFT policy write it: `add_reference_answers` of "
                "`rlhf_recipes.evaluation.reference_answers`, see docs/over-optimization.md."
            )
        for row, (texts,) in enumerate(rows_of(dataset, [COLUMN]) if dataset is not None else ()):
            check_texts(texts, f"row {row} of `{name}`")
