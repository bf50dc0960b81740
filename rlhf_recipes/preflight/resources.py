"""Disk and memory that a run needs, estimated, against what is there.

The disk is counted nearly to the byte; memory is a rough sum, good for telling 8 GB from 80.
"""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils import DistributedType
from torch import nn

from rlhf_recipes.preflight.finding import Finding

# Tokenizer, configurations, random states, logs, tables: beside the weights of a checkpoint.
SMALL_FILES = 20_000_000
CONTAINER_LIMIT, CONTAINER_USE = "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"


@dataclass(frozen=True)
class Sizes:
    """Bytes of what is trained, over all processes.

    Args:
        saved: Weights of a saved model: all, or those of an adapter and of what is trained beside it.
        gradients: Of what is trained.
        optimizer: State of the optimiser.
    """

    saved: int
    gradients: int
    optimizer: int


def parameter_bytes(models: Iterable[nn.Module], *, trained: bool = False) -> int:
    """Return the bytes of all distinct parameters, or of those that are trained; whole, also where ZeRO-3 cut them."""
    parameters = {id(p): p for model in models for p in model.parameters() if p.requires_grad or not trained}
    return sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in parameters.values())


def training_sizes(model: nn.Module, args: Any, *, adapter: bool) -> Sizes:
    """Return what a trainer's model takes beside its weights.

    Args:
        model: The trainer's.
        args: Its options.
        adapter: Whether only what is trained is saved.
    """
    trained = parameter_bytes([model], trained=True)
    optimizer, weights = (
        str(getattr(args.optim, "value", args.optim)),
        sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad),
    )
    if args.distributed_state.distributed_type == DistributedType.DEEPSPEED:
        state = 12 * weights  # float32 weights and two moments
    elif "8bit" in optimizer:
        state = 2 * weights
    else:
        state = {"sgd": 0, "adafactor": 0, "lion_32bit": trained, "adagrad": trained}.get(optimizer, 2 * trained)
    return Sizes(saved=trained if adapter else parameter_bytes([model]), gradients=trained, optimizer=state)


def checkpoint_bytes(sizes: Sizes, *, only_model: bool) -> int:
    """Return the bytes of one checkpoint."""
    return sizes.saved + SMALL_FILES + (0 if only_model else sizes.optimizer)


def planned_bytes(checkpoint: int, final: int, checkpoints: int, limit: int | None, copies: int) -> int:
    """Return the most bytes that lie on the disk at once.

    Args:
        checkpoint: Bytes of one.
        final: Of the model that is saved at the end.
        checkpoints: Written in the run.
        limit: `save_total_limit`; a new checkpoint is written before the oldest is deleted.
        copies: Of the final model, with the one in `output_dir`.
    """
    kept = checkpoints if not limit else min(checkpoints, limit + 1)
    return kept * checkpoint + copies * final


def free_disk(directory: str | Path) -> int:
    """Return the bytes free where a directory is, or will be made."""
    path = Path(directory).resolve()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def disk_findings(directory: str, free: int, one: int, planned: int) -> list[Finding]:
    """Compare what a run writes with what is free: if the first checkpoint does not fit, the run is lost.

    Args:
        directory: `output_dir`.
        free: Bytes.
        one: Bytes of one checkpoint, or of the final model without any.
        planned: Of all that lies there at once.
    """
    if one > free:
        message = (
            f"One checkpoint needs {gigabytes(one)}, and {directory} has {gigabytes(free)} free. Free some, choose "
            "another `output_dir`, or write less: `save_only_model: true`, `use_peft: true`."
        )
        return [Finding("error", message)]
    if planned > free:
        message = (
            f"Checkpoints and final model need up to {gigabytes(planned)}, and {directory} has {gigabytes(free)} "
            "free. Set `save_total_limit`, `save_only_model: true`, or raise `save_steps`."
        )
        return [Finding("warning", message)]
    return []


def activation_bytes(config: Any, tokens: int, *, width: int, checkpointing: bool) -> int:
    """Return the bytes that a forward keeps for its backward.

    Per token and layer: norm, query, key, value, attention and residual inputs, and four vectors of the MLP; with
    `checkpointing`, one vector per layer and one layer whole. Attention matrices are not kept (SDPA, flash).

    Args:
        config: The text model's.
        tokens: Of one micro-batch, padding included.
        width: Bytes per activation.
        checkpointing: Whether activations are computed twice.

    Source: counted as in Korthikanti et al. 2022, arXiv:2205.05198, section 4.1.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    layer = 6 * hidden + 2 * _key_width(config) + 4 * (getattr(config, "intermediate_size", None) or 4 * hidden)
    return tokens * width * (layers * hidden + layer if checkpointing else layers * layer)


def cache_bytes(config: Any, tokens: int, *, width: int) -> int:
    """Return the bytes of keys and values of all layers while `tokens` tokens are in generation."""
    return 2 * tokens * width * config.num_hidden_layers * _key_width(config)


def _key_width(config: Any) -> int:
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int((getattr(config, "num_key_value_heads", None) or heads) * head)


def memory_to_come(sizes: Sizes, activations: int, generation: int, *, processes: int, sharded: bool) -> int:
    """Return the bytes that one process will take beside the weights that it has loaded.

    Args:
        sizes: Of what is trained.
        activations: Of one micro-batch.
        generation: Cache and logits of one rollout; at another time than the activations.
        processes: Of the run.
        sharded: Whether gradients and optimiser state are cut into shards (ZeRO, FSDP).
    """
    shards = processes if sharded else 1
    return (sizes.gradients + sizes.optimizer) // shards + max(activations, generation)


def free_memory(device: torch.device) -> int:
    """Return the bytes free on a device: on a GPU with what torch holds unused, else within the container's limit."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    free = psutil.virtual_memory().available
    try:
        limit, used = (Path(path).read_text(encoding="utf-8").strip() for path in (CONTAINER_LIMIT, CONTAINER_USE))
        return free if limit == "max" else max(min(free, int(limit) - int(used)), 0)
    except (OSError, ValueError):  # no container, or one whose limit is not shown
        return int(free)


def memory_findings(to_come: int, free: int, device: str) -> list[Finding]:
    """Compare an estimate with what is free; never an error, because it is one."""
    if to_come <= free:
        return []
    message = (
        f"Training may need {gigabytes(to_come)} more on {device}, which has {gigabytes(free)} free (estimate). Lower "
        "`per_device_train_batch_size` (and raise `gradient_accumulation_steps`), set `gradient_checkpointing: true`, "
        "`use_peft: true` or `optim: paged_adamw_8bit`."
    )
    return [Finding("warning", message)]


def gigabytes(count: int) -> str:
    """Return a number of bytes for reading."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"
