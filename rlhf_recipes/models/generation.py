"""The settings of a `GenerationConfig`: their effect on a rollout, and values that transformers does not save."""

import copy
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS

from rlhf_recipes.models.critic import causal_lm
from rlhf_recipes.options.spelling import did_you_mean

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setting:
    """The effect of a setting on a rollout.

    Args:
        effect: `none`: no effect, or only on speed and memory. `distribution`: other samples than those of the policy,
            whose log-probabilities do not include it. `form`: another form of the output, or none for a batch.
            `trainer`: a value that the trainer sets.
        neutral: Values without the effect.
    """

    effect: Literal["none", "distribution", "form", "trainer"]
    neutral: tuple[Any, ...] = (None,)


_EXACT_CACHES = (None, "paged", *(name for name in ALL_CACHE_IMPLEMENTATIONS if name != "quantized"))
# Every field of `GenerationConfig`. A test notices a new one.
SETTINGS: dict[str, Setting] = {
    **dict.fromkeys(
        ("repetition_penalty", "encoder_repetition_penalty", "top_p", "typical_p", "guidance_scale"),
        Setting("distribution", (None, 1.0)),
    ),
    **dict.fromkeys(
        ("top_k", "min_p", "epsilon_cutoff", "eta_cutoff", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
        Setting("distribution", (None, 0)),
    ),
    **dict.fromkeys(("min_length", "min_new_tokens"), Setting("distribution", (None, 0))),
    **dict.fromkeys(
        ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias"),
        Setting("distribution", (None, [], {})),
    ),
    **dict.fromkeys(
        ("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"), Setting("distribution")
    ),
    **dict.fromkeys(("top_h", "watermarking_config", "temperature"), Setting("distribution")),
    "do_sample": Setting("distribution", (None, True)),
    "num_beams": Setting("distribution", (None, 1)),
    "cache_implementation": Setting("distribution", _EXACT_CACHES),
    "num_return_sequences": Setting("form", (None, 1)),
    "num_beam_groups": Setting("form", (None, 1)),
    **dict.fromkeys(
        (
            *("return_dict_in_generate", "output_scores", "output_logits", "output_attentions"),
            *("output_hidden_states", "token_healing", "use_mtp"),
        ),
        Setting("form", (None, False)),
    ),
    **dict.fromkeys(
        (
            *("stop_strings", "max_time", "penalty_alpha", "dola_layers", "constraints", "force_words_ids"),
            *("prompt_lookup_num_tokens", "assistant_early_exit", "assistant_ensemble_weight", "speculation_type"),
        ),
        Setting("form"),
    ),
    **dict.fromkeys(
        ("max_new_tokens", "max_length", "pad_token_id", "bos_token_id", "eos_token_id"), Setting("trainer")
    ),
    **dict.fromkeys(
        (
            # Only beams, an assistant model, an encoder or contrastive search read these.
            *("early_stopping", "length_penalty", "diversity_penalty", "is_assistant", "num_assistant_tokens"),
            *("num_assistant_tokens_schedule", "assistant_confidence_threshold", "max_matching_ngram_size"),
            *("assistant_lookbehind", "target_lookbehind", "decoder_start_token_id", "low_memory"),
            *("renormalize_logits", "remove_invalid_values", "use_cache", "cache_config", "max_cache_len"),
            *("compile_config", "disable_compile", "continuous_batching_config", "prefill_chunk_size"),
            *("transformers_version", "_from_model_config"),
        ),
        Setting("none"),
    ),
    # vLLM's own.
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "min_tokens"), Setting("distribution", (None, 0))),
    **dict.fromkeys(("logit_bias", "allowed_token_ids", "bad_words"), Setting("distribution", (None, [], {}))),
    "n": Setting("form", (None, 1)),
}
_SET_BY = {
    **dict.fromkeys(("max_new_tokens", "max_length"), "`max_completion_length`"),
    **dict.fromkeys(("pad_token_id", "bos_token_id"), "the tokenizer"),
    "eos_token_id": "the tokenizer and the policy's `generation_config.json`",
}


