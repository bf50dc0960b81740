"""Check the numbers of a run before its first step, and the reference after it. The comparisons are in `preflight`."""

import itertools
import time
from typing import Any

import torch
from accelerate.utils import gather_object, parse_flag_from_env
from torch import Tensor
from transformers import TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.models.utils import disable_gradient_checkpointing

from rlhf_recipes.console import print_lines
from rlhf_recipes.data.messages import answer_to
from rlhf_recipes.data.prompts import first_prompts
from rlhf_recipes.evaluation.held_out import own_randomness
from rlhf_recipes.models.critic import causal_lm
from rlhf_recipes.models.loading import SHARDED, mixed_precision
from rlhf_recipes.models.plain import plain_logits, plain_logps
from rlhf_recipes.preflight.finding import Finding
from rlhf_recipes.preflight.numerics import (
    Gradients,
    Rows,
    check_numbers,
    gradient_findings,
    reference_findings,
    reward_findings,
    sampled_rows,
    shared_findings,
    short_rows,
)

EXAMPLES = 32  # rows of the dataset, of which the shortest are scored


def plain_rows(model: Any, rows: Rows, temperature: float) -> list[Tensor]:
    """Return the log-probabilities of the completions of rows by plain transformers."""
    return [plain_logps(model, *row, temperature) for row in zip(rows.prompts, rows.completions, strict=True)]


class RunNumbers:
    """Run policy and reference of a `PPOTrainer` as its rollouts and updates do.

    Args:
        trainer: Trainer whose model is on its device.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.model, self.args = trainer.model, trainer.args
        self.precision = mixed_precision(self.args) or causal_lm(self.model).dtype

    def policy(self, rows: Rows, *, training: bool) -> list[Tensor]:
        """Run the policy as an update does, without gradient."""
        self.model.train(training)
        with torch.no_grad():
            return rows.of(self._forward(rows).per_token_logps)

    def plain(self, rows: Rows) -> list[Tensor]:
        """Run the policy's network as plain transformers would."""
        with self._trainer.accelerator.autocast():
            return plain_rows(self.model, rows, self.args.temperature)

    def policy_and_reference(self, rows: Rows) -> tuple[list[Tensor], list[Tensor]]:
        """Run both as a rollout does."""
        self.model.train()
        batch = self._batch(rows)
        with self._trainer.accelerator.autocast():  # a preflight comes before training has prepared the policy
            return rows.of(self._trainer._forward(self.model, batch).per_token_logps), self.reference(rows)

    def reference(self, rows: Rows) -> list[Tensor]:
        """Run the reference as a rollout does."""
        self.model.train()
        return rows.of(self._trainer._reference_logps(self._batch(rows)))

    def gradients(self, rows: Rows) -> Gradients:
        """Return the weights that the gradients of the log-probabilities and of the values reach."""
        self.model.train()
        trained = self.trained()
        # A checkpointed forward cannot give the gradients of chosen weights.
        with torch.enable_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            forward = self._forward(rows)
            outputs = (forward.per_token_logps, getattr(forward, "state_values", None))
            reached = [frozenset() if x is None else _reached(x, trained) for x in outputs]
        return Gradients(frozenset(trained), *reached)

    def trained(self) -> dict[str, Tensor]:
        """Return the weights of the policy that may learn, by name."""
        return {name: x for name, x in self.model.named_parameters() if x.requires_grad}

    def _batch(self, rows: Rows) -> dict[str, Tensor]:
        return rows.batch(self._trainer._tokenizer.pad_token_id, self._trainer.accelerator.device)

    def _forward(self, rows: Rows) -> Any:
        batch = self._batch(rows)
        length = batch["completion_ids"].size(1)
        ids, mask = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], dim=1) for x in ("ids", "mask"))
        # TRL's head serves long rows. These short ones would go through the model's own head, as those of
        # `policy_and_reference` do: so the check compares both heads.
        forward = self._trainer._completion_forward(self.model, length, own_head=False)
        with self._trainer.accelerator.autocast():
            self._trainer._get_per_token_logps_and_entropies(forward, ids, mask, length)
        return forward


def _reached(outputs: Tensor, weights: dict[str, Tensor]) -> frozenset[str]:
    """Return the names of the weights on which outputs depend."""
    gradients = torch.autograd.grad(outputs.sum(), list(weights.values()), retain_graph=True, allow_unused=True)
    return frozenset(name for name, x in zip(weights, gradients, strict=True) if x is not None)


