"""Checks of options that a trainer would only find wrong when it trains: ranges, optimiser, schedule."""

import math
import os
from typing import Any

import torch
from torch import nn
from transformers import SchedulerType, Trainer, get_scheduler
from transformers.utils import is_liger_kernel_available

from rlhf_recipes.options.paths import why_unread
from rlhf_recipes.options.ranges import check_values

READS_MODEL = ("galore", "apollo", "lomo", "adalomo")  # beginnings of the names of optimisers
TRIED_STEPS = 10


def check_training(args: Any) -> None:
    """Check the options of a trainer of TRL, constructed by a recipe or by a user of the library.

    Raises:
        ValueError: If one is out of its range, or if optimiser or schedule cannot be built.
    """
    check_values(type(args), vars(args))
    if args.dataloader_persistent_workers and not args.dataloader_num_workers:
        raise ValueError("`dataloader_persistent_workers` needs `dataloader_num_workers`, at least 1.")
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise ValueError("`use_liger_kernel` needs the package `liger-kernel`.")
    _check_template(getattr(args, "chat_template_path", None))
    _check_optimizer(args)
    _check_schedule(args)


def _check_template(path: str | None) -> None:
    if path is not None and not os.path.exists(path) and (reason := why_unread(path, "tokenizer_config.json")):
        raise ValueError(f"`chat_template_path` {path!r} is no file here, and no tokenizer: {reason}")


def _check_optimizer(args: Any) -> None:
    try:
        Trainer.get_optimizer_cls_and_kwargs(args, nn.Module())
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"`optim: {args.optim.value}` cannot be used here: {error}") from error
    except ValueError as error:
        if not args.optim.value.startswith(READS_MODEL):  # the model of this check has no layer
            raise ValueError(f"`optim: {args.optim.value}` or its `optim_args` cannot be used: {error}") from error


def _check_schedule(args: Any) -> None:
    kind, wish = args.lr_scheduler_type, args.lr_scheduler_kwargs or {}
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    rates = []
    try:
        schedule = get_scheduler(kind, optimizer, 1, TRIED_STEPS, wish)
        for _ in range(0 if kind in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY) else TRIED_STEPS):
            optimizer.step()
            schedule.step()
            rates += schedule.get_last_lr()
    except (TypeError, ValueError, ArithmeticError) as error:
        message = f"`lr_scheduler_type: {kind.value}` cannot be used with `lr_scheduler_kwargs` {wish}: {error}"
        raise ValueError(message) from error
    if not all(isinstance(rate, (int, float)) and math.isfinite(rate) and rate >= 0 for rate in rates):
        raise ValueError(
            f"`lr_scheduler_kwargs` {wish} make learning rates that are negative or not finite with "
            f"`lr_scheduler_type: {kind.value}`."
        )