def check_generation_kwargs(args: Any) -> None:
    """Refuse settings of a run with which no trainer can sample.

    Raises:
        ValueError: If `generation_kwargs` has an unknown setting, one that the trainer sets, or one that changes the
            form of the output.
    """
    for name, value in (args.generation_kwargs or {}).items():
        setting = SETTINGS.get(name)
        if setting is None and not args.use_vllm:  # vLLM knows others, and refuses those that it does not know
            hint = did_you_mean(name, SETTINGS)
            raise ValueError(f"`generation_kwargs` has `{name}`, which transformers does not know.{hint}")
        if setting is None or value in setting.neutral:
            continue
        if setting.effect == "form":
            raise ValueError(
                f"`generation_kwargs` has `{name}: {value}`, with which a trainer cannot sample: it needs one whole "
                "answer per prompt of a batch, as tokens. Leave it out."
            )
        if setting.effect == "trainer":
            raise ValueError(
                f"`generation_kwargs` has `{name}: {value}`. Leave it out: it follows from {_SET_BY[name]}."
            )


def merged_config(model: Any, given: GenerationConfig | None) -> GenerationConfig:
    """Return the settings of a call of `generate`: those of the call, and the model's own where it has none."""
    config = copy.deepcopy(given) if given is not None else GenerationConfig()
    config.update(**causal_lm(model).generation_config.to_dict(), defaults_only=True)
    if config.cache_implementation == "hybrid":  # in files on the Hub (Gemma 3), and ignored by transformers
        config.update(cache_implementation=None)
    return config


def check_static_cache(model: Any, cache: str, mixed: torch.dtype | None) -> None:
    """Refuse a cache of fixed size that mixed precision would fill with numbers of two types.

    Args:
        model: Policy.
        cache: Name of the cache.
        mixed: Precision of autocast. `None` stands for no autocast.

    Raises:
        ValueError: If the weights have another type than autocast.
    """
    policy = causal_lm(model)
    if mixed is None or policy.dtype == mixed:
        return
    name, own = (str(dtype).removeprefix("torch.") for dtype in (mixed, policy.dtype))
    is_adapter = policy is not model
    advice = f"Set `dtype: {name}`" if is_adapter else f"Train an adapter (`use_peft: true`, `dtype: {name}`)"
    raise ValueError(
        f"`cache_implementation: {cache}` needs a policy in {name}, because its keys and values have one type. This "
        f"policy is in {own}. {advice}, or leave `cache_implementation` out."
    )


@contextmanager
def plain_output(model: Any) -> Iterator[None]:
    """Leave out a policy's settings that change the form of the output: `generate` adds them to those of a run."""
    policy = causal_lm(model)
    own = policy.generation_config
    policy.generation_config = copy.deepcopy(own)
    for name, setting in SETTINGS.items():
        if setting.effect == "form" and hasattr(own, name):
            setattr(policy.generation_config, name, None)
    try:
        yield
    finally:
        policy.generation_config = own


def mend_generation_config(model: Any) -> None:
    """Make the generation config of a model one that transformers saves, in place, and report the changes.

    transformers loads a file with `temperature` and without `do_sample`, but it does not save it once another value
    has changed.
    """
    policy = causal_lm(model)
    own = getattr(policy, "generation_config", None)
    if own is None or not (wrong := _refused(own)):
        return
    mended, changes = copy.deepcopy(own), dict[str, Any]()
    if own.do_sample is None and any(SETTINGS[name].effect == "distribution" for name in wrong):
        mended.do_sample = changes["do_sample"] = True
    for name in _refused(mended):
        setattr(mended, name, None)
        changes[name] = None
    policy.generation_config = mended
    said = ", ".join(f"`{name}: {'null' if value is None else str(value).lower()}`" for name, value in changes.items())
    logger.warning(f"The model's `generation_config.json` is not valid for transformers. It is saved with {said}.")


def _refused(config: Any) -> list[str]:
    """Return the settings with which transformers would not save a generation config."""
    try:
        config.validate(strict=True)
    except ValueError as error:
        return re.findall(r"^- `(\w+)`", str(error), re.MULTILINE)
    return []
