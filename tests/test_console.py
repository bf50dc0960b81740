"""What is printed gives the terminal no orders, and holds no secrets."""

import signal
import subprocess
import sys
import unicodedata

import pytest
import rich.text
from hypothesis import given
from hypothesis import strategies as st
from trl.trainer.utils import print_prompt_completions_sample

from rlhf_recipes.console import completions_table, print_lines, print_table, visible, visible_tables
from rlhf_recipes.rewards.attempts import describe_error

OBEYED = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # categories of Unicode
ORDERS = {
    "colour": "\x1b[31mred",
    "title": "\x1b]0;owned\x07",
    "link": "\x1b]8;;http://evil\x1b\\text\x1b]8;;\x1b\\",
    "C1": "\x9b2J",
    "return": "good\rbad",
    "direction": "\u202egnp.exe\u2066",
    "delete": "a\x7f\x08b",
    "half a pair": "\ud800",
    "line separator": "a\u2028b",
}


@pytest.mark.parametrize("text", ORDERS.values(), ids=ORDERS)
def test_an_order_to_the_terminal_is_shown_as_text_wherever_completions_are_printed(capfd, text):
    columns = {"prompt": [text], "baseline_completion": [text], "policy_completion": [text]}
    completions_table(columns, 1)
    print_table("Results", {text: text})
    print_lines(text)
    with visible_tables():
        print_prompt_completions_sample([text], [[{"role": "assistant", "content": text}]], {"r": [1.0]}, [1.0], 1)
    printed = capfd.readouterr().out
    assert visible(text)[:4] in printed.replace("\n", "")
    assert not {unicodedata.category(character) for character in printed if character != "\n"} & OBEYED


@given(st.text(st.characters(exclude_categories=["Cc", "Cs", "Cf", "Zl", "Zp"])))
def test_other_text_is_shown_as_it_is(text):
    assert visible(f"{text}\n\t") == f"{text}\n\t"


def test_rich_is_as_before_after_a_table():
    before = rich.text.strip_control_codes
    with visible_tables():
        assert rich.text.strip_control_codes is visible
    assert rich.text.strip_control_codes is before


def test_the_error_of_a_server_is_shown_without_orders_and_secrets():
    shown = describe_error(RuntimeError("https://me:word@host said \x1b[2J token=abc"))
    assert shown == "RuntimeError: https://***@host said \\x1b[2J token=***"


@pytest.mark.parametrize(
    "end",
    [
        "ValueError('http://me:word@host?sig=word refused \\x1b[2J')",  # with its traceback
        "KeyError('Authorization: Bearer word')",
    ],
)
def test_a_traceback_shows_no_secret_and_gives_no_orders(end):
    code = "import rlhf_recipes.options.secrets\nfrom rlhf_recipes.console import quiet_start\nquiet_start()\n"
    ended = subprocess.run(
        [sys.executable, "-c", f"{code}raise {end}"], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 1
    assert "***" in ended.stderr
    assert "word" not in ended.stderr.replace(end, "")
    assert "\x1b" not in ended.stderr


@pytest.mark.parametrize(("folder", "is_quiet"), [("recipes", True), ("mine", False)])
def test_ctrl_c_during_the_imports_of_a_recipe_shows_no_traceback(tmp_path, folder, is_quiet):
    script = tmp_path / folder / "ppo.py"
    script.parent.mkdir()
    script.write_text("from rlhf_recipes.console import quiet_start\nimport slow\nquiet_start()\n")
    (script.parent / "slow.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == -signal.SIGINT, "a shell shows 130"
    assert (ended.stderr == "") == is_quiet
