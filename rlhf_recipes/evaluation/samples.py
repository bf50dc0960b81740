"""Completions as tables: what a policy said, what it got for it, and how it stopped.

Written beside the weights, in the form of MLflow's tables: `mlflow.load_table` and `pandas.read_json(path,
orient="split")` read them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from rlhf_recipes.data.messages import Text, as_text

SAMPLES_DIRECTORY = "samples"


def sample_rows(
    prompts: list[Text],
    completions: list[Text],
    completion_ids: list[list[int]],
    scores: Mapping[str, Tensor],
    truncated: Tensor,
) -> list[dict[str, Any]]:
    """Return one row per completion: prompt, completion, every score, length in tokens, and why it stopped.

    Args:
        prompts: Text or messages.
        completions: Likewise.
        completion_ids: Without padding.
        scores: Figures by name, each `(B,)`; not a number where there is none.
        truncated: Which completions the length limit has cut, `(B,)`.
    """
    columns = {name: [round(x, 6) for x in values.tolist()] for name, values in scores.items()}
    return [
        {
            "prompt": as_text(prompts[row]),
            "completion": as_text(completions[row]),
            **{name: values[row] for name, values in columns.items()},
            "length": len(completion_ids[row]),
            "stop": "length" if cut else "eos",
        }
        for row, cut in enumerate(truncated.tolist())
    ]


def write_table(rows: list[dict[str, Any]], output_dir: str | Path, kind: str, step: int) -> Path:
    """Write rows to `samples/<kind>-<step>.json` in `output_dir`; return where.

    Args:
        rows: As of `sample_rows`.
        output_dir: Of the run.
        kind: `training` or `evaluation`.
        step: Optimiser steps taken.
    """
    file = Path(output_dir, SAMPLES_DIRECTORY, f"{kind}-{step:06d}.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_json(file, orient="split", index=False, indent=2)
    return file


def tables_of_step(output_dir: str | Path, step: int) -> list[Path]:
    """Return the tables that a run has written at a step."""
    return sorted(Path(output_dir, SAMPLES_DIRECTORY).glob(f"*-{step:06d}.json"))


def tables_until(output_dir: str | Path, step: int) -> list[Path]:
    """Return the tables that a run has written up to a step, in their order."""
    tables = Path(output_dir, SAMPLES_DIRECTORY).glob("*-*.json")
    steps = {table: int(number) for table in tables if (number := table.stem.split("-")[-1]).isdecimal()}
    return sorted((table for table in steps if steps[table] <= step), key=lambda table: (steps[table], table))
