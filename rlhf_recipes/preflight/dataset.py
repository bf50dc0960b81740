"""Count the rows of a dataset that would teach something wrong: repeated, contradicting and leaked rows, and length.

A hundred thousand pairs take 3 s as text and 6 s as chats. `rlhf_recipes/data/prompts.py` refuses empty rows.
"""

import json
from typing import Any

import pandas as pd
from datasets import Dataset

from rlhf_recipes.preflight.finding import Finding

# Share of rows up to which a defect does not show in the result.
NEGLIGIBLE = 0.01
# Share of pairs in which one side is longer. At 75 %, counting tokens ranks as well as most reward models do.
ONE_SIDED = 0.75
# A prompt this many times longer than the median, and longer than a page, fills its rollouts with padding.
OUTLIER, PAGE = 20, 4_000


def texts(dataset: Dataset, columns: list[str]) -> pd.DataFrame:
    """Return columns as text that can be compared: messages as JSON, plain text without outer white space."""
    table = dataset.select_columns(columns).with_format(None)
    return pd.DataFrame({column: _as_text(table[column]) for column in columns})


def _as_text(values: Any) -> pd.Series:
    values = list(values)
    if values and isinstance(values[0], str):
        return pd.Series(values, dtype=object).str.strip()
    encode = json.JSONEncoder(ensure_ascii=False, sort_keys=True).encode
    return pd.Series([encode(value) for value in values], dtype=object)


def check_prompts(train: Dataset, evaluation: Dataset | None) -> list[Finding]:
    """Return findings about the prompts of training and evaluation."""
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
            "it is padded to its length. Drop or shorten it."
        )
        findings.append(Finding("warning", message))
    return [finding for finding in (*findings, _leak(prompts, evaluation)) if finding is not None]


def check_preferences(train: Dataset, evaluation: Dataset | None) -> list[Finding]:
    """Return findings about preference pairs."""
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
        _finding(reverse.isin(pair) & ~same, "pairs contradict another one with both answers swapped. Drop one"),
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
    """Return the share of pairs in which the longer answer is chosen, among pairs of different length."""
    difference = table["chosen"].str.len() - table["rejected"].str.len()
    differs = difference[difference != 0]
    return float((differs > 0).mean()) if len(differs) else None


def check_left_out(given: Dataset, prepared: Dataset, args: Any, purpose: str) -> list[Finding]:
    """Return a warning if TRL has left out rows that do not fit `max_length`."""
    left_out = 0 if getattr(args, "packing", False) else len(given) - len(prepared)  # packed rows are fewer
    if left_out <= NEGLIGIBLE * len(given):
        return []
    if "chosen_ids" in prepared.column_names and "prompt_ids" not in prepared.column_names:
        what = "pairs"
    else:  # the others are cut, unless nothing of the answer would be left
        what = "prompts"
    message = (
        f"{left_out:,} of {len(given):,} {what}{purpose} are longer than `max_length` ({args.max_length}) tokens and "
        "left out. Raise `max_length`, or shorten them."
    )
    return [Finding("warning", message)]


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
