"""Counts over a dataset that show what it would teach: repeated, contradicting and leaking rows, and rewarded length.

Pure; a hundred thousand pairs take 3 s, as chats 6 s. Empty rows are refused in `rlhf_recipes/data/prompts.py`.
"""

import json
from typing import Any

import pandas as pd
from datasets import Dataset

from rlhf_recipes.preflight.finding import Finding

# Share of rows below which a defect cannot be told in the result, and is not worth a line.
NEGLIGIBLE = 0.01
# Three of four: the reward model then gets as far by counting tokens as most do by reading.
ONE_SIDED = 0.75
# A prompt this many times the median, and of more than a page, makes every rollout that draws it padding.
OUTLIER, PAGE = 20, 4_000


def texts(dataset: Dataset, columns: list[str]) -> pd.DataFrame:
    """Return columns as text that can be compared: messages as JSON, plain text without white space around it."""
    table = dataset.select_columns(columns).with_format(None)
    return pd.DataFrame({column: _as_text(table[column]) for column in columns})


def _as_text(values: Any) -> pd.Series:
    values = list(values)
    if values and isinstance(values[0], str):
        return pd.Series(values, dtype=object).str.strip()
    encode = json.JSONEncoder(ensure_ascii=False, sort_keys=True).encode
    return pd.Series([encode(value) for value in values], dtype=object)


def check_prompts(train: Dataset, evaluation: Dataset | None) -> list[Finding]:
    """Return what is odd about prompts to train and to evaluate on."""
    prompts = texts(train, ["prompt"])["prompt"]
    lengths = prompts.str.len()
    median = lengths.median()
    findings = [
        _finding(prompts.duplicated(), "prompts are repeated: they are drawn more often. Drop duplicates"),
    ]
    if (longest := int(lengths.max())) > max(PAGE, OUTLIER * median):
        row = int(lengths.idxmax())
        message = (
            f"The prompt in row {row} has {longest:,} characters, the median {median:.0f}: every rollout that draws "
            "it is padded to it. Drop or shorten it."
        )
        findings.append(Finding("warning", message))
    return [finding for finding in (*findings, _leak(prompts, evaluation)) if finding is not None]


def check_preferences(train: Dataset, evaluation: Dataset | None) -> list[Finding]:
    """Return what is odd about preference pairs."""
    with_prompt = "prompt" in train.column_names
    table = texts(train, [*(["prompt"] if with_prompt else []), "chosen", "rejected"])
    if not with_prompt:
        table["prompt"] = ""
    chosen, rejected = table["prompt"] + "\0" + table["chosen"], table["prompt"] + "\0" + table["rejected"]
    same = table["chosen"] == table["rejected"]
    pair, reverse = chosen + "\0" + table["rejected"], rejected + "\0" + table["chosen"]
    share = longer_chosen(table)
    findings = [
        _finding(same, "pairs have the same text as `chosen` and `rejected`: they teach nothing. Drop them"),
        _finding(pair.duplicated(), "pairs are repeated. Drop duplicates"),
        _finding(reverse.isin(pair) & ~same, "pairs contradict another one, chosen and rejected swapped. Drop one"),
        _leak(table["prompt"], evaluation) if with_prompt else None,
    ]
    if share is not None and not 1 - ONE_SIDED < share < ONE_SIDED:
        side = "longer" if share > 0.5 else "shorter"
        message = (
            f"The {side} answer is chosen in {max(share, 1 - share):.0%} of the pairs: a reward model can learn "
            "length alone. Look at `eval_length_correlation`, or balance the pairs."
        )
        findings.append(Finding("warning", message))
    return [finding for finding in findings if finding is not None]


def longer_chosen(table: pd.DataFrame) -> float | None:
    """Return the share of pairs in which the longer answer is chosen, of those that differ in length."""
    difference = table["chosen"].str.len() - table["rejected"].str.len()
    differs = difference[difference != 0]
    return float((differs > 0).mean()) if len(differs) else None


def _leak(prompts: pd.Series, evaluation: Dataset | None) -> Finding | None:
    if evaluation is None or "prompt" not in evaluation.column_names:
        return None
    seen = texts(evaluation, ["prompt"])["prompt"].isin(prompts)
    return _finding(
        seen, "evaluation prompts are in the training data: they are not held out. Drop them from one side"
    )


def _finding(rows: pd.Series, what: str) -> Finding | None:
    count = int(rows.sum())
    if count <= NEGLIGIBLE * len(rows):
        return None
    return Finding("warning", f"{count:,} of {len(rows):,} {what} (for example row {int(rows.idxmax())}).")
