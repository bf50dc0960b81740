"""Write the questions to a judge, and read the verdicts in its answers."""

import hashlib
import json
import re
from collections.abc import Sequence
from itertools import count
from string import Template
from typing import Any

from rlhf_recipes.data.messages import Text, as_text
from rlhf_recipes.options.judge import JudgeConfig

TAG = re.compile(r"\[\[([^\[\]]{1,40})\]\]")
POINTS = re.compile(r"(\d{1,2}(?:\.\d{1,4})?)(?:\s*/\s*10)?")
SMALLEST, LARGEST = 1.0, 10.0
# Probability that the first answer is better, by the verdict.
PREFERENCES = {"A": 1.0, "B": 0.0, "C": 0.5, "TIE": 0.5}
THOUGHT, END_OF_THOUGHT = "<think>", "</think>"
READ_CHARACTERS, TRIED_BRACES = 20_000, 100  # from the end: a verdict stands there
TITLES = {"prompt": "request", "answer": "answer", "answer_a": "answer A", "answer_b": "answer B"}
_DECODER = json.JSONDecoder()


def question_about(config: JudgeConfig, prompt: Text, *answers: Text) -> str:
    """Return the question to a judge about one answer, or about two in this order.

    Each text stands between marks with a code that occurs in none of the texts. So no text can end its own part.

    Args:
        config: Description of the judge.
        prompt: Text or messages.
        answers: One or two answers, in the form of the prompt.
    """
    texts = dict(zip(("prompt", *config.answers), map(as_text, (prompt, *answers)), strict=True))
    code = _code(list(texts.values()))
    parts = {name: _marked(TITLES[name], text, code) for name, text in texts.items()}
    return Template(config.question).substitute(parts, rubric=config.rubric.strip(), verdict=_how_to_end(config))


def _marked(title: str, text: str, code: str) -> str:
    return f"<{title} {code}>\n{text}\n</{title} {code}>"


def _code(texts: Sequence[str]) -> str:
    """Return a code that occurs in no text. The same texts give the same code, so that a cache knows the question."""
    together = "\0".join(texts).encode("utf-8", "surrogatepass")
    codes = (hashlib.sha256(b"%d %s" % (attempt, together)).hexdigest()[:8] for attempt in count())
    return next(code for code in codes if not any(code in text for text in texts))


def _how_to_end(config: JudgeConfig) -> str:
    before = "Give your reasons in at most three sentences. "
    if config.mode == "scores":
        ends = "with the points in double brackets, for example [[7]]."
        field = f'with one line of JSON, for example {{"{config.verdict_field}": 7}}.'
    else:
        ends = "with [[A]] if answer A is better, with [[B]] if answer B is better, or with [[C]] if both are as good."
        field = (
            f'with one line of JSON: {{"{config.verdict_field}": "A"}} if answer A is better. Write "B" in it if '
            'answer B is better, or "C" if both are as good.'
        )
    return f"{before}Then end {ends if config.verdict_field is None else field}"


def preference_in(text: str, field: str | None) -> float | None:
    """Return the probability that the first answer is better, by a verdict: 1, 0 or 0.5; `None` without a verdict."""
    return PREFERENCES.get(str(_verdict(text, field)).strip().upper())


def points_in(text: str, field: str | None) -> float | None:
    """Return the points of a verdict, from 1 to 10; `None` without such a verdict."""
    found = POINTS.fullmatch(str(_verdict(text, field)).strip())
    points = None if found is None else float(found[1])
    return points if points is not None and SMALLEST <= points <= LARGEST else None


def _verdict(text: str, field: str | None) -> Any:
    """Return the last verdict behind the thoughts of a reasoning model; `None` if there is none."""
    text = text.rpartition(END_OF_THOUGHT)[2][-READ_CHARACTERS:]
    if THOUGHT in text:  # it has not ended
        return None
    if field is not None:
        return _last_field(text, field)
    tags = TAG.findall(text)
    return tags[-1] if tags else None


def _last_field(text: str, field: str) -> Any:
    """Return the field of the last JSON object that has it."""
    braces = [found.start() for found in re.finditer(r"\{", text)]
    for start in reversed(braces[-TRIED_BRACES:]):
        try:
            value, _ = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        if field in value:
            return value[field]
    return None
