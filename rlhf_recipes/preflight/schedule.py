"""Count the batches, steps, evaluations and checkpoints of a run before it starts.

The counts need only the options and the number of rows.
"""

import math
from dataclasses import dataclass
from typing import Any

from rlhf_recipes.options.baselines import rollout_steps
from rlhf_recipes.options.ppo import PPOConfig
from rlhf_recipes.preflight.finding import Finding

# Half the width of a 95 % interval of a win rate near 1/2 is 0.98 / sqrt(prompts): 0.18 at 30.
MIN_EVALUATION_PROMPTS = 30


@dataclass(frozen=True)
class Schedule:
    """Count the events of a run.

    Args:
        steps: Optimiser steps.
        batch: Rows or completions per optimiser step, over all processes.
        passes: Passes over the training data.
        evaluations: Evaluations during training, with the one at the start.
        checkpoints: Checkpoints that are written. `save_total_limit` decides how many are kept.
    """

    steps: int
    batch: int
    passes: float
    evaluations: int
    checkpoints: int


@dataclass(frozen=True)
class RolloutSchedule(Schedule):
    """Count the events of a run that samples its training data.

    Args:
        rollouts: Rollouts that are sampled. The run may end before the last one is used up.
        rollout: Completions per rollout, over all processes.
        mini_batches: Optimiser steps per epoch over a rollout.
        steps_on_rollout: Optimiser steps on one rollout.
        prompts: Prompts that are drawn from the dataset in the run.
    """

    rollouts: int
    rollout: int
    mini_batches: int
    steps_on_rollout: int
    prompts: int


def rollout_schedule(args: Any, rows: int) -> RolloutSchedule:
    """Return the schedule of a trainer that samples its training data.

    Args:
        args: Options of the run.
        rows: Training prompts, at least as many as in one rollout. A pass leaves out an incomplete rollout.
    """
    prompts_per_rollout = args.generation_batch_size // args.num_generations
    on_rollout = rollout_steps(args)
    steps_per_pass = rows // prompts_per_rollout * on_rollout
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_pass)
    rollouts = math.ceil(steps / on_rollout)
    return RolloutSchedule(
        rollouts=rollouts,
        rollout=args.generation_batch_size,
        mini_batches=on_rollout // args.num_iterations,
        steps_on_rollout=on_rollout,
        prompts=rollouts * prompts_per_rollout,
        batch=args.generation_batch_size * args.gradient_accumulation_steps // args.steps_per_generation,
        **_events(args, steps, steps_per_pass),
    )


def supervised_schedule(args: Any, rows: int) -> Schedule:
    """Return the schedule of a trainer that reads its dataset row by row."""
    micro_batches = math.ceil(rows / (args.train_batch_size * args.world_size))
    steps_per_pass = max(math.ceil(micro_batches / args.gradient_accumulation_steps), 1)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_pass)
    batch = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    return Schedule(batch=batch, **_events(args, steps, steps_per_pass))


def _events(args: Any, steps: int, steps_per_pass: int) -> dict[str, Any]:
    evaluations = _count(args.eval_strategy, args.eval_steps, steps, steps_per_pass, args.eval_delay)
    if args.save_strategy == "best":
        checkpoints = evaluations  # or fewer
    else:
        checkpoints = _count(args.save_strategy, args.save_steps, steps, steps_per_pass)
    return {
        "steps": steps,
        "passes": steps / steps_per_pass,
        "evaluations": evaluations + bool(args.eval_on_start),
        "checkpoints": checkpoints,
    }


def _count(strategy: str, every: float | None, steps: int, steps_per_pass: int, delay: float = 0) -> int:
    """Count an event of transformers' trainer that happens every few steps and at the end, or after each pass."""
    if strategy == "steps" and every:
        every = math.ceil(every * steps) if every < 1 else int(every)
        moments = {*range(every, steps + 1, every), steps}
        return sum(moment >= delay for moment in moments)
    if strategy == "epoch":
        passes = math.ceil(steps / steps_per_pass)
        return sum(min(end, steps / steps_per_pass) >= delay for end in range(1, passes + 1))
    return 0


def schedule_findings(args: Any, schedule: Schedule, evaluation_rows: int | None) -> list[Finding]:
    """Return findings about evaluations and early stopping. `evaluation_rows` is `None` if none gets an answer."""
    findings = []
    if args.eval_strategy == "steps" and (args.eval_steps or 0) > schedule.steps:
        findings.append(
            f"`eval_steps` ({args.eval_steps:g}) is more than the run's {schedule.steps} optimiser steps, so "
            "it is evaluated only at its start and end. Lower `eval_steps`."
        )
    patience = getattr(args, "early_stopping_patience", None)
    if patience is not None and patience >= schedule.evaluations:
        findings.append(
            f"`early_stopping_patience` ({patience}) cannot end a run of {schedule.evaluations} evaluations. Lower "
            "it, or `eval_steps`."
        )
    warmup = getattr(args, "critic_warmup_steps", 0)
    if warmup and warmup >= schedule.steps:
        findings.append(
            f"`critic_warmup_steps` ({warmup}) covers all of the run's {schedule.steps} optimiser steps: the policy "
            "stays as it is. Lower it, or train longer."
        )
    if evaluation_rows is not None and evaluation_rows < MIN_EVALUATION_PROMPTS:
        findings.append(
            f"There are {evaluation_rows} prompts to evaluate on: the 95 % interval of a win rate is then about ±"
            f"{0.98 / math.sqrt(evaluation_rows):.2f}, wider than most gains. Use {MIN_EVALUATION_PROMPTS} or more "
            "(`dataset_test_split`)."
        )
    return [Finding("warning", message) for message in findings]


def kl_findings(args: PPOConfig, schedule: RolloutSchedule) -> list[Finding]:
    """Return findings about options of the KL penalty that have no effect, or have it twice."""
    findings = []
    if args.beta and args.kl_coef:
        findings.append(
            f"The KL is paid twice, in the reward (`kl_coef` {args.kl_coef:g}) and the loss (`beta` {args.beta:g}). "
            "Set one to 0."
        )
    if args.kl_controller == "fixed" and args.target_kl != PPOConfig.target_kl:
        findings.append(
            f"`target_kl` ({args.target_kl:g}) does nothing with `kl_controller: fixed`. Set the latter to `adaptive`."
        )
    completions = schedule.rollouts * schedule.rollout
    if args.kl_controller == "adaptive" and completions < args.kl_horizon:
        findings.append(
            f"`kl_horizon` ({args.kl_horizon}) is more than the run's {completions} completions, so the "
            "controller changes `kl_coef` by less than a fifth in the whole run. Lower `kl_horizon`."
        )
    if args.kl_controller == "adaptive" and schedule.rollout > args.kl_horizon:
        findings.append(
            f"`kl_horizon` ({args.kl_horizon}) is less than one rollout's {schedule.rollout} completions: `kl_coef` "
            "jumps by more than a fifth at a time and overshoots. Raise `kl_horizon`."
        )
    return [Finding("warning", message) for message in findings]
