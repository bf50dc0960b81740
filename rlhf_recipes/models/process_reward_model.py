"""Loading of process reward models: a backbone with a head that judges steps. Nothing is trained or scored here."""

from typing import Any

import torch
from peft import PeftConfig, PeftModel, TaskType
from peft.utils import load_peft_weights
from peft.utils.integrations import gather_params_ctx
from torch import nn
from transformers import AutoConfig, AutoModelForTokenClassification, PreTrainedModel

from rlhf_recipes.models.fingerprint import is_adapter
from rlhf_recipes.models.loading import check_no_weights_missing
from rlhf_recipes.models.quantization import keep_unpacked
from rlhf_recipes.models.reward_model import ScoreHead, load_on_base, store_in_float32
from rlhf_recipes.models.safe_loading import safe_kwargs, safe_loading


def is_process_reward_model(path: str, **kwargs: Any) -> bool:
    """Return whether a path names a model that judges steps: a token classifier, or an adapter of one.

    Args:
        path: Directory or Hub name.
        kwargs: Options of `from_pretrained`.
    """
    if is_adapter(path):
        return bool(PeftConfig.from_pretrained(path).task_type == TaskType.TOKEN_CLS)
    with safe_loading(path):
        return _judges_tokens(AutoConfig.from_pretrained(path, **_of_config(kwargs)))


def _judges_tokens(config: Any) -> bool:
    return any(name.endswith("ForTokenClassification") for name in config.architectures or [])


def _of_config(kwargs: dict[str, Any]) -> dict[str, Any]:
    known = {name: value for name, value in kwargs.items() if name in ("revision", "trust_remote_code")}
    return {"trust_remote_code": False, **known}


def load_process_reward_model(path: str, **kwargs: Any) -> PreTrainedModel:
    """Load a trained process reward model: a plain one, or an adapter with its head on the base that it names.

    Args:
        path: Directory or Hub name.
        kwargs: Options of `from_pretrained`. The defaults are float32 and, for an adapter, the quantisation of its
            base in training.

    Raises:
        ValueError: If the head was not saved, or has more than two outputs.
    """
    kwargs = {"dtype": "float32", **kwargs}
    if is_adapter(path):
        # The head of the base may have another size. It is replaced by that of the adapter.
        own = {"num_labels": _outputs_of_adapter(path), "ignore_mismatched_sizes": True}
        return load_on_base(path, None, AutoModelForTokenClassification, with_step_head, kwargs | own)
    with safe_loading(path):
        model, report = AutoModelForTokenClassification.from_pretrained(
            path, output_loading_info=True, **safe_kwargs(path, kwargs)
        )
    check_no_weights_missing(model, report["missing_keys"], path)
    return with_step_head(model)


def _outputs_of_adapter(path: str) -> int:
    with safe_loading(path):
        weights = load_peft_weights(path, device="cpu")
    heads = [weight for name, weight in weights.items() if name.endswith("score.weight")]
    if len(heads) != 1:
        raise ValueError(
            f"The adapter {path} has no head (`score`), so it judges no steps. Train with "
            "`modules_to_save: [score]`, or with the task type TOKEN_CLS."
        )
    return len(heads[0])


def load_process_reward_model_base(path: str, **kwargs: Any) -> PreTrainedModel:
    """Load the model from which the training starts, with one output per token.

    A causal LM gets a new head, as transformers draws it. A process reward model keeps its own. One with two outputs,
    as TRL's `PRMTrainer` made them, becomes one with their difference, which gives the same probabilities.

    Raises:
        ValueError: If `path` is an adapter, or a token classifier with more than two labels.
    """
    if is_adapter(path):
        raise ValueError(
            f"{path} is an adapter, but a process reward model starts from a whole model. Merge it into its base "
            f"first: `rlhf_recipes.models.loading.load_policy({path!r}).save_pretrained(..)`. Save its tokenizer "
            "there too."
        )
    with safe_loading(path):
        kwargs = {"dtype": "float32", **safe_kwargs(path, kwargs)}
        trained = _judges_tokens(AutoConfig.from_pretrained(path, **_of_config(kwargs)))
        labels = {} if trained else {"num_labels": 1}
        model, report = AutoModelForTokenClassification.from_pretrained(
            path, output_loading_info=True, **labels, **kwargs
        )
    missing = [name for name in report["missing_keys"] if trained or not name.startswith("score.")]
    check_no_weights_missing(model, missing, path)
    return with_one_output(with_step_head(keep_unpacked(model)))


def with_step_head(model: PreTrainedModel) -> PreTrainedModel:
    """Let the head of a token classifier compute in float32, in place.

    Raises:
        ValueError: See `check_step_head`.
    """
    check_step_head(model)
    model.score.__class__ = ScoreHead  # the weight stays in place: under ZeRO-3 it is on all ranks
    store_in_float32(model.score)
    return model


def check_step_head(model: PreTrainedModel | PeftModel) -> None:
    """Check that a model judges tokens by a linear layer `score`, as nearly every decoder of transformers does.

    Raises:
        ValueError: If it does not, or has more than two outputs.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    name, head = type(inner).__name__, getattr(inner, "score", None)
    head = getattr(head, "original_module", head)  # PEFT's wrapper of a trained head
    if not name.endswith("ForTokenClassification") or not isinstance(head, nn.Linear):
        raise ValueError(
            f"{name} has no linear layer `score` that judges each token, so it cannot be a process reward model. Use "
            "a decoder of the family of Llama, Qwen, Mistral or Gemma."
        )
    if head.out_features > 2:
        raise ValueError(
            f"{model.config._name_or_path or name} has {head.out_features} labels; a step has one output, or two "
            "(wrong and right)."
        )


@torch.no_grad()
def with_one_output(model: PreTrainedModel) -> PreTrainedModel:
    """Replace a head with the outputs "wrong" and "right" by their difference, in place."""
    head = model.score
    if head.out_features == 2:
        one = ScoreHead(head.in_features, 1, bias=head.bias is not None, device=head.weight.device)
        with gather_params_ctx(list(head.parameters())):
            one.weight.copy_(head.weight[1:] - head.weight[:1])
            if head.bias is not None:
                one.bias.copy_(head.bias[1:] - head.bias[:1])
        model.score = one
    model.config.num_labels = model.num_labels = 1
    return model


def refuse_process_reward_model(path: str, place: str) -> None:
    """Refuse a model that judges steps where only a model with one score per answer can be used.

    Args:
        path: Directory or Hub name.
        place: Name of the option or server that cannot use it, for the message.

    Raises:
        ValueError: If it judges steps.
    """
    if is_process_reward_model(path):
        raise steps_refused(path, place)


def steps_refused(path: str, place: str) -> ValueError:
    """Return the error for a model that judges steps. See `refuse_process_reward_model`."""
    return ValueError(
        f"{path} is a process reward model, which judges steps, and {place} takes only one that scores whole "
        "answers. Give PPO its path as `reward_model_path`; docs/process-rewards.md says how it is measured."
    )
