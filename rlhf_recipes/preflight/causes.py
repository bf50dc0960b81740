"""Name the usual causes of wrong numbers that apply to a model and its options."""

from typing import Any

from torch import nn

from rlhf_recipes.models.adapter_base import initialisation
from rlhf_recipes.models.critic import causal_lm
from rlhf_recipes.models.dropout import dropouts
from rlhf_recipes.models.rope import short_limit

# Entries of a configuration by which a model changes its logits after the LM head. TRL's fused head knows the first.
KNOWN_TO_TRL = (
    "final_logit_softcapping",
    "logit_scale",
    "output_multiplier",
    "lm_head_multiplier",
    "logits_scaling",
)
LOGIT_WORDS = ("logit", "lm_head_", "output_multiplier")


def causes_of_noise(model: nn.Module, args: Any) -> list[str]:
    """Return why two forwards in training mode may differ, or training and evaluation mode."""
    found = _rounding(model)
    found += [f"`{name}` is {p:g}; set `disable_dropout: true`" for name, p in dropouts(model).items()]
    if getattr(args, "neftune_noise_alpha", None):
        found.append("`neftune_noise_alpha` adds noise to the embeddings; remove it")
    config = causal_lm(model).config.get_text_config().to_dict()
    found += [f"`{name}` is {x:g}: the router adds noise" for name, x in config.items() if "jitter" in name and x]
    return found


def causes_of_other_logits(model: Any) -> list[str]:
    """Return why TRL's fused LM head may give other logits than the model itself."""
    found = [*_rounding(model), *_prompt_learning(model)]
    config = causal_lm(model).config.get_text_config().to_dict()
    changes = {
        name: value
        for name, value in config.items()
        if any(word in name for word in LOGIT_WORDS) and isinstance(value, float) and name not in KNOWN_TO_TRL
    }
    found += [
        f"the model changes its logits by `{name}: {value:g}`, which TRL's fused LM head leaves out; this "
        "architecture cannot be trained by TRL's losses"
        for name, value in changes.items()
    ]
    return found


def causes_of_dependence(model: Any) -> list[str]:
    """Return why the numbers of a row may depend on the padding or the other rows of its batch."""
    found = [*_rounding(model), *_prompt_learning(model)]
    if (limit := short_limit(model)) is not None:
        found.append(f"the model's rope changes at {limit} tokens; keep all rows on one side of it")
    if any(getattr(module, "rope_type", None) == "dynamic" for module in model.modules()):
        found.append("the model's rope (`dynamic`) depends on the longest row of a batch")
    implementation = getattr(causal_lm(model).config, "_attn_implementation", None)
    if implementation not in (None, "eager", "sdpa"):
        found.append(f"`attn_implementation: {implementation}`; try `sdpa`")
    return found


def causes_of_another_start(model: Any) -> list[str]:
    """Return why the policy may start from another model than the one that was given, or than the reference."""
    found = _prompt_learning(model)
    for config in getattr(model, "peft_config", {}).values():
        if (chosen := initialisation(config)) is not None:
            found.append(
                f"`init_lora_weights: {chosen}` changes the policy or the base's weights; use `true`, or "
                "train an adapter with it by SFT and start from that"
            )
    return found


def _rounding(model: Any) -> list[str]:
    if not getattr(causal_lm(model), "is_loaded_in_8bit", False):
        return []
    return ["`load_in_8bit` rounds activations by the rows of a batch; use `load_in_4bit`"]


def _prompt_learning(model: Any) -> list[str]:
    config = next(iter(getattr(model, "peft_config", {}).values()), None)
    if config is None or not config.is_prompt_learning:
        return []
    return [f"{config.peft_type.value} puts tokens of its own before a row and ignores its padding; use LoRA"]
