"""The states that `benchmarks/reward_models.py` trains on, and its methods."""

import sys
from pathlib import Path

import pytest
import tiny
import torch
from tolerances import BF16, EXACT, FP32, assert_close
from transformers import AutoModelForCausalLM

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from frozen_states import frozen_reward_model, key_of, write_states  # noqa: E402
from reward_model_methods import Balanced, correlation  # noqa: E402

pytestmark = pytest.mark.tiny
FIRST, SECOND = [5, 6, 7, 8, 9, 10], [5, 6, 7, 11]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Write a policy of two layers, and the states of two texts after its first layer."""
    folder = tmp_path_factory.mktemp("states")
    base = Path(tiny.save(tiny.policy(tiny.tokenizer()), folder / "base"))
    write_states(folder / "states.pt", base, 1, [(FIRST, SECOND), (SECOND, FIRST[:5])])
    return folder / "states.pt", base


def test_a_shared_beginning_changes_no_state(files):
    states, base = files
    found = torch.load(states, weights_only=True)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, num_hidden_layers=2)
    for tokens in (FIRST, SECOND, FIRST[:5]):
        hidden = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[1][0, 1:].float()
        assert_close(found[key_of(tokens)], torch.cat([hidden[-1], hidden.mean(dim=0)]), BF16)


def test_padding_changes_no_score(files):
    model = frozen_reward_model(*files, pad_token_id=0)
    ids = torch.tensor([FIRST, [*SECOND, 0, 0]])
    scores = model(input_ids=ids, attention_mask=(ids != 0).long()).logits
    alone = model(input_ids=torch.tensor([SECOND]), attention_mask=torch.ones(1, 4)).logits
    assert_close(scores[1:], alone, FP32)
    assert scores[0] != scores[1]


def test_a_correlation_is_that_of_pearson():
    a, b = torch.randn(2, 20, generator=torch.manual_seed(0))
    assert_close(correlation(a, b), torch.corrcoef(torch.stack([a, b]))[0, 1], FP32)
    assert_close(correlation(a, torch.ones(20)), torch.tensor(0.0), EXACT)


def test_both_sides_weigh_the_same(tmp_path):
    data = tiny.preferences()
    trainer = Balanced(
        tiny.reward_model(tiny.tokenizer()),
        tiny.reward_config(tmp_path),
        train_dataset=data.map(lambda row, i: {"chosen": "red" if i < 2 else row["chosen"]}, with_indices=True),
        processing_class=tiny.tokenizer(),
    )
    gaps = [len(row["chosen_ids"]) - len(row["rejected_ids"]) for row in trainer.train_dataset]
    longer, shorter = (sum(sign * gap > 0 for gap in gaps) for sign in (1, -1))
    assert longer > shorter > 0
    assert longer * trainer.weights[1] == shorter * trainer.weights[-1] == (longer + shorter) / 2
