"""Reward modelling without the influence of length: margins that stand for it in the training data."""

from typing import Any

import torch
from datasets import Dataset

from rlhf_recipes.algorithm.debiasing import length_margins


def with_length_margins(dataset: Any) -> Dataset:
    """Return tokenised pairs whose margin also holds what the length explains of the label (`length_margins`).

    Args:
        dataset: Columns `chosen_ids` and `rejected_ids`. The prompt is part of both, so it cancels.

    Raises:
        ValueError: If the data is a stream, which cannot be read before training.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(
            "`remove_length_bias` reads all pairs before training, but `train_dataset` is a stream. Load it as a "
            "whole (`dataset_streaming: false`), or set `remove_length_bias: false`."
        )
    pairs = zip(dataset["chosen_ids"], dataset["rejected_ids"], strict=True)
    margins = length_margins(torch.tensor([len(chosen) - len(rejected) for chosen, rejected in pairs]))
    if "margin" in dataset.column_names:
        margins = margins + torch.tensor(dataset["margin"], dtype=margins.dtype)
        dataset = dataset.remove_columns("margin")
    return dataset.add_column("margin", margins.tolist())