class NumbersCallback(TrainerCallback):
    """Check the numbers when training begins, and once more that the reference stays, after the first step.

    Args:
        trainer: A `PPOTrainer`.
        start: Rows, and their log-probabilities by the model as it was given; `None` if they are not known.
    """

    def __init__(self, trainer: Any, start: tuple[Rows, list[Tensor]] | None) -> None:
        self._trainer, self._start = trainer, start
        self._reference: tuple[Rows, list[Tensor]] | None = None
        self._is_done = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the numbers of a run that starts or is resumed, and end it if they disagree.

        Raises:
            ValueError: If they do.
        """
        if not self._is_done:  # else the policy has moved: a second call of `train`, or a rollback
            self.check(from_start=state.global_step == 0)

    def check(self, *, from_start: bool) -> None:
        """Compare the numbers, and print the result.

        Args:
            from_start: Whether the policy has not been trained yet.

        Raises:
            ValueError: If they disagree.
        """
        self._is_done, trainer, begin = True, self._trainer, time.perf_counter()
        args = trainer.args
        was_training = trainer.model.training
        with own_randomness(args.seed, trainer.accelerator.device):
            numbers, rows = RunNumbers(trainer), self._rows()
            report = check_numbers(numbers, rows, self._start, from_start=from_start)
            findings = report.findings
            if trainer.accelerator.distributed_type not in SHARDED:
                findings = [*findings, *shared_findings(numbers.trained(), trainer.model)]
                reaches_backbone = args.value_gradient_to_backbone
                found = gradient_findings(numbers.gradients(rows), reaches_backbone=reaches_backbone)
                findings += [*found, *self._reward_findings(rows, numbers.precision)]
            self._reference = rows, report.reference
        trainer.model.train(was_training)
        self._end_together(findings)
        if trainer.accelerator.is_main_process:
            seconds = time.perf_counter() - begin
            print_lines(
                "Numbers: training, evaluation, plain transformers, reference and padding agree within "
                f"{report.largest:.1g} nats per token ({seconds:.1f} s)."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check after the first step that the reference has not moved.

        Raises:
            ValueError: If it has.
        """
        if self._reference is None:
            return
        (rows, before), self._reference = self._reference, None
        with own_randomness(args.seed, self._trainer.accelerator.device):
            numbers = RunNumbers(self._trainer)
            self._end_together(reference_findings(before, numbers.reference(rows), numbers.precision))

    def _reward_findings(self, rows: Rows, precision: torch.dtype) -> list[Finding]:
        """Compare the scores of short answers to the shortest of the first prompts.

        Args:
            rows: Short rows.
            precision: Precision of the policy: in a run of mixed precision, reward models run in it too.
        """
        prompts = sorted(
            itertools.islice(self._trainer.train_dataset, EXAMPLES), key=lambda row: len(str(row["prompt"]))
        )
        prompts = [row["prompt"] for row in prompts[: len(rows)]]
        texts = self._trainer._tokenizer.batch_decode(rows.completions[: len(prompts)], skip_special_tokens=True)
        answers = [answer_to(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        findings = []
        for scorer in self._trainer.scorers:
            with self._trainer.accelerator.autocast():
                compared = scorer.scores_alone(prompts, answers)
            if compared is not None:
                ours, alone = compared
                rounded = {torch.bfloat16} if getattr(scorer.model, "is_quantized", False) else set()
                precisions = {precision, scorer.model.dtype} | rounded  # bitsandbytes computes in bfloat16
                findings += reward_findings(scorer.__name__, ours, alone, precisions)
        return findings

    def _rows(self) -> Rows:
        trainer = self._trainer
        prompts = short_rows(first_prompts(trainer.train_dataset, trainer.processing_class))
        with trainer.accelerator.autocast():
            return sampled_rows(prompts, [plain_logits(trainer.model, prompt)[-1] for prompt in prompts])

    def _end_together(self, findings: list[Finding]) -> None:
        """Raise the messages of all processes on each of them, so that none waits for another."""
        messages = [finding.message for finding in findings]
        if self._trainer.accelerator.num_processes > 1:
            messages = gather_object(messages)
        if messages:
            raise ValueError(" ".join([*dict.fromkeys(messages), "`check_numerics: false` switches this check off."]))


def given_model(model: Any, prompts: list[list[int]], args: Any) -> tuple[Rows, list[Tensor]] | None:
    """Return a short row, and its log-probabilities by a model to which nothing has been added yet.

    The model moves to the run's device for this, where the trainer would move it later. A model whose weights will be
    in shards cannot be run before training: the result is then `None`.
    """
    if is_deepspeed_zero3_enabled() or args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    if next(model.parameters()).device.type != args.device.type:
        model.to(args.device)
    row = next((row for row in short_rows(prompts) if len(row) > 1), None)
    if row is None:
        return None
    rows = Rows([row[:1]], [row[1:]])
    mixed = mixed_precision(args)
    with torch.autocast(args.device.type, dtype=mixed, enabled=mixed is not None):
        return rows, plain_rows(model, rows, args.temperature)
