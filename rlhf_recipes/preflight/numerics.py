"""Compare the numbers of a PPO run with those of plain transformers, before its first step.

The rows are a few short ones of the run's own prompts. Every difference is a root mean square over tokens, in nats.

Tolerance: two forwards of one model round differently if their batches or kernels differ. A logit of size `s` is known
to about `u * s`, with the unit roundoff `u` of the precision (2^-24 in float32, 2^-11 in float16, 2^-8 in bfloat16).
The log-probabilities of the rows give the size. Four such errors are allowed, and at least 1e-4. Forwards of the
same rows in one batch differ only where a kernel adds in a random order: they are allowed an eighth of it.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rlhf_recipes.models.critic import VALUE_HEAD_NAME
from rlhf_recipes.preflight.causes import (
    causes_of_another_start,
    causes_of_dependence,
    causes_of_noise,
    causes_of_other_logits,
)
from rlhf_recipes.preflight.finding import Finding

ROWS, PROMPT_TOKENS, COMPLETION_TOKENS = 3, 16, 8  # at most
ROUNDING_ERRORS, SMALLEST_TOLERANCE, SAME_BATCH = 4, 1e-4, 1 / 8
ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@dataclass(frozen=True)
class Rows:
    """A few short rows of token ids. All lengths differ, so a batch of them has padding on both sides.

    Args:
        prompts: Tokens of the prompts.
        completions: Tokens of the completions.
    """

    prompts: list[list[int]]
    completions: list[list[int]]

    def __getitem__(self, rows: slice) -> "Rows":
        return Rows(self.prompts[rows], self.completions[rows])

    def __len__(self) -> int:
        return len(self.prompts)

    def batch(self, pad: int, device: torch.device) -> dict[str, Tensor]:
        """Return the rows as TRL's rollouts have them: prompts padded on the left, completions on the right."""
        prompts, prompt_mask = _padded([row[::-1] for row in self.prompts], pad, device)
        completions, completion_mask = _padded(self.completions, pad, device)
        return {
            "prompt_ids": prompts.flip(1),
            "prompt_mask": prompt_mask.flip(1),
            "completion_ids": completions,
            "completion_mask": completion_mask,
        }

    def of(self, values: Tensor) -> list[Tensor]:
        """Return the values `(B, T)` of the completion tokens, one tensor per row."""
        return [row[: len(tokens)].float().cpu() for row, tokens in zip(values, self.completions, strict=True)]


def _padded(rows: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    tensors = [torch.tensor(row, device=device) for row in rows]
    mask = [torch.ones_like(x) for x in tensors]
    ids = nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=pad)
    return ids, nn.utils.rnn.pad_sequence(mask, batch_first=True)


class Numbers(Protocol):
    """The forwards of a run. Each returns the log-probabilities of the completion tokens, one tensor per row."""

    model: Any
    args: Any
    precision: torch.dtype

    def policy(self, rows: Rows, *, training: bool) -> list[Tensor]:
        """Run the policy as the update does, on all rows at once."""
        ...

    def plain(self, rows: Rows) -> list[Tensor]:
        """Run the policy's network as plain transformers would: its own logits, row by row, without padding."""
        ...

    def policy_and_reference(self, rows: Rows) -> tuple[list[Tensor], list[Tensor]]:
        """Run both as a rollout does."""
        ...


def short_rows(prompts: Sequence[list[int]]) -> list[list[int]]:
    """Return the ends of a few prompts, each of another length."""
    chosen = [prompts[i % len(prompts)] for i in range(ROWS)]
    return [prompt[-max(PROMPT_TOKENS - 3 * i, 1) :] for i, prompt in enumerate(chosen)]


def sampled_rows(prompts: list[list[int]], next_token_logits: Sequence[Tensor]) -> Rows:
    """Return prompts with completions that are drawn from the distribution of their first token.

    Args:
        prompts: Token ids.
        next_token_logits: Logits `(V,)` of the token after each prompt.
    """
    completions = []
    for i, logits in enumerate(next_token_logits):
        count = max(COMPLETION_TOKENS - 2 * i, 1)
        finite = logits.float().nan_to_num()  # `check_numbers` reports the others
        completions.append(finite.softmax(-1).multinomial(count, replacement=True).tolist())
    return Rows(prompts, completions)


