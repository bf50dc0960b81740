"""Compare the policy during training with the SFT policy, on the same held-out prompts.

The answers at step 0 are the baseline, because the policy is then the SFT policy. This holds with and without an
adapter, and with and without vLLM. Every process must call `finish`.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object

from rlhf_recipes.data.messages import answer_to
from rlhf_recipes.evaluation.figures import TRAINED_SCORE
from rlhf_recipes.evaluation.statistics import compare_scores, preference_rate, swapped_preferences
from rlhf_recipes.rewards.calls import RewardCalls
from rlhf_recipes.rewards.judges import check_absolute

Judge = Callable[..., Any]
JUDGED = "judge/"  # prefix of the name of a judge in a row


class HeldOutComparison:
    """Compute win rates and gains over the baseline for each judge, with intervals over prompts.

    The first judge is the score that PPO is trained on (`score`). Rows with the same prompt are samples of it, so a
    prompt that the dataset repeats counts once.

    Args:
        judges: Functions with TRL's reward signature, by name.
        pairwise_judges: Functions that see both answers, by name; see `swapped_preferences`.
        seed: Seed of the bootstrap.
        calls: Time limit and retries of a judge. Default: those of `RewardCalls()`.

    Raises:
        ValueError: If two judges have the same name, or a judge is named `score`, or if a judge of single answers
            compares the answers of one policy with each other.
    """

    def __init__(
        self,
        judges: dict[str, Judge] | None,
        pairwise_judges: dict[str, Judge] | None,
        *,
        seed: int,
        calls: RewardCalls | None = None,
    ) -> None:
        self.judges, self.pairwise_judges = judges or {}, pairwise_judges or {}
        self._calls = calls or RewardCalls()
        names = [TRAINED_SCORE, *self.judges, *self.pairwise_judges]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"A judge cannot be named as another, or `{TRAINED_SCORE}`, which is what is trained on: "
                f"{', '.join(twice)}. Rename the function or the directory."
            )
        check_absolute(self.judges)
        self._seed = seed
        self._rows: list[dict[str, Any]] = []
        self._baseline: dict[str, list[dict[str, Any]]] = {}

    def add(
        self,
        rows: list[dict[str, Any]],
        inputs: list[dict[str, Any]],
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
    ) -> None:
        """Judge the answers of this process, and keep them until `finish`.

        Args:
            rows: Rows that `samples.sample_rows` returned. The judgements are added to them.
            inputs: Rows of the dataset. Judges see their other columns.
            prompts: Text or messages.
            completions: Text or messages.
            completion_ids: Token ids without padding.
        """
        known = {name: [row[name] for row in inputs] for name in inputs[0] if name not in ("prompt", "completion")}
        for name, judge in self._calls.guard_judges(self.judges).items():
            scores = judge(prompts=prompts, completions=completions, completion_ids=completion_ids, **known)
            for row, score in zip(rows, scores, strict=True):
                row[JUDGED + name] = score
        self._add_preferences(rows, prompts, completions, known)
        self._rows += rows

    def _add_preferences(self, rows: list[dict[str, Any]], prompts: Any, completions: Any, known: Any) -> None:
        seen: dict[str, int] = defaultdict(int)
        pairs = []
        for index, row in enumerate(rows):
            answers = self._baseline.get(row["prompt"], [])
            sample = seen[row["prompt"]] % max(len(answers), 1)
            seen[row["prompt"]] += 1
            if answers:
                pairs.append((index, answers[sample]["completion"]))
        for name, judge in self._calls.guard_judges(self.pairwise_judges).items():
            for row in rows:
                row[JUDGED + name] = 0.5  # the default, where there is no baseline yet: the policy is its own
            if not pairs:
                continue
            chosen = [index for index, _ in pairs]
            theirs = [answer_to(prompts[i], text) for i, text in pairs]
            columns = {column: [values[i] for i in chosen] for column, values in known.items()}
            asked, ours = ([values[i] for i in chosen] for values in (prompts, completions))
            preferences = swapped_preferences(judge, asked, ours, theirs, **columns)
            for index, preference in zip(chosen, preferences, strict=True):
                rows[index][JUDGED + name] = preference

    def finish(self, *, is_start: bool) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Return the metrics of one evaluation, and the rows of all processes.

        Without a baseline the metrics hold no comparison.

        Args:
            is_start: Whether training has not started. These answers are then the baseline.

        Raises:
            RewardCallError: See `RewardCalls.settle`.
        """
        calls = self._calls.settle()
        rows, self._rows = gather_object(self._rows), []
        answers: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in rows:
            answers[row["prompt"]].append(row)
        if is_start:
            self._baseline = dict(answers)
        prompts = [prompt for prompt in answers if prompt in self._baseline]
        if not prompts:
            return calls, rows
        # The last batch may repeat prompts of the first one. All prompts keep the same number of samples.
        count = min(len(x[prompt]) for x in (answers, self._baseline) for prompt in prompts)
        metrics = calls | {"prompts": float(len(prompts))}
        columns = {TRAINED_SCORE: TRAINED_SCORE} | {name: JUDGED + name for name in self.judges}
        for name, column in columns.items():
            ours, theirs = (
                [[row[column] for row in x[prompt][:count]] for prompt in prompts] for x in (answers, self._baseline)
            )
            outcome = compare_scores(ours, theirs, seed=self._seed)
            metrics |= {f"{name}/{key}": value for key, value in outcome.items()}
        for name in self.pairwise_judges:
            preferences = [[row[JUDGED + name] for row in answers[prompt][:count]] for prompt in prompts]
            metrics |= {f"{name}/{key}": value for key, value in preference_rate(preferences, seed=self._seed).items()}
        # This figure selects the best checkpoint. A judge that PPO is not trained on is preferred.
        principal = next(iter((*self.judges, *self.pairwise_judges)), TRAINED_SCORE)
        return metrics | {key: metrics[f"{principal}/{key}"] for key in ("win_rate", "win_rate_low")}, rows

    def check_baseline(self, checkpoint: str) -> None:
        """Check that a checkpoint held the answers of the baseline.

        Raises:
            ValueError: If it did not.
        """
        if not self._baseline:
            raise ValueError(
                f"`eval_strategy` was `no` when {checkpoint} was written: the answers of the SFT policy, with which "
                "the evaluation compares, are missing. Resume with `eval_strategy: no`, or start again."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the answers of the baseline."""
        return {"baseline": self._baseline}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._baseline = state["baseline"]


@contextmanager
def own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch inside, and restore its generators after, so that an evaluation does not change the training.

    Every evaluation draws the same random numbers. This makes the difference from the baseline less noisy.
    """
    accelerator_devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(accelerator_devices, device_type=device.type if accelerator_devices else "cuda"):
        torch.manual_seed(seed)
        yield
