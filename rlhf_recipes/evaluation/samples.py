"""Write tables of completions, with their scores and the reason why each one stopped.

The tables are files in the output directory, in the format of MLflow's tables. `mlflow.load_table` and
`pandas.read_json(path, orient="split")` read them.
"""

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from rlhf_recipes.data.messages import Text, as_text

logger = logging.getLogger(__name__)
SAMPLES_DIRECTORY = "samples"
LATEST = "evaluation.json"  # the latest evaluation: runs can be compared where they have a table of the same name
LATEST_ROWS = 500  # prompts, so that a browser can show the tables of many runs
LATEST_CHARACTERS = 2_000  # of a text
# of every table, beside those of the rewards
COLUMNS = {"prompt", "completion", "score", "kl", "length", "stop", "dense_rewards"}


def reward_columns(rewards: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the scores by the column of a table: the name of the reward, or `<name>_reward` where that is taken."""
    return {f"{name}_reward" if name in COLUMNS else name: scores for name, scores in rewards.items()}


def sample_rows(
    prompts: list[Text],
    completions: list[Text],
    completion_ids: list[list[int]],
    scores: Mapping[str, Tensor],
    truncated: Tensor,
) -> list[dict[str, Any]]:
    """Return one row per completion: prompt, completion, every score, length in tokens, and what stopped it.

    Args:
        prompts: Text or messages.
        completions: Text or messages.
        completion_ids: Token ids without padding.
        scores: Scores by name, each `(B,)`. A missing score is NaN.
        truncated: True where the length limit cut the completion, `(B,)`.
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


def dense_column(parts: Tensor) -> list[str]:
    """Return the rewards of tokens as a text per completion: `12: 1, 30: -1.5` is 1 at token 12 and -1.5 at token 30.

    Args:
        parts: Rewards of tokens, `(B, T)`.
    """
    return [", ".join(f"{t}: {reward:.4g}" for t, reward in enumerate(row) if reward) for row in parts.tolist()]


def write_table(rows: list[dict[str, Any]], output_dir: str | Path, kind: str, step: int) -> Path | None:
    """Write rows to `samples/<kind>-<step>.json` in `output_dir`, and return the path.

    A table is only to look at. If the disk is full, say so, and return `None`: the training goes on.

    Args:
        rows: Rows that `sample_rows` returned.
        output_dir: Output directory of the run.
        kind: `training` or `evaluation`.
        step: Number of optimiser steps so far.
    """
    file = Path(output_dir, SAMPLES_DIRECTORY, f"{kind}-{step:06d}.json")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_json(file, orient="split", index=False, indent=2)
    except OSError as error:
        with suppress(OSError):
            file.unlink(missing_ok=True)
        logger.warning(f"The table {file} could not be written: {error}. The training goes on without it.")
        return None
    return file


def read_table(file: Path) -> pd.DataFrame:
    """Return a table that `write_table` wrote. Texts stay texts, also where pandas would see numbers or times."""
    table = json.loads(file.read_text(encoding="utf-8"))
    return pd.DataFrame(table["data"], columns=table["columns"])


def write_evaluation(rows: list[dict[str, Any]], output_dir: str | Path, step: int) -> None:
    """Write the table of an evaluation, and replace that of the latest one."""
    if rows and write_table(rows, output_dir, "evaluation", step) is not None:
        write_latest(pd.DataFrame(rows), output_dir)


def write_latest(table: pd.DataFrame, output_dir: str | Path) -> None:
    """Write `samples/evaluation.json`: one row per prompt, at most `LATEST_ROWS`, with shortened texts.

    A run that sends the file meanwhile sends the old or the new one whole.

    Args:
        table: Columns `prompt` and `completion`, and others.
        output_dir: Output directory of the run.
    """
    file = Path(output_dir, SAMPLES_DIRECTORY, LATEST)
    shown = table.drop_duplicates("prompt").head(LATEST_ROWS)
    texts = [name for name in ("prompt", "completion", "baseline_completion") if name in shown]
    shown = shown.assign(**{name: shown[name].str.slice(0, LATEST_CHARACTERS) for name in texts})
    partial = file.with_name(f"{LATEST}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        shown.to_json(partial, orient="split", index=False, indent=2)
        partial.replace(file)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        logger.warning(f"The table {file} could not be written: {error}. The run goes on without it.")


def latest_table(output_dir: str | Path) -> Path | None:
    """Return the table of the latest evaluation; `None` if there is none."""
    file = Path(output_dir, SAMPLES_DIRECTORY, LATEST)
    return file if file.is_file() else None


def tables_of_step(output_dir: str | Path, step: int) -> list[Path]:
    """Return the tables that a run wrote at a step."""
    return sorted(Path(output_dir, SAMPLES_DIRECTORY).glob(f"*-{step:06d}.json"))


def tables_until(output_dir: str | Path, step: int) -> list[Path]:
    """Return the tables that a run wrote up to a step, in the order of the steps."""
    tables = Path(output_dir, SAMPLES_DIRECTORY).glob("*-*.json")
    steps = {table: int(number) for table in tables if (number := table.stem.split("-")[-1]).isdecimal()}
    return sorted((table for table in steps if steps[table] <= step), key=lambda table: (steps[table], table))