def tolerance(logps: list[Tensor], precision: torch.dtype) -> float:
    """Return the largest difference that rounding explains, nats; see the module's docstring."""
    if precision == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        precision = torch.float16  # TF32 has as many bits
    size = 1 + max(float(row.abs().max()) for row in logps)
    return max(SMALLEST_TOLERANCE, ROUNDING_ERRORS * ROUNDOFF.get(precision, 2.0**-24) * size)


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Return the root mean square of the differences over all tokens. It is infinite if one is not finite."""
    squares = torch.cat([x - y for x, y in zip(ours, theirs, strict=True)]).double().square()
    root = float(squares.mean().sqrt())
    return root if math.isfinite(root) else math.inf


@dataclass(frozen=True)
class NumbersReport:
    """The result of the comparisons.

    Args:
        findings: An error per kind of difference.
        largest: Largest difference that was accepted, nats.
        reference: Log-probabilities of the reference, for `reference_findings`.
    """

    findings: list[Finding]
    largest: float
    reference: list[Tensor]


@dataclass(frozen=True)
class Gradients:
    """The weights that gradients reach, by name.

    Args:
        trained: Weights that may learn.
        by_logps: Weights to which the gradient of the log-probabilities flows.
        by_values: Weights to which the gradient of the values flows.
    """

    trained: frozenset[str]
    by_logps: frozenset[str]
    by_values: frozenset[str]


def check_numbers(
    numbers: Numbers, rows: Rows, start: tuple[Rows, list[Tensor]] | None, *, from_start: bool
) -> NumbersReport:
    """Compare the forwards of a run with each other and with plain transformers.

    Args:
        numbers: Forwards of the run.
        rows: Short rows.
        start: Other rows, and their log-probabilities by the model as it was given; `None` if they are not known.
        from_start: Whether the policy has not been trained yet, so that reference and given model are equal to it.
    """
    model, plain = numbers.model, numbers.plain(rows)
    if not all(row.isfinite().all() for row in plain):
        message = (
            "The policy's log-probabilities are not finite: its weights hold NaN or infinity, or its precision "
            f"({numbers.precision}) is too narrow for it. Load other weights, or use bfloat16 or float32."
        )
        return NumbersReport([Finding("error", message)], math.inf, plain)
    training, again = (numbers.policy(rows, training=True) for _ in range(2))
    together = numbers.policy(rows, training=False)
    single = [x for i in range(len(rows)) for x in numbers.policy(rows[i : i + 1], training=False)]
    pair = numbers.policy(rows[:2], training=False)
    policy, reference = numbers.policy_and_reference(rows)
    noise, dependence = causes_of_noise(model, numbers.args), causes_of_dependence(model)
    other_logits = causes_of_other_logits(model)
    compared = [
        (training, again, True, "Two forwards of the policy in training mode give different numbers", noise),
        (training, together, True, "The policy gives other numbers in training mode than in evaluation mode", noise),
        (single, plain, False, "The run's log-probabilities are not those of the model", other_logits),
        (together, single, False, "A row's log-probabilities depend on the padding of its batch", dependence),
        (pair, single[:2], False, "A row's log-probabilities depend on the other rows of its batch", dependence),
    ]
    findings: dict[str, Finding] = {}  # one per usual cause: the first difference brings the next
    allowed, another = tolerance(plain, numbers.precision), causes_of_another_start(model)
    is_quiet = difference(training, again) <= allowed * SAME_BATCH
    if is_quiet:  # a rollout may run another head of the model than `policy`
        message = "A rollout gives other log-probabilities than the model"
        compared.append((policy, training, False, message, other_logits))
    if from_start and is_quiet:  # noise would make the reference differ too
        message = "The reference is not the policy that training starts from"
        compared.append((policy, reference, True, message, another))
    if from_start and start is not None:
        message = "The policy does not start from the model that was given"
        compared.append((numbers.plain(start[0]), start[1], False, message, another))
    if is_quiet and noise:  # an adapter that starts at zero hides its dropout
        message = f"Training is noisy from the second step on: {'; or '.join(noise)}."
        findings[noise[0]] = Finding("error", message)
    largest = 0.0
    for ours, theirs, same_batch, message, causes in compared:
        limit = allowed * SAME_BATCH if same_batch else allowed
        distance = difference(ours, theirs)
        if distance <= limit:
            largest = max(largest, distance)
        else:
            findings.setdefault((causes or [message])[0], _finding(message, distance, limit, causes))
    return NumbersReport(list(findings.values()), largest, reference)


def _finding(message: str, distance: float, limit: float, causes: list[str]) -> Finding:
    why = f"Usual cause here: {'; or '.join(causes)}." if causes else "None of the usual causes applies here."
    return Finding("error", f"{message}: {distance:.2g} nats per token apart, {limit:.1g} allowed. {why}")


def reward_findings(name: str, ours: list[float], alone: list[float], precisions: set[torch.dtype]) -> list[Finding]:
    """Return an error if a reward model gives other scores in the run than alone.

    Args:
        name: Name of the reward model.
        ours: Scores in the run.
        alone: Scores by plain transformers.
        precisions: Those in which the scores may have been computed; the lowest one counts.
    """
    scores, plain = [torch.tensor(ours)], [torch.tensor(alone)]
    distance, limit = difference(scores, plain), max(tolerance(plain, precision) for precision in precisions)
    if distance <= limit:
        return []
    message = (
        f"The reward model {name} gives other scores in the run than by plain transformers: {distance:.2g} apart, "
        f"{limit:.1g} allowed (for example {ours[0]:.4g} and {alone[0]:.4g}). Check that its directory holds the "
        "tokenizer, the `pad_token_id` and the base that it was trained with."
    )
    return [Finding("error", message)]


def reference_findings(before: list[Tensor], after: list[Tensor], precision: torch.dtype) -> list[Finding]:
    """Return an error if the reference has changed in the first optimiser step."""
    distance, limit = difference(before, after), tolerance(before, precision) * SAME_BATCH
    if distance <= limit:
        return []
    message = "The reference has moved in the first optimiser step: it shares weights that learn"
    return [_finding(message, distance, limit, [])]


def shared_findings(trained: Iterable[str], model: Any) -> list[Finding]:
    """Return an error if weights of the base would learn beside an adapter: the reference has them too.

    Args:
        trained: Names of the weights that may learn.
        model: Policy.
    """
    adapter = getattr(model, "active_adapter", None) if hasattr(model, "peft_config") else None
    shared = [] if adapter is None else [name for name in trained if f".{adapter}" not in name]
    if not shared:
        return []
    message = (
        f"{len(shared)} weights of the base would learn beside the adapter, for example `{shared[0]}`, and the "
        "reference would move with them. Freeze them: in a `LoraConfig`, set `bias: none`."
    )
    return [Finding("error", message)]


def gradient_findings(gradients: Gradients, *, reaches_backbone: bool) -> list[Finding]:
    """Return an error for weights that should learn and do not, and for weights that learn from the wrong loss.

    Args:
        gradients: Weights that gradients reach.
        reaches_backbone: Whether the value loss may train the backbone.
    """
    findings = []
    heads = frozenset(name for name in gradients.trained if VALUE_HEAD_NAME in name)
    policy = gradients.trained - heads
    if unreached := sorted(name for name in policy - gradients.by_logps if "lora_" in name):
        message = (
            f"No gradient reaches {len(unreached)} weights of the adapter, for example `{unreached[0]}`, so they "
            f"would not learn. Take this layer out of `lora_target_modules`."
        )
        findings.append(Finding("error", message))
    elif not policy & gradients.by_logps:
        findings.append(Finding("error", "No gradient reaches the policy, so it would not learn."))
    if heads and not heads & gradients.by_values:
        findings.append(Finding("error", "No gradient reaches the value head, so it would not learn."))
    if not reaches_backbone and (leaked := sorted(gradients.by_values - heads)):
        message = f"The value loss would train {len(leaked)} weights of the policy, for example `{leaked[0]}`."
        findings.append(Finding("error", f"{message}"))
    return findings
