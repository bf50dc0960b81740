"""Sample with less work and less memory than one call of `generate` for all rows.

All sampling is transformers' own. Rows that have ended leave the batch, and a batch that does not fit into the memory
of a GPU is sampled in chunks.
"""

import copy
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
from rlhf_recipes.models.memory import free_memory, rows_that_fit, sampling_bytes
from rlhf_recipes.models.rope import short_limit

LEAVING_SHARE = 8  # one in so many rows must have ended before a batch gets smaller
OWN_INPUTS = {"input_ids", "attention_mask"}


@contextmanager
def thrifty_sampling(
    model: PreTrainedModel | PeftModel,
    *,
    rows_at_once: int | None = None,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[None]:
    """Let `generate` of a model sample in chunks that fit, without the rows that have ended, in the given precision.

    Args:
        model: Policy, on which `generate` is called.
        rows_at_once: Rows of a chunk, at most. Default: as many as fit into the free memory of a GPU, or all on a CPU.
        precision: Context of the forward passes. It is entered once per call of `generate`: autocast then casts each
            trained weight once, and not once per token.
    """
    plain, own = model.generate, vars(model).get("generate")

    def generate(**inputs: Any) -> Tensor:
        with precision():
            return _in_chunks(model, plain, inputs, rows_at_once)

    model.generate = generate
    try:
        yield
    finally:
        del model.generate
        if own is not None:
            model.generate = own


def _in_chunks(model: Any, plain: Callable[..., Tensor], inputs: dict[str, Any], rows_at_once: int | None) -> Tensor:
    config = _merged_config(model, inputs.get("generation_config"))
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if ids is not None and _rows_may_leave(model, config, ids.size(1)):
        inputs = {**inputs, "custom_generate": sample_without_ended}
    # Other tensors (images) are stored in the order of the rows, but not by row.
    if ids is None or mask is None or {name for name, x in inputs.items() if isinstance(x, Tensor)} != OWN_INPUTS:
        return plain(**inputs)
    chunks = _chunks(model, ids, config, rows_at_once)
    if chunks == 1:
        return plain(**inputs)
    lengths = mask.sum(dim=1)
    order = lengths.argsort(stable=True)  # a chunk of short prompts needs little padding
    answers = []
    for rows in order.tensor_split(chunks):
        columns = slice(ids.size(1) - int(lengths[rows].max()), None)
        part = {"input_ids": ids[rows, columns], "attention_mask": mask[rows, columns]}
        answers.append(plain(**{**inputs, **part})[:, part["input_ids"].size(1) :])
    width = max(answer.size(1) for answer in answers)
    padded = [nn.functional.pad(x, (0, width - x.size(1)), value=config.pad_token_id) for x in answers]
    return torch.cat([ids, torch.cat(padded)[order.argsort()]], dim=1)


def _merged_config(model: Any, given: GenerationConfig | None) -> GenerationConfig:
    """Return the settings of a call of `generate`: those of the call, and the model's own where it has none."""
    config = copy.deepcopy(given) if given is not None else GenerationConfig()
    config.update(**causal_lm(model).generation_config.to_dict(), defaults_only=True)
    return config


def _chunks(model: Any, ids: Tensor, config: GenerationConfig, rows_at_once: int | None) -> int:
    """Return the number of chunks of a batch."""
    rows = ids.size(0)
    if rows_at_once is not None:
        return -(-rows // rows_at_once)
    if model.device.type == "cpu":
        return 1
    chunks = -(-rows // _rows_that_fit(model, ids, config.max_new_tokens or 0))
    if _steps_with_others(model):  # each rank must make the same calls
        chunks = int(global_max(torch.tensor(chunks, device=ids.device)))
    return min(chunks, rows)


def _rows_that_fit(model: Any, ids: Tensor, completion: int) -> int:
    device, owner = model.device, causal_lm(model)
    free, dtype = free_memory(device), owner.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
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
    result = input_ids.new_full((sum(len(ids) for ids, _ in answers), width), generation_config.pad_token_id)
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
