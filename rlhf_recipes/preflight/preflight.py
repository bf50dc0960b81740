"""Print the plan of a run, its needs and its mistakes before its first step.

A warning is printed. An error ends the run on all processes. The checks are in `schedule`, `dataset`, `resources` and
`policy`. The preflight changes nothing: a run trains the same weights with it and without it.
"""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from peft import PeftModel
from trl import is_conversational

from rlhf_recipes.durability.checkpoints import checkpoint_to_resume
from rlhf_recipes.durability.ending import wait_to_end
from rlhf_recipes.models.forward import rows_without_gradient
from rlhf_recipes.models.loading import SHARDED
from rlhf_recipes.models.memory import free_memory, rows_that_fit, sampling_bytes
from rlhf_recipes.models.vocabulary import inner_tokenizer
from rlhf_recipes.options.baselines import samples_rollouts
from rlhf_recipes.options.paths import is_address
from rlhf_recipes.options.recipes import PreflightArguments, TrackingArguments, is_recorded, tracking_uri
from rlhf_recipes.preflight.dataset import check_left_out, check_preferences, check_prompts, longer_chosen, texts
from rlhf_recipes.preflight.examples import example_lines
from rlhf_recipes.preflight.policy import (
    PROBES,
    answers_of,
    card_findings,
    end_findings,
    options_of_sampler,
    probe,
    sampling_findings,
    score_findings,
    turn_findings,
)
from rlhf_recipes.preflight.rates import rate_findings, rate_line
from rlhf_recipes.preflight.report import Report
from rlhf_recipes.preflight.resources import (
    activation_bytes,
    checkpoint_bytes,
    disk_findings,
    free_disk,
    gigabytes,
    memory_findings,
    memory_to_come,
    number_of_parameters,
    parameter_bytes,
    planned_bytes,
    scoring_bytes,
    training_sizes,
)
from rlhf_recipes.preflight.schedule import (
    Schedule,
    kl_findings,
    rollout_schedule,
    schedule_findings,
    supervised_schedule,
)
from rlhf_recipes.rewards.card import heads_of, tokenizer_fingerprint
from rlhf_recipes.rewards.dense import with_kept_answer
from rlhf_recipes.rewards.functions import score_statistics
from rlhf_recipes.rewards.protocol import Scorer

LONGEST = 64  # prompts with the most characters; only their tokens are counted
MEASURED = 10_000  # tokenised rows whose lengths are read


def preflight(
    trainer: Any,
    train: Dataset,
    evaluation: Dataset | None,
    preflight_args: PreflightArguments,
    tracking: TrackingArguments,
    *,
    with_answers: Dataset | None = None,
) -> None:
    """Print the plan and the likely mistakes of a run. Every process must call this.

    Args:
        trainer: Trainer that is ready to train.
        train: Training data, before the trainer changes it.
        evaluation: Evaluation data, before the trainer changes it.
        preflight_args: Options that say whether to stop here.
        tracking: Options that say whether MLflow gets a copy of the model.
        with_answers: Rows of `train` with their answers, which no trainer that samples sees. The reward model scores
            some of them.

    Raises:
        ValueError: If a finding is certain to stop the run or to make it worthless, or if there is no checkpoint where
            `resume_from_checkpoint` says.
        SystemExit: If `preflight_only` is set: 1 with errors, else 0.
    """
    report, state = Report(), PartialState()
    if preflight_args.preflight_only:  # otherwise training begins with it
        checkpoint_to_resume(trainer.args.resume_from_checkpoint, trainer.args.output_dir)
    samples = samples_rollouts(trainer.args)
    if samples:
        _check_rewards(report, trainer, with_answers)  # on all processes, because a reward model may be in shards
    if state.is_main_process:
        schedule = (_check_rollouts if samples else _check_supervised)(report, trainer, train, evaluation)
        _check_disk(report, trainer, schedule, tracking)
        _check_memory(report, trainer, train)
        _check_rate(report, trainer)
        report.lines |= example_lines(trainer)
        processes = _counted(state.num_processes, "process", "processes")
        report.write(f"Preflight: {processes} on {state.device.type}, {schedule.steps:,} optimiser steps")
    errors = [report.errors]
    if state.num_processes > 1:
        broadcast_object_list(errors)
    if preflight_args.preflight_only:
        numbers = getattr(trainer, "numbers", None)
        if not errors[0] and numbers is not None and trainer.accelerator.distributed_type not in SHARDED:
            numbers.check(from_start=True)  # otherwise training begins with it
        wait_to_end()
        trainer.accelerator.end_training()
        raise SystemExit(1 if errors[0] else 0)
    if errors[0]:
        raise ValueError(" ".join(errors[0]))


