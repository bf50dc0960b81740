"""A language model as a judge: it compares two answers to a prompt, or scores one.

It may stand where a reward function or a judge may: as a reward of PPO, in evaluations, and to label pairs. Every pair
is asked about in both orders. Answers are kept on disk.
"""

import hashlib
import json
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import Future
from itertools import combinations
from pathlib import Path
from threading import Lock
from typing import Any

from rlhf_recipes.console import visible
from rlhf_recipes.data.messages import as_text
from rlhf_recipes.options.judge import JudgeConfig, read_judge
from rlhf_recipes.options.secrets import redact
from rlhf_recipes.rewards.attempts import PermanentRewardError
from rlhf_recipes.rewards.judge_answers import DEFAULT_FILE, Answer, AnswerCache
from rlhf_recipes.rewards.judge_backends import ChatServer, JudgeBackend, LocalModel
from rlhf_recipes.rewards.judge_questions import points_in, preference_in, question_about
from rlhf_recipes.rewards.protocol import Scorer, ScoringRun
from rlhf_recipes.rewards.threads import DaemonPool

SHOWN_CHARACTERS = 200  # of an answer without a verdict
# Figures that are shares: what is counted, and of how many.
SHARES = {
    "tied": ("tied", "pairs"),
    "flipped": ("flipped", "pairs"),
    "first_position_wins": ("first", "decided"),
    "refused": ("refused", "questions"),
    "unreadable": ("unreadable", "questions"),
}
TOTALS = ("requests", "tokens")
logger = logging.getLogger(__name__)


def load_judge(path: str, output_dir: str | None = None) -> "LanguageModelJudge":
    """Return the judge that a YAML file describes.

    Args:
        path: File.
        output_dir: Directory for the answers, if the file names no `cache`. A trainer sets its own. Default: the
            working directory.

    Raises:
        ValueError: If the file is wrong, the server does not answer or refuses the key, or the cache is damaged.
    """
    config = read_judge(path)
    backend: JudgeBackend = LocalModel(config) if config.address is None else ChatServer(config)
    judge = LanguageModelJudge(config, backend, name=Path(path).stem, origin=path)
    if output_dir is not None or config.cache is not None:
        judge.keep_answers(output_dir or ".")
    return judge


