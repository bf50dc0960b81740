"""Compare the disk and memory that a run needs with the free disk and memory.

The disk is counted nearly to the byte. The memory is a rough sum, which tells 8 GB from 80.
"""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import DistributedType
from torch import nn

from rlhf_recipes.models.memory import layer_width
from rlhf_recipes.preflight.finding import Finding

# Bytes of a checkpoint beside its weights: tokenizer, configurations, random states, logs, tables.
SMALL_FILES = 20_000_000


@dataclass(frozen=True)
class Sizes:
    """Hold sizes in bytes, over all processes.

    Args:
        saved: Weights of a saved model: all of them, or only the trained ones (adapter and value head).
        gradients: Gradients of the trained weights.
        optimizer: State of the optimiser.
        critic: Weights of a fitted critic. Its gradients, and each of its two moments, are as large. Every process
            has all of them whole.
    """

    saved: int
    gradients: int
    optimizer: int
    critic: int = 0


def number_of_parameters(model: Any) -> int:
    """Return the parameters of a model, also of one that ZeRO-3 shards, or whose weights are packed."""
    sharded = sum(getattr(weight, "ds_numel", 0) for weight in model.parameters())
    return sharded or int(model.num_parameters())


def parameter_bytes(models: Iterable[nn.Module], *, trained: bool = False) -> int:
    """Return the bytes of all distinct parameters, or of the trained ones. A shard of ZeRO-3 counts as a whole."""
    parameters = {id(p): p for model in models for p in model.parameters() if p.requires_grad or not trained}
    return sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in parameters.values())


def training_sizes(model: nn.Module, args: Any, *, adapter: bool, critic: Any = None) -> Sizes:
    """Return the sizes of a trainer's model, and of a critic that has an Adam of its own.

    Args:
        model: Model of the trainer.
        args: Options.
        adapter: Whether only the trained weights of the model are saved.
        critic: PPO's `FittedCritic`, if it has one.
    """
    trained = parameter_bytes([model], trained=True)
    optimizer = str(getattr(args.optim, "value", args.optim))
    weights = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    if args.distributed_state.distributed_type == DistributedType.DEEPSPEED:
        state = 12 * weights  # float32 weights and two moments
    elif "8bit" in optimizer:
        state = 2 * weights
    else:
        state = {"sgd": 0, "adafactor": 0, "lion_32bit": trained, "adagrad": trained}.get(optimizer, 2 * trained)
    own = 0 if critic is None else sum(weight.numel() * weight.element_size() for weight in critic.weights)
    saved = trained if adapter else parameter_bytes([model])
    return Sizes(saved=saved + own, gradients=trained, optimizer=state, critic=own)


def checkpoint_bytes(sizes: Sizes, *, only_model: bool) -> int:
    """Return the bytes of one checkpoint."""
    return sizes.saved + SMALL_FILES + (0 if only_model else sizes.optimizer + 2 * sizes.critic)


def planned_bytes(checkpoint: int, final: int, checkpoints: int, limit: int | None, copies: int) -> int:
    """Return the largest number of bytes that the run has on the disk at the same time.

    Args:
        checkpoint: Bytes of one checkpoint.
        final: Bytes of the final model.
        checkpoints: Number of checkpoints in the run.
        limit: `save_total_limit`. The run writes a new checkpoint before it deletes the oldest one.
        copies: Number of copies of the final model, with the one in `output_dir`.
    """
    kept = checkpoints if not limit else min(checkpoints, limit + 1)
    return kept * checkpoint + copies * final


def free_disk(directory: str | Path) -> int:
    """Return the free bytes on the disk of a directory, which may not exist yet."""
    path = Path(directory).resolve()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def disk_findings(directory: str, free: int, one: int, planned: int) -> list[Finding]:
    """Compare the planned bytes with the free ones. If the first checkpoint does not fit, the run is lost.

    Args:
        directory: `output_dir`.
        free: Free bytes.
        one: Bytes of one checkpoint; of the final model if there are no checkpoints.
        planned: Largest number of bytes at the same time (`planned_bytes`).
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
    """Return the bytes that a forward pass keeps for its backward pass.

    Each token keeps `layer_width` numbers in each layer. With `checkpointing` it keeps one vector per layer, and all
    of these numbers in one layer.

    Args:
        config: Configuration of the text model.
        tokens: Tokens of one micro-batch, with padding.
        width: Bytes per activation.
        checkpointing: Whether activations are computed twice.
    """
    layers, layer = config.num_hidden_layers, layer_bytes(config, tokens, width=width)
    return int(tokens * width * layers * config.hidden_size + layer if checkpointing else layers * layer)


def layer_bytes(config: Any, tokens: int, *, width: int) -> int:
    """Return the bytes of all numbers of one layer: a forward without gradient keeps no more."""
    return tokens * width * layer_width(config)


def scoring_bytes(config: Any, tokens: int, args: Any, critic: Any, *, width: int) -> int:
    """Return the bytes of the forwards between sampling and update: one layer, and states kept for the critic.

    Args:
        config: Configuration of the text model.
        tokens: Tokens of one forward without gradient, with padding.
        args: Options.
        critic: PPO's `FittedCritic`, if it has one.
        width: Bytes per activation.
    """
    rollout = args.per_device_train_batch_size * args.steps_per_generation * (args.max_completion_length + 1)
    return layer_bytes(config, tokens, width=width) + (0 if critic is None else rollout * critic.bytes_per_token)


def memory_to_come(sizes: Sizes, activations: int, generation: int, *, processes: int, sharded: bool) -> int:
    """Return the bytes that one process will need in addition to its loaded weights.

    Args:
        sizes: Sizes of the trained model.
        activations: Bytes of the activations of one micro-batch.
        generation: Bytes of one rollout: cache and logits, or a forward without gradient. They are free before the
            activations need memory.
        processes: Number of processes.
        sharded: Whether gradients and optimiser state are in shards (ZeRO, FSDP).
    """
    shards = processes if sharded else 1
    return (sizes.gradients + sizes.optimizer) // shards + 3 * sizes.critic + max(activations, generation)


def memory_findings(to_come: int, free: int, device: str) -> list[Finding]:
    """Compare an estimate with the free bytes. The finding is never an error, because the estimate is rough."""
    if to_come <= free:
        return []
    message = (
        f"Training may need {gigabytes(to_come)} more on {device}, which has {gigabytes(free)} free (estimate). Lower "
        "`per_device_train_batch_size` (and raise `gradient_accumulation_steps`), set `gradient_checkpointing: true`, "
        "`use_peft: true` or `optim: paged_adamw_8bit`."
    )
    return [Finding("warning", message)]


def gigabytes(count: int) -> str:
    """Return a number of bytes as text."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"
