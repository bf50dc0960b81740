"""Output in the terminal: results, and no noise that we can remove."""

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import rich.text
from rich.console import Console
from rich.table import Table
from rich.text import Text

# transformers and TRL warn about their own code. A user can do nothing about it.
_UPSTREAM_WARNINGS = (
    (FutureWarning, r"`gradient_checkpointing` is deprecated"),
    (FutureWarning, r"`is_gradient_checkpointing` is deprecated"),
    (UserWarning, r".*'pin_memory' argument is set as true but no accelerator is found"),
)
# Notes about faster parts that are not there. A run does without them. (Logger, beginning of the note.)
_UPSTREAM_NOTES = (
    ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward"),
    ("DeepSpeed", "Setting accelerator to CPU"),  # where it is installed, accelerate imports it on every machine
)
# Characters that a terminal obeys: escapes (ESC, C1), a carriage return, marks that turn the direction of text. Half a
# pair of UTF-16 cannot be printed at all.
_OBEYED = [*range(9), *range(11, 32), *range(127, 160), *range(0xD800, 0xE000)]
_OBEYED += [0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)]
_VISIBLE = {code: ascii(chr(code))[1:-1] for code in _OBEYED}
_hide: Callable[[str], str] = str


def _is_other(beginning: str, record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(beginning)


for _name, _beginning in _UPSTREAM_NOTES:  # already now: bitsandbytes speaks when transformers imports it
    logging.getLogger(_name).addFilter(partial(_is_other, _beginning))


def hide_by(hide: Callable[[str], str]) -> None:
    """Replace secrets by this function in everything that is printed. `rlhf_recipes.options.secrets` sets it."""
    global _hide
    _hide = hide


def visible(text: str) -> str:
    """Return text from a model or a server with names for the characters that a terminal obeys."""
    return text.translate(_VISIBLE)


@contextmanager
def visible_tables() -> Iterator[None]:
    """Show such characters as text inside, also in tables of other libraries. Rich itself removes a few."""
    before = vars(rich.text)["strip_control_codes"]
    vars(rich.text)["strip_control_codes"] = visible
    try:
        yield
    finally:
        vars(rich.text)["strip_control_codes"] = before


def _shown(text: str) -> str:
    return visible(_hide(text))


def quiet_start() -> None:
    """Silence the libraries' notes about themselves, and show a refusal of this library without its traceback.

    Where the output is no terminal, the bars of the libraries are off too. Each recipe calls this first.
    """
    sys.excepthook = _show_error
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for category, message in _UPSTREAM_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
    logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)
    logging.getLogger("rlhf_recipes.preflight.policy").setLevel(logging.ERROR)  # the recipes print its findings
    if not sys.stderr.isatty():
        _hide_bars()


def _hide_bars() -> None:
    """Switch off the bars of the libraries: in a file, their carriage returns make one endless line."""
    import datasets
    import huggingface_hub
    import transformers

    datasets.disable_progress_bars()
    huggingface_hub.utils.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def _show_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an error that this library raises about its input without a traceback, and any other error with it."""
    if isinstance(error, KeyboardInterrupt):
        return  # the user has pressed Ctrl-C
    raised_in = Path(traceback.extract_tb(trace)[-1].filename) if trace is not None else Path()
    if isinstance(error, ValueError | OSError) and raised_in.is_relative_to(Path(__file__).parent):
        sys.stderr.write(_shown(f"Error: {error}\n"))
    else:
        sys.stderr.write(_shown("".join(traceback.format_exception(kind, error, trace))))


if Path(sys.argv[0]).resolve().parent.name == "recipes":
    sys.excepthook = _show_error  # already now: the other imports of a recipe take seconds, and Ctrl-C may come


def print_table(title: str, rows: dict[str, Any], columns: Sequence[str] = ("metric", "value")) -> None:
    """Print a mapping as a table. A value is a number, a text, or a sequence of these for several columns."""
    table = Table(*columns, title=title)
    for name, value in rows.items():
        cells = value if isinstance(value, list | tuple) else [value]
        texts = [f"{cell:z,.3f}" if isinstance(cell, float) else str(cell) for cell in cells]
        table.add_row(*(Text(_shown(text)) for text in (name, *texts)))
    Console().print(table)


def print_lines(*lines: str) -> None:
    """Print lines to copy: unbroken, also in a narrow terminal."""
    for line in lines:
        Console().print(Text(_shown(line)), soft_wrap=True)


def duration(seconds: float) -> str:
    """Return a time as text, as in `1 h 2 min` or `3 min 4 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"


def completions_table(columns: dict[str, list[Any]], num_shown: int) -> None:
    """Print some completions of baseline and policy side by side."""
    table = Table("prompt", "baseline", "policy", title="Completions before and after", show_lines=True)
    rows = list(zip(columns["prompt"], columns["baseline_completion"], columns["policy_completion"], strict=True))
    for prompt, baseline, policy in rows[:: max(len(rows) // max(num_shown, 1), 1)][:num_shown]:
        last = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        # The text of a model is no markup.
        table.add_row(*(Text(visible(text)) for text in (last.strip(), baseline, policy)))
    Console().print(table)
