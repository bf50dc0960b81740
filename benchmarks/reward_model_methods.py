"""The ways to train a reward model that `reward_models.py` compares. Some are here only, as they brought no gain."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from trl import RewardTrainer

from rlhf_recipes import RewardModelTrainer


def lengths_of(inputs: dict[str, Any]) -> Tensor:
    """Return the tokens of each text, `(2B,)`: chosen, then rejected."""
    return inputs["attention_mask"].sum(dim=1).float()


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Return the Pearson correlation of two vectors, or 0 if one of them is constant."""
    a, b = a - a.mean(), b - b.mean()
    return (a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-6)


class Penalised(RewardModelTrainer):
    """Add a penalty of a batch to TRL's loss."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Add the penalty in training."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if self.model.training:
            loss = loss + self.penalty(outputs.logits.squeeze(-1), inputs)
        return (loss, outputs) if return_outputs else loss

    def penalty(self, scores: Tensor, inputs: Any) -> Tensor:
        """Return the penalty of a batch."""
        raise NotImplementedError


class SumToZero(Penalised):
    """Press the sum of a batch's scores to zero (Hong et al. 2025, arXiv:2505.07271), weight 0.001."""

    def penalty(self, scores: Tensor, inputs: Any) -> Tensor:
        """Return the squared sum of all scores of the batch."""
        return 1e-3 * scores.sum().square()


class Uncorrelated(Penalised):
    """Punish the squared correlation of score gap and length gap in a batch, weight 1."""

    def penalty(self, scores: Tensor, inputs: Any) -> Tensor:
        """Return the squared correlation."""
        gaps, length_gaps = (first - second for first, second in (scores.chunk(2), lengths_of(inputs).chunk(2)))
        return correlation(gaps, length_gaps).square()


class Balanced(Penalised):
    """Give the pairs with the longer answer chosen as much weight as those with the shorter one chosen."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        pairs = zip(self.train_dataset["chosen_ids"], self.train_dataset["rejected_ids"], strict=True)
        signs = [(len(chosen) > len(rejected)) - (len(chosen) < len(rejected)) for chosen, rejected in pairs]
        half = (len(signs) - signs.count(0)) / 2
        self.weights = {sign: half / max(signs.count(sign), 1) for sign in (1, -1)} | {0: 1.0}

    def penalty(self, scores: Tensor, inputs: Any) -> Tensor:
        """Return what the weights change of the loss."""
        (chosen, rejected), (longer, shorter) = scores.chunk(2), lengths_of(inputs).chunk(2)
        weights = scores.new_tensor([self.weights[int(sign)] for sign in (longer - shorter).sign().tolist()])
        return -((weights - 1) * logsigmoid(chosen - rejected)).mean()


class Smoothed(Penalised):
    """Take a tenth of the labels to be wrong (conservative DPO, Mitchell 2023)."""

    def penalty(self, scores: Tensor, inputs: Any) -> Tensor:
        """Return what the other label of each pair changes of the loss: `log sigmoid(d) - log sigmoid(-d) = d`."""
        chosen, rejected = scores.chunk(2)
        return 0.1 * (chosen - rejected - inputs.get("margin", 0)).mean()


class LengthHead(RewardModelTrainer):
    """Train a second head for what goes with length, and throw it away (ODIN, Chen et al. 2024, arXiv:2402.07319).

    Differs: the correlations are those of the gaps within pairs, in which the prompt cancels.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.score = self.model.score
        self.model.length_head = nn.Linear(self.score.in_features, 1, bias=False)
        nn.init.normal_(self.model.length_head.weight, std=self.score.in_features**-0.5)
        self.score.register_forward_pre_hook(lambda _, inputs: setattr(self, "states", inputs[0]))

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Replace the loss in training: both heads rank the pairs, and only one may follow the length."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if self.model.training:
            loss = self.both_heads(outputs.logits.squeeze(-1), lengths_of(inputs))
        return (loss, outputs) if return_outputs else loss

    def both_heads(self, quality: Tensor, lengths: Tensor) -> Tensor:
        """Return the ranking loss of the sum, the two correlations, and the overlap of the heads, weight 1 each."""
        states = self.states[torch.arange(len(lengths)), lengths.long() - 1].float()
        length = self.model.length_head(states).squeeze(-1)
        chosen, rejected = (quality + length).chunk(2)
        overlap = nn.functional.normalize(self.score.weight) @ nn.functional.normalize(self.model.length_head.weight).T
        gap, quality_gap, length_gap = (
            first - second for first, second in (x.chunk(2) for x in (lengths, quality, length))
        )
        correlations = correlation(quality_gap, gap).abs() - correlation(length_gap, gap)
        return -logsigmoid(chosen - rejected).mean() + correlations + overlap.abs().sum()


@dataclass(frozen=True)
class Method:
    """Hold one way to train: a trainer, and options beside those of the world."""

    trainer: type[RewardTrainer]
    options: dict[str, Any] = field(default_factory=dict)


TRL = "trl"
METHODS = {
    TRL: Method(RewardTrainer),
    "length margins": Method(RewardModelTrainer, {"remove_length_bias": True}),
    "L2": Method(RewardModelTrainer, {"l2_coefficient": 0.05}),
    "length margins and L2": Method(RewardModelTrainer, {"remove_length_bias": True, "l2_coefficient": 0.05}),
    "smoothing": Method(Smoothed),
    "length margins and smoothing": Method(Smoothed, {"remove_length_bias": True}),
    "sum to zero": Method(SumToZero),
    "correlation penalty": Method(Uncorrelated),
    "balanced weights": Method(Balanced),
    "length head": Method(LengthHead),
}
