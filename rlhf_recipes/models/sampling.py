"""Sample with less work and less memory than one call of `generate` for all rows.

All sampling is transformers' own. In a rollout, rows that have ended leave the batch, and a batch that does not
fit into the memory of a GPU is sampled in chunks.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_managed_module

from rlhf_recipes.algorithm.distributed import global_max
from rlhf_recipes.models.critic import causal_lm
from rlhf_recipes.models.generation import merged_config
from rlhf_recipes.models.memory import free_memory, rows_that_fit, sampling_bytes
from rlhf_recipes.models.rope import short_limit

LEAVING_SHARE = 8  # one in so many rows must have ended before a batch gets smaller


@contextmanager
def thrifty_sampling(
    model: PreTrainedModel | PeftModel,
    *,
    rows_at_once: int | None = None,
    fixed_draws: bool = False,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[None]:
    """Let `generate` of a model sample in chunks that fit, without the rows that have ended, in the given precision.

    Args:
        model: Policy, on which `generate` is called.
        rows_at_once: Rows of a chunk, at most. Default: as many as fit into the free memory of a GPU, or all on a CPU.
        fixed_draws: Whether a row draws the random numbers that it would draw for any other policy. This makes a
            comparison of two policies less noisy. No row leaves then, and the free memory makes no chunks.
        precision: Context of the forward passes. It is entered once per call of `generate`: autocast then casts each
            trained weight once, and not once per token.
    """
    plain, own = model.generate, vars(model).get("generate")

    def generate(**inputs: Any) -> Tensor:
        with precision():
            return _in_chunks(model, plain, inputs, rows_at_once, fixed_draws)

    model.generate = generate
    try:
        yield
    finally:
        del model.generate
        if own is not None:
            model.generate = own


def _in_chunks(
    model: Any, plain: Callable[..., Tensor], inputs: dict[str, Any], rows_at_once: int | None, fixed_draws: bool
) -> Tensor:
    config, ids = merged_config(model, inputs.get("generation_config")), inputs.get("input_ids")
    if ids is None:
        return plain(**inputs)
    if not fixed_draws and _rows_may_leave(model, config, ids.size(1)):
        inputs = {**inputs, "custom_generate": sample_without_ended}
    if rows_at_once is None:
        fits_all = fixed_draws or model.device.type == "cpu"
        rows_at_once = ids.size(0) if fits_all else _rows_that_fit(model, ids, config.max_new_tokens or 0)
    # Tensors of another shape (images) are stored in the order of the rows, but not by row.
    tensors = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
    can_cut = "attention_mask" in tensors and all(x.shape == ids.shape for x in tensors.values())
    chunks = _chunks(model, ids, rows_at_once, can_cut)
    if chunks == 1:
        return plain(**inputs)
    lengths = tensors["attention_mask"].sum(dim=1)
    order = lengths.argsort(stable=True)  # a chunk of short prompts needs little padding
    answers = []
    for rows in order.tensor_split(chunks):
        asked = rows if len(rows) else order[:1]  # the other ranks make a call, so this one does
        width = max(1, int(lengths[asked].max()))
        part = {name: x[asked, -width:] for name, x in tensors.items()}
        answers.append(plain(**{**inputs, **part})[: len(rows), width:])
    width = max(answer.size(1) for answer in answers)
    padded = [nn.functional.pad(x, (0, width - x.size(1)), value=_pad_token(config)) for x in answers]
    return torch.cat([ids, torch.cat(padded)[order.argsort()]], dim=1)


def _pad_token(config: GenerationConfig) -> int:
    """Return the token behind the end of a row, which transformers chooses in the same way."""
    ends = config.eos_token_id
    first = ends[0] if isinstance(ends, list) else ends
    return next((token for token in (config.pad_token_id, first) if token is not None), 0)


def _chunks(model: Any, ids: Tensor, rows_at_once: int, can_cut: bool) -> int:
    """Return the number of chunks of a batch, which is the same on all ranks if these step together."""
    chunks = max(1, -(-ids.size(0) // max(1, rows_at_once))) if can_cut else 1
    if not _steps_with_others(model):
        return chunks
    most, is_whole = global_max(torch.tensor([chunks, not can_cut], device=ids.device)).tolist()
    return 1 if is_whole else int(most)


def _rows_that_fit(model: Any, ids: Tensor, completion: int) -> int:
    device, owner = model.device, causal_lm(model)
    free, dtype = free_memory(device), owner.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        if not _steps_with_others(model):  # FSDP casts its shards itself, one layer at a time
            cast = (p for p in model.parameters() if p.requires_grad and p.dtype == torch.float32)
            free -= sum(p.numel() for p in cast) * dtype.itemsize  # autocast keeps a copy of each trained weight
    row = sampling_bytes(owner.config.get_text_config(), ids.size(1), completion, width=dtype.itemsize)
    return rows_that_fit(ids.size(0), row, free)


def _steps_with_others(model: Any) -> bool:
    """Return whether each forward needs all ranks, because the weights are in shards."""
    return is_deepspeed_zero3_enabled() or is_fsdp_managed_module(causal_lm(model))


def _rows_may_leave(model: Any, config: GenerationConfig, prompt: int) -> bool:
    """Return whether rows may leave the batch, as far as a model and its settings decide it."""
    adapter = model.active_peft_config if isinstance(model, PeftModel) else None
    # Such an adapter keeps something of each row in hooks on the forward.
    fixed_rows = adapter is not None and (
        adapter.is_prompt_learning or getattr(adapter, "alora_invocation_tokens", None) is not None
    )
    completion, limit = config.max_new_tokens or 0, short_limit(model)
    return (
        (limit is None or prompt + completion <= limit)  # else the longest row changes the rope of the others
        and config.get_generation_mode() in ("sample", "greedy_search")
        and config.cache_implementation is None
        and not config.return_dict_in_generate
        and not fixed_rows
        and not _steps_with_others(model)
    )


class _EnoughEnded(StoppingCriteriaList):
    """Stop all rows as soon as enough of them have ended, and remember which."""

    ended: Any = False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        self.ended = self.ended | super().__call__(input_ids, scores, **kwargs)
        return self.ended | (self.ended.sum() * LEAVING_SHARE >= input_ids.size(0))


def sample_without_ended(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs: Any,
) -> Tensor:
    """Sample as transformers does, but compute only the rows that have not ended. Meant for `custom_generate`.

    As soon as an eighth of the rows has ended, these leave the batch and the cache. Under greedy decoding the answers
    are the same. Sampled answers have the same distribution, but other random numbers.
    """
    options = {"logits_processor": logits_processor, "generation_config": generation_config}
    if not _can_select(model, input_ids, logits_processor, model_kwargs):
        return model._sample(input_ids, stopping_criteria=stopping_criteria, **options, **model_kwargs)
    rows, answers = torch.arange(input_ids.size(0), device=input_ids.device), []
    while len(rows):
        enough, length = _EnoughEnded(stopping_criteria), input_ids.size(1)
        input_ids = model._sample(input_ids, stopping_criteria=enough, **options, **model_kwargs)
        answers.append((rows[enough.ended], input_ids[enough.ended]))
        kept = (~enough.ended).nonzero().squeeze(1)
        model_kwargs = model._update_model_kwargs_for_generation(
            {}, model_kwargs, num_new_tokens=input_ids.size(1) - length
        )
        rows, input_ids = rows[kept], input_ids[kept]
        model_kwargs = {name: x[kept] if isinstance(x, Tensor) else x for name, x in model_kwargs.items()}
        if model_kwargs.get("attention_mask") is None:  # transformers needs it to go on from a cache
            model_kwargs["attention_mask"] = torch.ones_like(input_ids)
        model_kwargs["past_key_values"].batch_select_indices(kept)
    width = max(ids.size(1) for _, ids in answers)
    result = input_ids.new_full((sum(len(ids) for ids, _ in answers), width), _pad_token(generation_config))
    for of_rows, ids in answers:
        result[of_rows, : ids.size(1)] = ids
    return result


def _can_select(model: Any, input_ids: Tensor, logits_processor: Any, model_kwargs: dict[str, Any]) -> bool:
    """Return whether all that is kept between two tokens can be reduced to some of the rows."""
    cache = model_kwargs.get("past_key_values")
    tensors = [x for x in model_kwargs.values() if isinstance(x, Tensor)]
    return (
        not model.config.is_encoder_decoder
        and cache is not None
        and cache.is_croppable  # it grows, and holds keys and values only
        and all(x.ndim == 2 and x.size(0) == input_ids.size(0) for x in tensors)
        # Continuous batching changes the rows, too: a processor that supports it keeps nothing of a row.
        and all(processor.supports_continuous_batching for processor in logits_processor)
        and input_ids.device.type != "mps"  # it runs one token ahead of the check for the end
    )