def _counted(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def _check_rollouts(report: Report, trainer: Any, train: Dataset, evaluation: Dataset | None) -> Schedule:
    args, rewards = trainer.args, report.lines.pop("reward")
    schedule = rollout_schedule(args, len(train))
    per_prompt = f", {args.num_generations} per prompt" if args.num_generations > 1 else ""
    report.lines["rollout"] = (
        f"{schedule.rollout:,} completions ({args.per_device_train_batch_size} x "
        f"{_counted(args.world_size, 'process', 'processes')} x {args.steps_per_generation} steps){per_prompt}"
    )
    report.lines["updates"] = (
        f"{_counted(args.num_iterations, 'epoch', 'epochs')} of "
        f"{_counted(schedule.mini_batches, 'mini-batch', 'mini-batches')} of {schedule.batch}: "
        f"{_counted(schedule.steps_on_rollout, 'optimiser step', 'optimiser steps')} per rollout"
    )
    completions = schedule.rollouts * schedule.rollout
    report.lines["run"] = (
        f"{_counted(schedule.rollouts, 'rollout', 'rollouts')}, {completions:,} completions, at most "
        f"{completions * args.max_completion_length:,} tokens"
    )
    report.lines["data"] = f"{len(train):,} prompts, {schedule.prompts:,} drawn ({schedule.passes:.2f} passes)"
    _add_events(report, schedule, args, evaluation)
    report.lines["reward"] = rewards
    report.findings += schedule_findings(args, schedule, None if evaluation is None else len(evaluation))
    report.findings += check_prompts(train, evaluation)
    report.findings += kl_findings(args, schedule) if hasattr(args, "kl_coef") else []
    options = options_of_sampler(trainer)
    vocab_size = trainer.model.config.get_text_config().vocab_size
    if is_conversational(train[0]):
        tokenizer = inner_tokenizer(trainer.processing_class)
        report.findings += turn_findings(tokenizer, trainer.eos_token_ids)
    report.findings += end_findings(trainer.eos_token_ids, vocab_size, options, args.max_completion_length)
    report.findings += sampling_findings(options)
    return schedule


def _check_supervised(report: Report, trainer: Any, train: Dataset, evaluation: Dataset | None) -> Schedule:
    args, rows = trainer.args, len(trainer.train_dataset)
    schedule = supervised_schedule(args, rows)
    report.lines["updates"] = (
        f"{schedule.batch:,} rows per optimiser step ({args.train_batch_size} x "
        f"{_counted(args.world_size, 'process', 'processes')} x {args.gradient_accumulation_steps} accumulated)"
    )
    report.lines["data"] = f"{rows:,} rows, {schedule.passes:.2f} passes"
    _add_events(report, schedule, args, evaluation)
    report.findings += schedule_findings(args, schedule, None)
    if "chosen" in train.column_names:
        share = longer_chosen(texts(train, ["chosen", "rejected"]))
        report.lines["data"] += "" if share is None else f"; the longer answer is chosen in {share:.0%}"
        report.findings += check_preferences(train, evaluation)
    report.findings += check_left_out(train, trainer.train_dataset, args, "")
    if evaluation is not None:
        report.findings += check_left_out(evaluation, trainer.eval_dataset, args, " for evaluation")
    return schedule


def _check_rate(report: Report, trainer: Any) -> None:
    options, lora = type(trainer.args), isinstance(trainer.model, PeftModel)
    parameters = number_of_parameters(trainer.model)
    report.lines["rate"] = rate_line(options, trainer.args.learning_rate, parameters, lora=lora)
    report.findings += rate_findings(options, trainer.args.learning_rate, parameters, lora=lora)


def _add_events(report: Report, schedule: Schedule, args: Any, evaluation: Dataset | None) -> None:
    if schedule.evaluations and evaluation is not None:
        report.lines["evaluation"] = f"{_counted(schedule.evaluations, 'time', 'times')} on {len(evaluation):,} rows"
    kept = "" if not args.save_total_limit else f", the last {args.save_total_limit} kept"
    report.lines["checkpoints"] = f"{schedule.checkpoints}{kept}, and the final model"


def _check_rewards(report: Report, trainer: Any, with_answers: Dataset | None) -> None:
    described, args, weights = [], trainer.args, trainer.reward_weights.tolist()
    scorers = trainer.scorers
    for name, scorer, weight in zip(trainer.reward_func_names, scorers, weights, strict=True):
        described.append(_describe(name, scorer, trainer.processing_class))
        report.findings += card_findings(scorer, args, weight, alone=len(scorers) == 1)
        # The shards of the policy are assembled only when training begins.
        in_shards = scorer.model is trainer.model and trainer.accelerator.distributed_type in SHARDED
        if scorer.model is None or in_shards:
            continue
        prompts, answers, own = probe(
            trainer.train_dataset[:PROBES]["prompt"], None if with_answers is None else answers_of(with_answers)
        )
        scores = with_kept_answer(scorer)(prompts=prompts, completions=answers)  # a list of rewards as its sum
        # Only PPO normalises scores.
        normalizes = getattr(args, "reward_norm", False) and len(scorers) == 1
        from_card = normalizes and score_statistics([scorer], torch.ones(1), args.reward_heads) is not None
        clip = args.reward_norm_clip if from_card else None
        report.findings += score_findings(scorer, scores, own, clip)
    report.lines["reward"] = "; ".join(described)


def _describe(name: str, scorer: Scorer, tokenizer: Any) -> str:
    parts, card = [name], scorer.card
    if card is not None and card.eval_accuracy is not None:
        parts.append(f"accuracy {card.eval_accuracy:.2f}")
    if card is not None and card.score_mean is not None and card.score_std is not None:
        parts.append(f"score {card.score_mean:.2f} ± {card.score_std:.2f}")
    if heads_of(card) > 1:
        parts.append(f"{heads_of(card)} heads")
    tokenizer = inner_tokenizer(tokenizer)
    own = scorer.tokenizer
    if own is not None and tokenizer_fingerprint(own) != tokenizer_fingerprint(tokenizer):
        parts.append("tokenizer of its own")
    return ", ".join(parts)


def _check_disk(report: Report, trainer: Any, schedule: Schedule, tracking: TrackingArguments) -> None:
    args, critic = trainer.args, getattr(trainer, "critic", None)
    sizes = training_sizes(trainer.model, args, adapter=isinstance(trainer.model, PeftModel), critic=critic)
    one = checkpoint_bytes(sizes, only_model=args.save_only_model)
    final = checkpoint_bytes(sizes, only_model=True)
    keeps_copy = is_recorded(tracking) and tracking.log_model and not is_address(tracking_uri(tracking))
    planned = planned_bytes(one, final, schedule.checkpoints, args.save_total_limit, 1 + keeps_copy)
    free = free_disk(args.output_dir)
    report.lines["disk"] = f"up to {gigabytes(planned)} to be written, {gigabytes(free)} free"
    first = one if schedule.checkpoints else final
    report.findings += disk_findings(args.output_dir, free, first, planned)


def _check_memory(report: Report, trainer: Any, train: Dataset) -> None:
    args, model, critic = trainer.args, trainer.model, getattr(trainer, "critic", None)
    config, device = model.config.get_text_config(), args.device
    scorers = [scorer.model for scorer in getattr(trainer, "scorers", ())]
    frozen = [m for m in (getattr(trainer, "ref_model", None), *scorers) if m is not None]
    width = 2 if args.bf16 or args.fp16 or model.dtype in (torch.bfloat16, torch.float16) else 4
    sequence, rows, generation = _longest(trainer, train), args.per_device_train_batch_size, 0
    spread = {"processes": args.world_size, "sharded": trainer.accelerator.distributed_type in SHARDED}
    sizes = training_sizes(model, args, adapter=False, critic=critic)
    free = free_memory(device) // (args.world_size if device.type == "cpu" else 1)
    if samples_rollouts(args):
        row = sampling_bytes(config, sequence, args.max_completion_length, width=width)
        left = free - memory_to_come(sizes, 0, 0, **spread)
        generation = row * _sampled_at_once(report, trainer, row, left)
        sequence += args.max_completion_length
        tokens = rows_without_gradient(rows, device) * sequence
        generation = max(generation, scoring_bytes(config, tokens, args, critic, width=width))
    elif "chosen" in train.column_names:
        rows *= 2
    activations = activation_bytes(config, rows * sequence, width=width, checkpointing=args.gradient_checkpointing)
    to_come = memory_to_come(sizes, activations, generation, **spread)
    report.lines["memory"] = (
        f"{gigabytes(parameter_bytes([model, *frozen]))} of weights loaded, about {gigabytes(to_come)} to come, "
        f"{gigabytes(free)} free (estimate)"
    )
    report.findings += memory_findings(to_come, free, str(device))


def _sampled_at_once(report: Report, trainer: Any, row_bytes: int, free: int) -> int:
    """Return how many completions a process samples at the same time, and report it if these are not all of them."""
    args = trainer.args
    sampled = 0 if args.use_vllm else args.per_device_train_batch_size * args.steps_per_generation
    chosen = trainer.rows_at_once
    fit = sampled if args.device.type == "cpu" else rows_that_fit(sampled, row_bytes, free)
    has_images = bool({"image", "images"} & {*trainer.train_dataset.column_names})  # such a batch is not cut
    at_once = sampled if has_images else min(sampled, chosen or fit)
    if at_once < sampled:  # the free memory differs between now and the rollouts
        rows = f"{at_once:,}" if chosen is not None else f"about {at_once:,}"
        report.lines["sampling"] = f"{rows} of {sampled:,} completions of a process at a time"
    return at_once


def _longest(trainer: Any, train: Dataset) -> int:
    """Return about how many tokens the longest row of the training data has."""
    return max(_lengths(trainer, train), default=0)


def _lengths(trainer: Any, train: Dataset) -> Iterator[int]:
    if samples_rollouts(trainer.args):
        prompts = texts(train, ["prompt"])["prompt"]
        tokenizer = inner_tokenizer(trainer.processing_class)
        for text in prompts.loc[prompts.str.len().nlargest(LONGEST).index]:
            yield len(tokenizer(text)["input_ids"])
        return
    tokenised = trainer.train_dataset
    table = tokenised.select(range(min(len(tokenised), MEASURED))).with_format("arrow")[:]
    lengths = {name: [len(row) for row in table[name]] for name in table.column_names if name.endswith("_ids")}
    prompts = lengths.pop("prompt_ids", [0] * len(table))  # DPO's are beside their answers
    for answers in lengths.values():
        yield max(map(sum, zip(prompts, answers, strict=True)), default=0)
