"""Reward modelling on labels that depend on length."""

import pytest
import tiny
import torch
from tolerances import FP32, assert_close
from torch.nn.functional import logsigmoid

from rlhf_recipes.algorithm.debiasing import length_margins

pytestmark = pytest.mark.tiny


def _trainer(tmp_path, **kwargs):
    return tiny.reward_trainer(tmp_path / "rm", **kwargs)


def _length_gaps(dataset):
    return torch.tensor([len(row["chosen_ids"]) - len(row["rejected_ids"]) for row in dataset])


@pytest.mark.parametrize("own", [False, True])
def test_what_length_explains_becomes_a_margin_of_the_training_pairs(tmp_path, own):
    """A margin of the user stays in it. The evaluation asks the score alone, so its pairs keep theirs."""
    data = tiny.preferences(margin=own)
    trainer = _trainer(tmp_path, data=data, eval_data=data, remove_length_bias=True)
    expected = length_margins(_length_gaps(trainer.train_dataset))
    assert expected.abs().max() > 0.1
    given = torch.tensor(data["margin"]) if own else 0.0
    assert_close(torch.tensor(trainer.train_dataset["margin"], dtype=torch.double), expected + given, FP32)
    assert ("margin" in trainer.eval_dataset.column_names) is own
    if own:
        assert trainer.eval_dataset["margin"] == data["margin"]


def test_the_loss_reads_the_margin_however_the_batch_is_cut(tmp_path):
    trainer = _trainer(tmp_path, remove_length_bias=True)
    batch = trainer.data_collator(list(trainer.train_dataset))
    whole, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
    margins = length_margins(_length_gaps(trainer.train_dataset))
    assert_close(whole, -logsigmoid(chosen - rejected - margins).mean(), FP32)
    halves = [trainer.data_collator(list(trainer.train_dataset)[part]) for part in (slice(4), slice(4, 8))]
    assert_close(sum(trainer.compute_loss(trainer.model, half) for half in halves) / 2, whole, FP32)


def test_tokenised_pairs_get_the_same_margins(tmp_path):
    first = _trainer(tmp_path, remove_length_bias=True).train_dataset
    again = _trainer(tmp_path, data=first.select_columns(["chosen_ids", "rejected_ids"]), remove_length_bias=True)
    assert again.train_dataset["margin"] == first["margin"]


def test_a_stream_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`remove_length_bias` reads all pairs .* `train_dataset` is a stream"):
        _trainer(tmp_path, data=tiny.preferences().to_iterable_dataset(), remove_length_bias=True)
