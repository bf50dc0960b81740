"""Rewards of single tokens, before they are parts of the shaped rewards (`shape_rewards`).

Pure torch, stateless. `mask` is `(B, T)`, 1 on the policy's own completion tokens. It may have holes (tool output).
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf_recipes.algorithm.advantages import last_valid_index
from rlhf_recipes.algorithm.distributed import global_max, global_sum


def onto_own_tokens(rewards: Tensor, mask: Tensor) -> Tensor:
    """Move the rewards of cells outside of the mask to the last cell of the mask before them, `(B, T)`.

    The policy did not choose these tokens (tool output), but what it did before led to them. Rewards before the first
    cell of the mask go to that cell. A row with an empty mask becomes zero.

    Args:
        rewards: Rewards of tokens, `(B, T)`, 0 in the padding.
        mask: The policy's own tokens, `(B, T)`.
    """
    mask = mask.bool()
    positions = torch.arange(mask.size(1), device=mask.device).expand(mask.shape)
    before = torch.where(mask, positions, -1).cummax(dim=1).values
    first = torch.where(mask, positions, mask.size(1) - 1).amin(dim=1, keepdim=True)
    moved = torch.zeros_like(rewards).scatter_add(1, torch.where(before < 0, first, before), rewards)
    return torch.where(mask, moved, 0)


def centered_parts(parts: Tensor, mask: Tensor) -> Tensor:
    """Subtract from each part the mean of the parts at its place, over the completions that go on there, `(B, T)`.

    part_t - mean_j { part_jt : t < last_j }

    Normalised scores have mean 0, so without this the mean of all parts would be missing at the last token alone.
    Return and value would then fall along every completion, and a critic that is still to learn that would push all
    tokens down. The mean depends on the place only and the last token gets the rest of the score, so this is a
    baseline: the score and the expected gradient stay. Parts of 0 before the last token stay 0.

    Every rank must call this. Rows whose mask is empty do not count.

    Args:
        parts: Normalised rewards of tokens, `(B, T)`. T may differ between ranks.
        mask: The policy's own tokens, `(B, T)`.
    """
    mask, width = mask.bool(), parts.size(1)
    positions = torch.arange(width, device=mask.device)
    earlier = mask & (positions < last_valid_index(mask).unsqueeze(1))
    widest = int(global_max(torch.tensor(float(width), device=parts.device)))
    dtype = torch.float32 if parts.device.type == "mps" else torch.float64  # Apple's MPS has no float64
    sums = torch.stack([torch.where(earlier, parts, 0).to(dtype).sum(dim=0), earlier.sum(dim=0).to(dtype)])
    total, count = global_sum(pad(sums, (0, widest - width)))[:, :width].unbind()
    return torch.where(earlier, parts - (total / count.clamp(min=1)).to(parts.dtype), parts)