class LanguageModelJudge(Scorer):
    """Compare or score answers with a language model.

    Args:
        config: Description of the judge.
        backend: Place where the model runs.
        name: Name in metrics and tables.
        origin: File of the description.
    """

    def __init__(self, config: JudgeConfig, backend: JudgeBackend, *, name: str, origin: str = "") -> None:
        self.config, self._backend, self.__name__, self.origin = config, backend, name, origin
        self.is_relative = config.mode == "pairs" and config.reference_column is None
        self._cache = AnswerCache(config.cache or DEFAULT_FILE)
        self._lock = Lock()
        self._asked: dict[str, Future[dict[str, Answer]]] = {}  # questions that wait for an answer
        self._waiting: Counter[Future[dict[str, Answer]]] = Counter()  # calls that wait for each
        self._counts: Counter[str] = Counter()

    def identity(self) -> str:
        """Return a hash of all that determines a verdict. The address, the key and the limits are not in it."""
        own = (self.config.mode, self.config.question, self.config.rubric, self.config.verdict_field)
        return _hash("judge", self._backend.identity, self.config.request, own, self.config.reference_column)[:16]

    def prepare(self, run: ScoringRun) -> None:
        """Keep the answers in the output directory of a run."""
        self.keep_answers(run.output_dir)

    def keep_answers(self, output_dir: str) -> None:
        """Keep the answers in a directory, unless the description names a file.

        Raises:
            ValueError: If the file is damaged, or cannot be written.
        """
        self._cache = AnswerCache(self.config.cache or Path(output_dir, DEFAULT_FILE))
        self._cache.check()

    def __call__(
        self,
        prompts: list[Any],
        completions: list[Any] | None = None,
        completion_ids: Any = None,
        *,
        completions_a: list[Any] | None = None,
        completions_b: list[Any] | None = None,
        **columns: Any,
    ) -> list[float]:
        """Score single answers, or compare pairs: with the arguments of a reward function, or of a pairwise judge.

        A single answer gets its points, or its share of wins: against the reference, or against the other answers to
        the same prompt. NaN stands for no verdict.

        Raises:
            RewardCallError: If the judge does not answer now.
            PermanentRewardError: If it never will, or the dataset lacks the column of the reference.
        """
        if completions_a is not None and completions_b is not None:
            return self.compare(prompts, completions_a, completions_b)
        if completions is None:
            raise PermanentRewardError("a judge needs `completions`, or `completions_a` and `completions_b`")
        if self.config.mode == "scores":
            return self._points(prompts, completions)
        if self.config.reference_column is None:
            return self._round_robin(prompts, completions)
        if self.config.reference_column not in columns:
            raise PermanentRewardError(
                f"the dataset has no column `{self.config.reference_column}` (`reference_column` of the judge)"
            )
        return self.compare(prompts, completions, columns[self.config.reference_column])

    def compare(self, prompts: Sequence[Any], first: Sequence[Any], second: Sequence[Any]) -> list[float]:
        """Return for each pair 1 if its first answer is better, 0 if the second is, 0.5 for a tie, NaN if unknown.

        The judge sees each pair in both orders. If its two verdicts are not for the same answer, the pair is a tie. If
        one of them is missing, the result is NaN. Equal answers are a tie without a question.

        Args:
            prompts: Text or messages.
            first: Answers in the form of the prompts.
            second: Answers to compare with.
        """
        if self.config.mode == "scores":
            points = (self._points(prompts, answers) for answers in (first, second))
            results = [math.nan if math.isnan(a + b) else (1 + _sign(a - b)) / 2 for a, b in zip(*points, strict=True)]
        else:
            results = self._compared(prompts, first, second)
        self._count(pairs=len(results), tied=results.count(0.5))
        return results

    def _compared(self, prompts: Sequence[Any], first: Sequence[Any], second: Sequence[Any]) -> list[float]:
        """Return the results of pairs that the judge sees in both orders."""
        rows = list(zip(prompts, first, second, strict=True))
        differ = [row for row, (_, a, b) in enumerate(rows) if as_text(a) != as_text(b)]
        orders = [order for row in differ for order in (rows[row], (rows[row][0], rows[row][2], rows[row][1]))]
        verdicts = self._verdicts([question_about(self.config, *order) for order in orders])
        results = [0.5] * len(rows)
        for place, row in enumerate(differ):
            results[row] = self._result(*verdicts[2 * place : 2 * place + 2])
        return results

    def _result(self, in_order: float | None, swapped: float | None) -> float:
        """Return the result of a pair from the preferences for the answer that stood first, in both orders."""
        decided = [verdict for verdict in (in_order, swapped) if verdict in (0.0, 1.0)]
        self._count(decided=len(decided), first=decided.count(1.0))
        if in_order is None or swapped is None:
            return math.nan
        self._count(flipped=len(decided) == 2 and in_order == swapped)
        return in_order if in_order == 1 - swapped else 0.5

    def _round_robin(self, prompts: list[Any], completions: list[Any]) -> list[float]:
        """Return for each answer the mean of its results against the other answers to the same prompt."""
        rivals: dict[str, list[int]] = defaultdict(list)
        for row, prompt in enumerate(prompts):
            rivals[as_text(prompt)].append(row)
        pairs = [pair for rows in rivals.values() for pair in combinations(rows, 2)]
        sides = ((prompts, 0), (completions, 0), (completions, 1))
        if not pairs and prompts:
            logger.warning(
                f"The judge `{self.__name__}` compares the answers to a prompt with each other, and here each prompt "
                "has one answer only: none gets a score. Set `num_generations`, or `reference_column` in the judge."
            )
        asked, first, second = ([column[pair[side]] for pair in pairs] for column, side in sides)
        results: dict[int, list[float]] = defaultdict(list)
        for (a, b), result in zip(pairs, self.compare(asked, first, second), strict=True):
            if not math.isnan(result):
                results[a].append(result)
                results[b].append(1 - result)
        return [sum(results[row]) / len(results[row]) if results[row] else math.nan for row in range(len(prompts))]

    def _points(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
        questions = [question_about(self.config, *row) for row in zip(prompts, completions, strict=True)]
        return [math.nan if verdict is None else verdict for verdict in self._verdicts(questions)]

    def _verdicts(self, questions: list[str]) -> list[float | None]:
        """Return the verdict on each question, `None` where it is missing, and count these."""
        answers, read = self._answers(questions), preference_in if self.config.mode == "pairs" else points_in
        verdicts = [read(a.text, self.config.verdict_field) if a.end == "stop" else None for a in answers]
        refused = sum(answer.end == "refused" for answer in answers)
        unreadable = [
            a for a, verdict in zip(answers, verdicts, strict=True) if verdict is None and a.end != "refused"
        ]
        self._count(questions=len(questions), refused=refused, unreadable=len(unreadable))
        if unreadable and len(unreadable) == len(answers) - refused:
            end = "It was cut off: raise `max_tokens` in `sampling`." if unreadable[0].end == "length" else ""
            shown = visible(redact(unreadable[0].text[-SHOWN_CHARACTERS:]))
            logger.warning(
                f"No answer of the judge `{self.__name__}` holds a verdict. The first one ends with {shown!r}. {end}"
            )
        return verdicts

    def _answers(self, questions: list[str]) -> list[Answer]:
        """Return the answer to each question: from the cache, or by asking. Equal questions are asked once."""
        keys = [_hash(self._backend.identity, self.config.request, question) for question in questions]
        known = self._cache.known(keys) if keys else {}
        missing = {key: question for key, question in zip(keys, questions, strict=True) if key not in known}
        known |= self._ask(missing)
        return [known[key] for key in keys]

    def _ask(self, missing: dict[str, str]) -> dict[str, Answer]:
        """Ask, several at the same time. A call that was left at its time limit may still ask: its answers count.

        Args:
            missing: Questions by key.
        """
        futures = self._started(missing)
        try:
            return {
                key: answer for future in dict.fromkeys(futures.values()) for key, answer in future.result().items()
            }
        finally:
            self._leave(set(futures.values()))

    def _leave(self, futures: "set[Future[dict[str, Answer]]]") -> None:
        """Wait no longer. Questions for which no other call waits are not asked, if they have not begun."""
        with self._lock:
            self._waiting.subtract(futures)
            left = {future for future in futures if self._waiting[future] < 1}
            for future in left:
                del self._waiting[future]
            cancelled = {future for future in left if future.cancel()}
            for key in [key for key, future in self._asked.items() if future in cancelled]:
                del self._asked[key]

    def _started(self, missing: dict[str, str]) -> "dict[str, Future[dict[str, Answer]]]":
        """Start to ask the questions that nobody is asking yet. Return the answers to come, by key."""
        with self._lock:
            new, size = [key for key in missing if key not in self._asked], self._backend.batch_size
            batches = [new[start : start + size] for start in range(0, len(new), size)]
            pool = DaemonPool(min(self._backend.concurrency, len(batches)))
            for batch in batches:
                future = pool.submit(self._ask_batch, {key: missing[key] for key in batch})
                self._asked |= dict.fromkeys(batch, future)
            pool.close()
            futures = {key: self._asked[key] for key in missing}
            self._waiting.update(set(futures.values()))
            return futures

    def _ask_batch(self, questions: dict[str, str]) -> dict[str, Answer]:
        """Ask questions, but for those that another process or thread has asked in the meantime."""
        try:
            known = self._cache.known(questions)
            missing = {key: question for key, question in questions.items() if key not in known}
            answers = self._backend.answers(list(missing.values())) if missing else []
            self._count(requests=len(answers), tokens=sum(answer.tokens for answer in answers))
            return known | {key: self._cache.keep(key, answer) for key, answer in zip(missing, answers, strict=True)}
        finally:
            self._forget(questions)

    def _forget(self, keys: Any) -> None:
        with self._lock:
            for key in keys:
                self._asked.pop(key, None)

    def _count(self, **numbers: float) -> None:
        with self._lock:
            self._counts.update(numbers)

    def take_counts(self) -> Counter[str]:
        """Return what was counted since the last time: pairs, verdicts, requests and tokens."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return counts

    def figures(self, counts: Counter[str]) -> dict[str, float]:
        """Return shares of ties, flips, refusals and unreadable answers, and the requests and tokens."""
        shares = {name: counts[part] / counts[of] for name, (part, of) in SHARES.items() if counts[of]}
        return shares | {name: float(counts[name]) for name in TOTALS}


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _sign(number: float) -> int:
    return (number > 0) - (number < 0)
