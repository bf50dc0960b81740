"""Statistics over all ranks.

Every rank must make each call. In a single process the results are the local statistics.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_recipes.algorithm.masked import masked_sum


def global_sum(values: Tensor) -> Tensor:
    """Return the elementwise sum of `values` over all ranks. Without a process group, return a copy."""
    total = values.clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
    return total


def global_max(values: Tensor) -> Tensor:
    """Return the elementwise maximum of `values` over all ranks. Without a process group, return a copy."""
    largest = values.clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def of_first_rank(values: Tensor) -> Tensor:
    """Return `values` of the first rank, on every rank. Without a process group, return a copy."""
    copy = values.clone()
    if dist.is_available() and dist.is_initialized():
        dist.broadcast(copy, src=0)
    return copy


def global_moments(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return `(count, mean, var)` of the masked cells of all ranks, as scalars.

    The second pass sums the squared deviations from the global mean, so nothing cancels. A rank may be empty. If all
    ranks are empty, the result is `(0, 0, 0)`. The variance is the population variance.

    Args:
        values: Numbers of any shape.
        mask: Mask of the same shape, 1 = counts.
    """
    mask = mask.bool()
    # A device without float64 (Apple's MPS) keeps float32.
    dtype = torch.float32 if values.device.type == "mps" else torch.float64
    filled = torch.where(mask, values.detach(), 0).to(dtype)
    count, total = global_sum(torch.stack([mask.sum().to(dtype), filled.sum()])).unbind()
    mean = total / count.clamp(min=1)
    squared = torch.where(mask, (filled - mean) ** 2, 0).sum()
    return count, mean, global_sum(squared) / count.clamp(min=1)


def global_var(values: Tensor, mask: Tensor) -> Tensor:
    """Return the population variance of the masked cells of all ranks."""
    return global_moments(values, mask)[2]


def global_means(mask: Tensor, *values: Tensor) -> tuple[float, list[float]]:
    """Return the number of masked cells of all ranks, and the mean of each tensor over them.

    This costs one reduction and one wait for the device for all tensors together. It is meant for metrics.

    Args:
        mask: Mask, 1 = counts.
        values: Tensors of the mask's shape.
    """
    totals = [masked_sum(value.float(), mask) for value in values]
    count, *sums = global_sum(torch.stack([mask.sum().float(), *totals])).tolist()
    return count, [total / max(count, 1.0) for total in sums]
