"""The last layer of every scalar head."""

import torch
from torch import Tensor, nn


class Float32Linear(nn.Linear):
    """Compute a linear layer in float32, also under autocast and with weights in another precision.

    bfloat16 has eight bits of mantissa: two responses whose scores differ by a hundredth would often tie. DeepSpeed
    stores the weights in bfloat16, and a float32 copy for the optimiser. The product is still computed in float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return `x W^T + b` in float32."""
        with torch.autocast(x.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return nn.functional.linear(x.float(), self.weight.float(), bias)
