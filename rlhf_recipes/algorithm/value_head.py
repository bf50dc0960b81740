"""The critic: an MLP on the policy's own hidden states, and a submodule of the policy.

DDP, ZeRO, FSDP, PEFT's `modules_to_save` and checkpoints see one more submodule of the causal LM. Generation and
weight synchronisation never call it.
"""

import torch
from torch import Tensor, nn

from rlhf_recipes.algorithm.float32_linear import Float32Linear

ACTIVATIONS = {"silu": nn.SiLU, "gelu": nn.GELU}


class ValueHead(nn.Module):
    """Map hidden states to state values: Linear -> SiLU or GELU -> Linear, in float32.

    The output is unbounded and starts at exactly 0, so that only the rewards make the first advantages. ReLU is
    refused: a head with dead units cannot follow a reward whose sign changes.

    Args:
        hidden_size: Width of the hidden states, H.
        head_size: Width of the hidden layer. `None` stands for H.
        activation: Activation of the hidden layer, `"silu"` or `"gelu"`.

    Raises:
        ValueError: If `activation` is unknown.

    Source: zero-initialised output, Huang et al. 2023, "The N implementation details of RLHF with PPO".
    """

    def __init__(self, hidden_size: int, head_size: int | None = None, activation: str = "silu") -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"`value_head_activation` must be one of {', '.join(ACTIVATIONS)}, got {activation!r}.")
        head_size = head_size or hidden_size
        self.hidden = Float32Linear(hidden_size, head_size, dtype=torch.float32)
        self.activation = ACTIVATIONS[activation]()
        self.output = Float32Linear(head_size, 1, dtype=torch.float32)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the values `(B, L)` of hidden states `(B, L, H)`, in float32 also under autocast."""
        values: Tensor = self.output(self.activation(self.hidden(hidden_states)))
        return values.squeeze(-1)
