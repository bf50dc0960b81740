"""Loading of reward models: a causal LM's backbone with a scalar head. Nothing is trained or scored here."""

import math
from typing import Any

from peft import PeftModel
from peft.utils import load_peft_weights
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.trainer.reward_trainer import suppress_seqcls_warning

from rlhf_recipes.algorithm.float32_linear import Float32Linear
from rlhf_recipes.models.adapter_base import at_saved_revision, find_base
from rlhf_recipes.models.fingerprint import is_adapter
from rlhf_recipes.models.loading import check_no_weights_missing
from rlhf_recipes.models.quantization import keep_unpacked, load_adapter, saved_quantization
from rlhf_recipes.models.safe_loading import safe_kwargs, safe_loading
from rlhf_recipes.models.vocabulary import fit_to_adapter


class ScoreHead(Float32Linear):
    """Map the last hidden state to a reward model's score."""


def load_reward_model(path: str, *, base: str | None = None, heads: int = 1, **kwargs: Any) -> PreTrainedModel:
    """Load a trained reward model: a plain one, or an adapter with its score head on the base that it names.

    Args:
        path: Directory or Hub name.
        base: Directory or Hub name of an adapter's base. Default: the base that the adapter names.
        heads: Number of score heads, as its card says.
        kwargs: Options of `from_pretrained`. The defaults are float32 and, for an adapter, the quantisation of its
            base in training.

    Raises:
        ValueError: If the model is not a sequence classifier with `heads` outputs, or if its score head was not saved.
    """
    kwargs = {"dtype": "float32", **kwargs}
    if is_adapter(path):
        load_adapter_weights(path, heads)  # refuses an adapter without a score head
        kwargs.setdefault("quantization_config", saved_quantization(path))
        kwargs = kwargs if base else at_saved_revision(path, kwargs)
        base_path = find_base(path, base, kwargs.get("revision"))
        with suppress_seqcls_warning(), safe_loading(path, base_path):
            model = AutoModelForSequenceClassification.from_pretrained(
                base_path, num_labels=heads, **safe_kwargs(base_path, kwargs)
            )
        with_score_head(fit_to_adapter(keep_unpacked(model), path))
        if kwargs["quantization_config"] is not None:
            return load_adapter(model, path)  # a merge would round it
        model = PeftModel.from_pretrained(model, path)
        return model if is_deepspeed_zero3_enabled() else model.merge_and_unload()  # a ZeRO-3 rank has only a shard
    with safe_loading(path):
        kwargs = safe_kwargs(path, kwargs)
        config = AutoConfig.from_pretrained(path, trust_remote_code=kwargs["trust_remote_code"])
        check_reward_config(config, path, heads, trained=True)
        model, report = AutoModelForSequenceClassification.from_pretrained(path, output_loading_info=True, **kwargs)
    with_score_head(model)
    unused = [name for name in report["unexpected_keys"] if name.startswith("score.")]
    if report["missing_keys"] or unused:
        raise ValueError(
            f"{path} does not hold the weights of a {type(model).__name__}: "
            f"{', '.join(sorted(report['missing_keys'])) or 'nothing'} is missing, and "
            f"{', '.join(sorted(unused)) or 'nothing'} of its head would not be used, so its scores would be wrong. "
            "Save the model with its score head, or wrap it in a reward function."
        )
    return model


def load_adapter_weights(path: str, heads: int = 1) -> dict[str, Tensor]:
    """Load the weights of a reward model's adapter, with its score heads, `(K, H)`, under the name `score`.

    Raises:
        ValueError: If there is no score head, or if it has another number of outputs than `heads`, or a bias.
    """
    with safe_loading(path):
        weights = load_peft_weights(path, device="cpu")
    layers = [name for name in weights if name.endswith("score.weight")]
    if len(layers) != 1:
        raise ValueError(f"The adapter {path} has no score head, so it is not a reward model.")
    weights["score"] = weights.pop(layers[0])
    if len(weights["score"]) != heads:
        raise ValueError(
            f"The score head of the adapter {path} has {len(weights['score'])} outputs, not "
            f"{'one' if heads == 1 else f'the {heads} (`score_heads`) of its card'}."
        )
    if any(name.endswith("score.bias") for name in weights):
        raise ValueError(f"The score head of the adapter {path} has a bias, which would not be used.")
    return weights


