"""Estimate the memory that sampling needs, and read the free memory of a device."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import DynamicCache

CONTAINER_LIMIT, CONTAINER_USE = "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"
LOGIT_BYTES = 20  # per row and token of the vocabulary: logits, scores, probabilities and random numbers, in float32
USED_SHARE = 0.8  # of the free memory; the estimate is rough, and freed blocks of other sizes are lost


def layer_width(config: Any) -> int:
    """Return how many numbers a token has in one layer, in a forward pass; in the widest one if layers differ.

    They are the inputs of norms, query, key, value, attention and residual, and four vectors of the MLP. SDPA and
    flash attention keep no attention matrices.

    Args:
        config: Configuration of the text model.

    Source: counted as in Korthikanti et al. 2022, arXiv:2205.05198, section 4.1.
    """
    return max(6 * x.hidden_size + 2 * _key_width(x) + 4 * _mlp_width(x) for x in config.per_layer_config)


def cache_bytes(config: Any, tokens: int, *, width: int) -> int:
    """Return the bytes of the keys and values of one row in all layers, during generation.

    A layer with a sliding window keeps the tokens of its window, and a layer without attention keeps none. The result
    is too large where layers share keys and values, or where all heads of a layer have one (Gemma 3n, Falcon), and
    where the cache is compressed (DeepSeek).

    Args:
        config: Configuration of the text model.
        tokens: Tokens of the row.
        width: Bytes per number.
    """
    numbers = 0
    # The cache may have fewer layers than the model, because the last ones read those of others.
    for layer, of_layer in zip(DynamicCache(config=config).layers, config.per_layer_config, strict=False):
        if layer.is_croppable:
            window = layer.get_max_length()  # -1: all tokens
            numbers += (min(tokens, window) if window > 0 else tokens) * _key_width(of_layer)
    return 2 * numbers * width


def _key_width(config: Any) -> int:
    heads = getattr(config, "num_attention_heads", None)
    if not heads:  # a model without attention
        return 0
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int((getattr(config, "num_key_value_heads", None) or heads) * head)


def _mlp_width(config: Any) -> int:
    width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return int(max(width) if isinstance(width, Sequence) else width)  # Gemma 3n lists the widths of all layers


def sampling_bytes(config: Any, prompt: int, completion: int, *, width: int) -> int:
    """Return the bytes that one row needs while it is sampled, beside the weights.

    They are its keys and values, the activations of its prompt in one layer, and its scores of the vocabulary. A model
    of several networks has no layers of its own (BLT); only the scores are counted there.

    Args:
        config: Configuration of the text model.
        prompt: Tokens of the prompt, with padding.
        completion: Tokens of the completion, at most.
        width: Bytes per number.
    """
    scores = LOGIT_BYTES * int(getattr(config, "vocab_size", None) or 0)
    if not hasattr(config, "num_hidden_layers"):
        return scores
    activations = prompt * width * layer_width(config)
    return cache_bytes(config, prompt + completion, width=width) + activations + scores


def rows_that_fit(rows: int, row_bytes: int, free: int) -> int:
    """Return how many rows are sampled at the same time: all, half of them, a quarter, and so on, at least one.

    Halves differ less often between a run and its resume than the exact number would.

    Args:
        rows: Number of rows.
        row_bytes: Bytes of one row (`sampling_bytes`).
        free: Free bytes.
    """
    while rows > 1 and rows * row_bytes > USED_SHARE * free:
        rows = -(-rows // 2)
    return rows


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a device: on a GPU with torch's unused memory, else within the container's limit."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    free = psutil.virtual_memory().available
    try:
        limit, used = (Path(path).read_text(encoding="utf-8").strip() for path in (CONTAINER_LIMIT, CONTAINER_USE))
        return free if limit == "max" else max(min(free, int(limit) - int(used)), 0)
    except (OSError, ValueError):  # there is no container, or its limit is hidden
        return int(free)
