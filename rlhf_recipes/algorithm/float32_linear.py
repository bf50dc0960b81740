"""The layer that every scalar head ends in."""

import torch
from torch import Tensor, nn


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32, whatever the autocast and whatever its weights are stored in.

    bfloat16 has eight bits of mantissa: two responses whose scores differ by a hundredth would often tie. DeepSpeed
    stores the weights in bfloat16, beside a float32 copy for the optimiser; the product is float32 still.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return `x W^T + b` in float32."""
        with torch.autocast(x.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return nn.functional.linear(x.float(), self.weight.float(), bias)
