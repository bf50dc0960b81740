"""A reward model whose backbone is frozen: its states are computed once, and a run trains a small network on them."""

from collections.abc import Iterable
from os.path import commonprefix
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForSequenceClassification
from transformers.modeling_outputs import BaseModelOutputWithPast

from rlhf_recipes.models.reward_model import with_score_head

WIDTH = 128


def key_of(tokens: Iterable[int]) -> str:
    """Return the key of a text."""
    return " ".join(map(str, tokens))


@torch.no_grad()
def write_states(file: Path, model: Path, layers: int, pairs: list[tuple[list[int], list[int]]]) -> None:
    """Write two states of each text after the first layers of a model: that of the last token, and the mean.

    The texts of a pair share their beginning, which is read once.
    """
    backbone = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, num_hidden_layers=layers).model.eval()
    backbone.norm = nn.Identity()
    found: dict[str, Tensor] = {}
    for first, second in pairs:
        shared = len(commonprefix([first[:-1], second[:-1]]))
        output = backbone(torch.tensor([first]), use_cache=True)
        output.past_key_values.crop(shared - len(first))
        rest = backbone(torch.tensor([second[shared:]]), past_key_values=output.past_key_values).last_hidden_state[0]
        states = output.last_hidden_state[0]
        for tokens, known in ((first, states), (second, torch.cat([states[:shared], rest]))):
            known = known[1:].float()  # the first token's state is huge
            found[key_of(tokens)] = torch.cat([known[-1], known.mean(dim=0)])
    torch.save(found, file)


class FrozenStates(nn.Module):
    """Stand for the backbone of a classifier: look states up by their tokens, and train two layers on them."""

    def __init__(self, states: dict[str, Tensor]) -> None:
        super().__init__()
        every = torch.stack(list(states.values()))
        mean, std = every.mean(dim=0), every.std(dim=0)
        self.states = {key: (value - mean) / std for key, value in states.items()}
        self.network = nn.Sequential(nn.Linear(every.shape[1], WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU())

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> BaseModelOutputWithPast:
        """Return the same hidden state at every token of a text."""
        rows = zip(input_ids, attention_mask.bool(), strict=True)
        known = torch.stack([self.states[key_of(ids[kept].tolist())] for ids, kept in rows])
        hidden = self.network(known)[:, None].expand(-1, input_ids.shape[1], -1)
        return BaseModelOutputWithPast(last_hidden_state=hidden)


def frozen_reward_model(file: Path, model: Path, pad_token_id: int) -> LlamaForSequenceClassification:
    """Return a new reward model on saved states."""
    config = AutoConfig.from_pretrained(model, num_hidden_layers=1, num_labels=1, pad_token_id=pad_token_id)
    classifier = LlamaForSequenceClassification(config)
    classifier.model = FrozenStates(torch.load(file, weights_only=True))
    classifier.score = nn.Linear(WIDTH, 1, bias=False)
    nn.init.normal_(classifier.score.weight, std=(WIDTH + 1) ** -0.5)
    return with_score_head(classifier)