def load_reward_model_base(path: str, *, heads: int = 1, **kwargs: Any) -> PreTrainedModel:
    """Load the model from which reward modelling starts.

    A causal LM gets new score heads, drawn from N(0, 1/sqrt(H+1)). A reward model keeps its own.

    Raises:
        ValueError: If `path` is an adapter, or a classifier with another number of outputs than `heads`.

    Source: head initialisation, Stiennon et al. 2020, arXiv:2009.01325; Huang et al. 2024, arXiv:2403.17031.
    """
    if is_adapter(path):
        raise ValueError(
            f"{path} is an adapter, but a reward model starts from a whole model. Merge it into its base first: "
            f"`rlhf_recipes.models.loading.load_policy({path!r}).save_pretrained(..)`. Save its tokenizer there too."
        )
    with suppress_seqcls_warning(), safe_loading(path):
        kwargs = {"dtype": "float32", **safe_kwargs(path, kwargs)}
        config = AutoConfig.from_pretrained(
            path, **{k: v for k, v in kwargs.items() if k in ("revision", "trust_remote_code")}
        )
        trained = check_reward_config(config, path, heads)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=heads, output_loading_info=True, **kwargs
        )
    with_score_head(keep_unpacked(model))
    missing = [name for name in report["missing_keys"] if trained or not name.startswith("score.")]
    check_no_weights_missing(model, missing, path)
    if not trained:
        with gather_params_ctx(model.score.weight):
            nn.init.normal_(model.score.weight, std=1 / math.sqrt(model.score.in_features + 1))
    return model


def check_reward_config(config: Any, path: str, heads: int = 1, *, trained: bool = False) -> bool:
    """Return whether the configuration is a reward model's.

    Args:
        config: Model configuration.
        path: Name of the model in messages.
        heads: Number of score heads that it must have.
        trained: Whether only a reward model is accepted.

    Raises:
        ValueError: If the model has another number of outputs, or if `trained` is true and it is not a reward model.
    """
    is_classifier = any(name.endswith("ForSequenceClassification") for name in config.architectures or [])
    if is_classifier and config.num_labels != heads:
        expected = "one (`num_labels=1`)" if heads == 1 else f"{heads} here, one per score head"
        raise ValueError(f"{path} has {config.num_labels} labels; a reward model has {expected}.")
    if trained and not is_classifier:
        raise ValueError(
            f"{path} is not a reward model ({', '.join(config.architectures or ['no architecture'])}). Train one with "
            "`rlhf reward-modeling`."
        )
    return is_classifier


def with_score_head(model: PreTrainedModel) -> PreTrainedModel:
    """Turn a classifier's `score` layer into a `ScoreHead`, in place.

    Raises:
        ValueError: If there is no linear `score` layer. Nearly every decoder of transformers has one.
    """
    check_score_layer(model)
    if not isinstance(model.score, nn.Linear):
        raise ValueError(f"The `score` layer of {type(model).__name__} is a {type(model.score).__name__}, not linear.")
    model.score.__class__ = ScoreHead  # the weight stays in place: under ZeRO-3 it is on all ranks
    store_in_float32(model.score)
    return model


def check_score_layer(model: PreTrainedModel | PeftModel) -> None:
    """Check that a classifier reads its score at a token of its text, by a layer named `score`, as decoders do.

    Raises:
        ValueError: If it is an encoder, for example of the BERT family, or a decoder with another head.
    """
    name = type(model.get_base_model() if isinstance(model, PeftModel) else model).__name__
    of_each_token = name.endswith("ForTokenClassification")
    if not isinstance(getattr(model, "score", None), nn.Module) or of_each_token or model.config.is_encoder_decoder:
        raise ValueError(
            f"{name} has no `score` layer that reads the last token; use a decoder architecture for reward models. "
            "For another model, write a reward function that calls it."
        )


def store_in_float32(head: nn.Linear) -> None:
    """Store a head in float32, in place, except under ZeRO-3, which stores all weights in one precision."""
    if not is_deepspeed_zero3_enabled():
        head.float()
