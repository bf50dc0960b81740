"""Score completions with a reward model that is a second adapter on the policy's own base.

One base then serves four roles: policy (its adapter), reference (no adapter), critic (value head) and reward model
(this adapter). Each forward pass chooses its adapter. The base may be in 4 bit.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from torch import Tensor
from transformers import AutoConfig
from trl.trainer.utils import use_adapter

from rlhf_recipes.models.adapter_base import base_of_adapter, initialisation, saved_base
from rlhf_recipes.models.fingerprint import is_adapter
from rlhf_recipes.models.loading import position_limit
from rlhf_recipes.models.quantization import quantization_of, restore_precision, saved_quantization
from rlhf_recipes.models.reward_model import ScoreHead, load_adapter_weights
from rlhf_recipes.models.safe_loading import safe_loading
from rlhf_recipes.rewards.card import RewardModelCard, heads_of
from rlhf_recipes.rewards.protocol import ScoringRun
from rlhf_recipes.rewards.reading import adapter_pad_id, read_position, unknown_tokens, vocabulary_size
from rlhf_recipes.rewards.scorer import RewardModelScorer, load_scorer_tokenizer

REWARD_ADAPTER = "reward"


class RewardAdapterScorer(RewardModelScorer):
    """Score completions with a LoRA reward model, on the backbone of the policy in training.

    The scores are the same as those of the reward model alone. Call `prepare` before the first score.

    Args:
        path: Directory that `RewardModelTrainer` saved with a `peft_config`.

    Raises:
        ValueError: If `path` is not an adapter with a score head.
    """

    def __init__(self, path: str) -> None:
        if not is_adapter(path):
            raise ValueError(
                f"`reward_adapter` is {path}, which is no adapter. Train the reward model with `use_peft: true`, or "
                "name a whole model as `reward_model_path`."
            )
        card = RewardModelCard.load(path)
        weights = load_adapter_weights(path, heads_of(card))
        score = weights.pop("score")
        if others := [name for name in weights if "lora_" not in name and ".token_adapter." not in name]:
            raise ValueError(
                f"`reward_adapter` {path} also holds {len(others)} weights that are not LoRA's, for example "
                f"`{others[0]}`: they would replace the policy's. Load it by `reward_model_path`, or train it with "
                "LoRA alone (`modules_to_save` empty, `bias: none`)."
            )
        self.head = ScoreHead(score.size(1), score.size(0), bias=False).requires_grad_(False)
        self.head.weight.data.copy_(score)
        self.source, self._weights = path, weights
        super().__init__(None, load_scorer_tokenizer(path), card)
        self.__name__ = Path(path).name

    def _placed_model(self, run: ScoringRun) -> PeftModel:
        """Add the frozen adapter to the policy, and return the policy.

        The policy has its own adapter, and its causal LM takes `backbone_only` (`add_completion_forward`).

        Raises:
            ValueError: If the reward model was trained on another base, if the base has no embedding for EOS, or if
                nothing says at which token the score is read.
        """
        policy, adapter_config = run.policy, copy.deepcopy(PeftConfig.from_pretrained(self.source))
        self._check_base(policy, adapter_config.base_model_name_or_path)
        if (chosen := initialisation(adapter_config)) not in (None, False, "orthogonal"):  # these leave the base alone
            raise ValueError(
                f"`reward_adapter` {self.source} was trained with `init_lora_weights: {chosen}`, which can "
                "change the weights of the base, so it cannot share the policy's. Load it by `reward_model_path`."
            )
        adapter_config.modules_to_save, adapter_config.task_type, adapter_config.inference_mode = None, None, True
        base = policy.get_base_model()
        self.unknown_tokens = unknown_tokens(self.tokenizer, vocabulary_size(base), self.__name__)
        with safe_loading(self.source):  # TRL has written the policy's padding token into the configuration in memory
            config = AutoConfig.from_pretrained(base.config._name_or_path, trust_remote_code=False)
        self.pad_token_id = adapter_pad_id(config, self.tokenizer, self.card, self.source)
        self.position_limit = position_limit(base)
        policy.add_adapter(REWARD_ADAPTER, adapter_config)
        set_peft_model_state_dict(policy, self._weights, adapter_name=REWARD_ADAPTER)
        if getattr(policy, "is_quantized", False):
            restore_precision(policy, self._weights, REWARD_ADAPTER)
        for name, parameter in policy.named_parameters():
            if f".{REWARD_ADAPTER}." in name:
                parameter.requires_grad_(False)
        self._weights = {}
        return policy

    @property
    def _filler(self) -> int:
        return super()._filler or 0  # the score is not read by the model, so any token may fill

    def _check_base(self, policy: PeftModel, trained_on: str) -> None:
        base = policy.get_base_model().config._name_or_path
        is_same, fingerprints = Path(base).resolve() == Path(trained_on).resolve(), ""
        if (noted := saved_base(self.source)) and (own := base_of_adapter(policy)):
            is_same = noted["fingerprint"] == own["fingerprint"]
            fingerprints = f" (fingerprints {noted['fingerprint']} and {own['fingerprint']})"
        if not is_same:
            raise ValueError(
                f"`reward_adapter` {self.source} was trained on {trained_on}, but the policy's base is {base}"
                f"{fingerprints}. Train a reward model on that base, or load this one beside the policy by "
                "`reward_model_path`."
            )
        ours, theirs = quantization_of(policy), saved_quantization(self.source)
        if (ours and ours.to_dict()) != (theirs and theirs.to_dict()):
            raise ValueError(
                f"`reward_adapter` {self.source} was trained on a base that was {_describe(theirs)}, but the policy's "
                f"is {_describe(ours)}, so its scores would differ. Load the policy's base in the same way."
            )

    def _score(self, batch: dict[str, Tensor], token_ids: list[list[int]]) -> Tensor:
        was_training = self.model.training
        self.model.eval()
        with use_adapter(self.model, REWARD_ADAPTER):
            states = self.model(**batch, backbone_only=True).last_hidden_state
        self.model.train(was_training)
        read = states[torch.arange(len(states)), [read_position(row, self.pad_token_id) for row in token_ids]]
        scores: Tensor = self.head.to(read.device)(read)
        return scores


def _describe(quantization: Any) -> str:
    if quantization is None:
        return "not quantised (`load_in_4bit: false`)"
    options = {k: v for k, v in quantization.to_dict().items() if k.startswith(("load_in", "bnb"))}
    return "quantised with " + ", ".join(f"{name}: {value}" for name, value in options.items())
