"""Give every row of a run the same rotary embedding, in whatever batch it is."""

import logging
from typing import Any

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rlhf_recipes.algorithm.micro_batches import cut_rows
from rlhf_recipes.models.critic import causal_lm

logger = logging.getLogger(__name__)


def short_limit(model: Any) -> int | None:
    """Return the number of tokens up to which a model with long rope uses its short factors; `None` without it.

    Such a model (Phi-3, Phi-4-mini, MiniCPM) chooses between two sets of factors by the longest row of a batch.
    """
    limits = [entry["original_max_position_embeddings"] for entry in _long_ropes(model).values()]
    return min(limits, default=None)


def cut_by_length(model: Any, lengths: list[int], size: int) -> list[list[int]]:
    """Return batches of rows that need little padding. No rope changes inside a batch, see `short_limit`.

    Args:
        model: Model that reads them.
        lengths: Number of tokens of each row.
        size: Number of rows per batch if all are equally long.
    """
    limit, columns, batches = short_limit(model), torch.tensor(lengths).unsqueeze(1), []
    is_long = torch.tensor([limit is not None and length > limit for length in lengths], dtype=torch.bool)
    for rows in ((~is_long).nonzero()[:, 0], is_long.nonzero()[:, 0]):
        batches += [rows[part].tolist() for part in cut_rows(columns[rows], size) if len(part)]
    return batches


def use_one_rope(networks: list[Any], longest: float) -> None:
    """Let all rows of a run have the long factors of a rope with two sets, if one of them can need these.

    Args:
        networks: Policy and reference.
        longest: Number of tokens that the longest row can have.
    """
    limit = short_limit(networks[0])
    if limit is None or longest <= limit:
        return
    for network in networks:
        use_long_factors(network)
    logger.warning(
        f"Prompt and completion can exceed {limit} tokens, where the model's rope changes. All rows use its factors "
        "for long texts, as in vLLM. With shorter prompts or a smaller `max_completion_length`, all use the others."
    )


def use_long_factors(model: Any) -> None:
    """Let a model with long rope use its long factors for every row, in place, as vLLM does.

    Otherwise a short row would have other log-probabilities beside a long one, and a completion that passes the limit
    would be sampled from another distribution than the one that trains.
    """
    for (module, layer_type), _ in _long_ropes(model).items():
        prefix = "" if layer_type is None else f"{layer_type}_"
        device = getattr(module, f"{prefix}inv_freq").device
        limit = _parameters(module, layer_type)["original_max_position_embeddings"]
        kind = {} if layer_type is None else {"layer_type": layer_type}
        factors, _ = ROPE_INIT_FUNCTIONS["longrope"](module.config, device, seq_len=limit + 1, **kind)
        # The two sets between which the module chooses in each forward.
        for name in ("inv_freq", "original_inv_freq"):
            getattr(module, prefix + name).copy_(factors)


def _long_ropes(model: Any) -> dict[tuple[nn.Module, str | None], dict[str, Any]]:
    """Return the parameters of each rotary embedding with two sets of factors, by module and type of layer."""
    found = {}
    for module in causal_lm(model).modules():
        kinds = getattr(module, "rope_type", None)
        by_layer = kinds if isinstance(kinds, dict) else {None: kinds}
        for layer_type, kind in by_layer.items():
            if kind == "longrope":
                found[module, layer_type] = _parameters(module, layer_type)
    return found


def _parameters(module: Any, layer_type: str | None) -> dict[str, Any]:
    parameters: dict[str, Any] = module.config.rope_parameters
    return parameters if layer_type is None else parameters[layer_type]
