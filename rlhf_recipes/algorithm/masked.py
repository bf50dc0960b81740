"""Masked reductions: means, variances and whitening that leave out padding.

Pure torch, stateless. Cells whose mask is 0 may hold any number, also NaN. Nothing here reduces over ranks: see
`algorithm/distributed.py`.
"""

import torch
from torch import Tensor


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Return the sum of the cells whose mask is 1; the arguments are those of `masked_mean`."""
    kept = torch.where(mask.bool(), values, 0)
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Return the mean of the cells whose mask is 1.

    An empty mask has mean 0, so that a fully masked row adds nothing.

    Args:
        values: Numbers of any shape.
        mask: Mask of the same shape, 1 = counts.
        dim: Dimension to reduce. `None` reduces all of them.

    Returns:
        A scalar, or `values` without `dim`.
    """
    count = mask.bool().sum() if dim is None else mask.bool().sum(dim)
    return masked_sum(values, mask, dim) / count.clamp(min=1)


def masked_var(values: Tensor, mask: Tensor) -> Tensor:
    """Return the population variance of the cells whose mask is 1, or 0 for an empty mask.

    It is not the sample variance, because it normalises this batch and does not estimate another one.
    """
    return masked_mean((values - masked_mean(values, mask)) ** 2, mask)


def masked_whiten(
    values: Tensor,
    mask: Tensor,
    *,
    center: bool = True,
    mean: Tensor | float | None = None,
    var: Tensor | float | None = None,
    eps: float = 1e-8,
) -> Tensor:
    """Scale the masked cells to unit variance and, with `center`, to mean zero.

    Args:
        values: Numbers of any shape.
        mask: Mask of the same shape, 1 = counts.
        center: Whether the output has mean zero. Otherwise the mean is added again after scaling.
        mean: Mean to use instead of this tensor's own, for example over all ranks.
        var: Population variance to use instead of this tensor's own.
        eps: Number that is added to the variance.

    Returns:
        A tensor of the shape of `values`, zero where `mask` is 0.
    """
    mean = masked_mean(values, mask) if mean is None else torch.as_tensor(mean, device=values.device)
    var = masked_var(values, mask) if var is None else torch.as_tensor(var, device=values.device)
    whitened = (values - mean) * torch.rsqrt(var + eps)
    if not center:
        whitened = whitened + mean
    return torch.where(mask.bool(), whitened, 0).to(values.dtype)
