"""Score with a reward model as plain transformers does: loaded from its files alone, one row at a time."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForSequenceClassification
from trl.trainer.reward_trainer import suppress_seqcls_warning

from rlhf_recipes.models.adapter_base import find_base
from rlhf_recipes.models.fingerprint import is_adapter
from rlhf_recipes.models.quantization import keep_unpacked, load_adapter, saved_quantization
from rlhf_recipes.models.safe_loading import safe_kwargs, safe_loading
from rlhf_recipes.models.vocabulary import fit_to_adapter

LARGEST = 2 * 2**30  # bytes of weights; a larger reward model is not loaded a second time


@torch.no_grad()
def scores_alone(
    path: str, token_ids: list[list[int]], *, pad_token_id: int | None, heads: int, like: Any
) -> Tensor | None:
    """Return the scores of rows by a reward model that is loaded for them, `(B, K)`.

    The result is `None` if the model is large, or its base is in no directory here.

    Args:
        path: Directory of a classifier, or of an adapter with its score head.
        token_ids: Rows of tokens.
        pad_token_id: Token that an adapter's score head passes over: the configuration of its base does not say it.
        heads: Number of its score heads, K.
        like: Model that gives precision and device.
    """
    adapter = is_adapter(path)
    base = find_base(path) if adapter else path
    files = [file for directory in {path, base} for file in Path(directory).glob("*.safetensors")]
    if not Path(base).is_dir() or sum(file.stat().st_size for file in files) > LARGEST:
        return None
    kwargs = {"dtype": like.dtype, "quantization_config": saved_quantization(path) if adapter else None}
    kwargs["attn_implementation"] = like.config._attn_implementation  # also if the user chose it, and not the files
    with suppress_seqcls_warning(), safe_loading(path, base):
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=heads, **safe_kwargs(base, kwargs))
    keep_unpacked(model)
    if adapter:
        model.config.get_text_config().pad_token_id = pad_token_id
        fit_to_adapter(model, path)
    if kwargs["quantization_config"] is not None:  # bitsandbytes has placed the model
        return row_scores(load_adapter(model, path).eval(), token_ids)
    if adapter:
        model = PeftModel.from_pretrained(model, path)
    model.to(like.device)
    return row_scores(model.eval(), token_ids)


@torch.no_grad()
def row_scores(model: Any, token_ids: list[list[int]]) -> Tensor:
    """Return the scores that a classifier gives to rows, `(B, K)`, one row at a time and without padding."""
    rows = [torch.tensor([row], device=model.device) for row in token_ids]
    return torch.cat([model(input_ids=row).logits.float().cpu() for row in rows])
