"""Loading of reward models: a causal LM's backbone with a scalar head. Nothing is trained or scored here."""

import math
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from peft.utils.integrations import gather_params_ctx
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.trainer.reward_trainer import suppress_seqcls_warning

from rlhf_recipes.algorithm.float32_linear import Float32Linear
from rlhf_recipes.models.quantization import keep_unpacked, load_adapter, saved_quantization
from rlhf_recipes.models.safe_loading import safe_kwargs, safe_loading
from rlhf_recipes.models.vocabulary import fit_to_adapter

ADAPTER_CONFIG = "adapter_config.json"


class ScoreHead(Float32Linear):
    """Map the last hidden state to a reward model's score."""


def load_reward_model(path: str, *, base: str | None = None, **kwargs: Any) -> PreTrainedModel:
    """Load a trained reward model: a plain one, or an adapter with its score head on the base that it names.

    Args:
        path: Directory or Hub name.
        base: Directory or Hub name of an adapter's base. Default: the base that the adapter names.
        kwargs: Options of `from_pretrained`. The defaults are float32 and, for an adapter, the quantisation of its
            base in training.

    Raises:
        ValueError: If the model is not a sequence classifier with one output.
    """
    kwargs = {"dtype": "float32", **safe_kwargs(kwargs)}
    if is_adapter(path):
        kwargs.setdefault("quantization_config", saved_quantization(path))
        base_path = base or PeftConfig.from_pretrained(path).base_model_name_or_path
        with suppress_seqcls_warning(), safe_loading(path, base_path):
            model = AutoModelForSequenceClassification.from_pretrained(base_path, num_labels=1, **kwargs)
        with_score_head(fit_to_adapter(keep_unpacked(model), path))
        if kwargs["quantization_config"] is not None:
            return load_adapter(model, path)  # a merge would round it
        model = PeftModel.from_pretrained(model, path)
        return model if is_deepspeed_zero3_enabled() else model.merge_and_unload()  # a ZeRO-3 rank has only a shard
    with safe_loading(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=kwargs["trust_remote_code"])
        check_reward_config(config, path, trained=True)
        return with_score_head(AutoModelForSequenceClassification.from_pretrained(path, **kwargs))


def load_reward_model_base(path: str, **kwargs: Any) -> PreTrainedModel:
    """Load the model from which reward modelling starts.

    A causal LM gets a new score head, drawn from N(0, 1/sqrt(H+1)). A reward model keeps its own.

    Raises:
        ValueError: If `path` is an adapter, or a classifier with more than one output.

    Source: head initialisation, Stiennon et al. 2020, arXiv:2009.01325; Huang et al. 2024, arXiv:2403.17031.
    """
    if is_adapter(path):
        raise ValueError(
            f"{path} is an adapter, but a reward model starts from a whole model. Merge it into its base first: "
            f"`rlhf_recipes.models.loading.load_policy({path!r}).save_pretrained(..)`. Save its tokenizer there too."
        )
    kwargs = {"dtype": "float32", **safe_kwargs(kwargs)}
    with suppress_seqcls_warning(), safe_loading(path):
        config = AutoConfig.from_pretrained(
            path, **{k: v for k, v in kwargs.items() if k in ("revision", "trust_remote_code")}
        )
        trained = check_reward_config(config, path)
        model = keep_unpacked(AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, **kwargs))
    with_score_head(model)
    if not trained:
        with gather_params_ctx(model.score.weight):
            nn.init.normal_(model.score.weight, std=1 / math.sqrt(model.score.in_features + 1))
    return model


def check_reward_config(config: Any, path: str, *, trained: bool = False) -> bool:
    """Return whether the configuration is a reward model's.

    Args:
        config: Model configuration.
        path: Name of the model in messages.
        trained: Whether only a reward model is accepted.

    Raises:
        ValueError: If the model has several outputs, or if `trained` is true and it is not a reward model.
    """
    is_classifier = any(name.endswith("ForSequenceClassification") for name in config.architectures or [])
    if is_classifier and config.num_labels != 1:
        raise ValueError(f"{path} has {config.num_labels} labels; a reward model has one (`num_labels=1`).")
    if trained and not is_classifier:
        raise ValueError(
            f"{path} is not a reward model ({', '.join(config.architectures or ['no architecture'])}). Train one with "
            "`recipes/reward_modeling.py`."
        )
    return is_classifier


def with_score_head(model: PreTrainedModel) -> PreTrainedModel:
    """Turn a classifier's `score` layer into a `ScoreHead`, in place.

    Raises:
        ValueError: If there is no `score` layer without bias. Every decoder of transformers has one.
    """
    if not isinstance(getattr(model, "score", None), nn.Linear) or model.score.bias is not None:
        raise ValueError(f"{type(model).__name__} has no `score` layer; use a decoder architecture for reward models.")
    model.score.__class__ = ScoreHead  # the weight stays in place: under ZeRO-3 it is on all ranks
    store_in_float32(model.score)
    return model


def store_in_float32(head: ScoreHead) -> None:
    """Store a head in float32, in place, except under ZeRO-3, which stores all weights in one precision."""
    if not is_deepspeed_zero3_enabled():
        head.float()


def is_adapter(path: str) -> bool:
    """Return whether a local directory holds a PEFT adapter."""
    return Path(path, ADAPTER_CONFIG).is_file()
