"""Split dialogues that are one text, whose turns begin with "Human:" and "Assistant:", as in HH-RLHF.

The answer begins after the last "Assistant:". `trl.extract_prompt` cuts where two answers differ first, which is often
inside a sentence.
"""

import re
from os.path import commonprefix
from typing import Any

USER, ASSISTANT = (re.compile(rf"(?:^|\n|### ?)(?:{names}):") for names in ("Human|User", "Assistant|AI|Bot"))
ANSWERS = ("chosen", "rejected", "completion")


def split_transcript(row: dict[str, Any]) -> dict[str, str]:
    """Return a row's `prompt`, up to the last "Assistant:" that its answers share, and the answers after it.

    Use it by `dataset.map(split_transcript)`. A `prompt` that the answers do not hold is written before them first.

    Args:
        row: `chosen` and `rejected`, or `completion`: text that holds the dialogue.

    Raises:
        ValueError: If the texts share no "Assistant:".
    """
    prompt = row.get("prompt") or ""
    whole = {name: prompt + row[name].removeprefix(prompt) for name in ANSWERS if name in row}
    shared = commonprefix([text[: _end(text)] for text in whole.values()])
    if (end := _end(shared)) == 0:
        begins = next(iter(whole.values()))[:80]
        raise ValueError(f"No 'Assistant:' begins a turn in all of {', '.join(whole)}, which begin with {begins!r}.")
    return {"prompt": shared[:end]} | {name: text[end:] for name, text in whole.items()}


def _end(text: str) -> int:
    """Return the place after the last "Assistant:"; 0 if there is none."""
    return max((turn.end() for turn in ASSISTANT.finditer(text)), default=0)


def begun_answer(prompt: str) -> str:
    """Return the part of the answer that the prompt of a transcript holds; "" if it ends where it should.

    A transcript begins with a turn of the user. Text before it, or in further lines after the last turn, can be a
    question about the dialogue.
    """
    end = _end(prompt)
    rest = prompt[end:]
    is_begun = end and USER.match(prompt.lstrip()) and not USER.search(rest) and "\n" not in rest.strip()
    return rest if is_begun and rest.strip() else ""


def is_cut_inside(prompt: Any, answers: list[Any]) -> bool:
    """Return whether the boundary of a transcript is inside a sentence or before other turns, so it must move back."""
    if not isinstance(prompt, str) or not all(isinstance(answer, str) for answer in answers):
        return False
    if begun_answer(prompt):
        return True
    end = _end(prompt)
    begins = USER.match(prompt.lstrip()) is not None
    return begins and end > 0 and USER.search(prompt[end:]) is not None and all(map(ASSISTANT.search, answers))
