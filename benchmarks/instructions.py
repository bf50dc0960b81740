"""Instructions that a program can check, and the score of an answer that should follow them.

The score is the share of the instructions that an answer follows. An answer that is no real text has `NO_TEXT`, less
than an answer that follows none: else the best answers to many instructions would be one word, or the question again.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_recipes.data.messages import as_text

NO_TEXT = -0.25
MIN_WORDS = 4  # so few fit into every limit of the instructions
NUMBERS = {"one": 1, "two": 2, "three": 3}


def words(text: str) -> list[str]:
    """Return the words of a text in small letters, without punctuation."""
    return re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)*", text.lower())


def sentences(text: str) -> int:
    """Return the number of sentences that have a word. The last one needs no full stop."""
    return sum(bool(words(part)) for part in re.split(r"[.!?]+[\"”']?(?:\s|$)|\n", text))


def points(text: str) -> int:
    """Return the number of lines that are points of a list."""
    return sum(re.match(r" *([-*•]|\d+[.)]) *\S", line) is not None for line in text.splitlines())


@dataclass(frozen=True)
class Kind:
    """A kind of instruction.

    Args:
        text: Instruction, with `{}` for its value.
        values: Values of the instruction.
        follows: Function of an answer and a value that returns whether the answer follows the instruction.
        parts: Parts of an answer that the instruction speaks of. Two instructions to one prompt share none.
    """

    text: str
    values: tuple[str, ...]
    follows: Callable[[str, str], bool]
    parts: frozenset[str]

    def find(self, rules: str) -> str | None:
        """Return the value of this instruction among others; `None` if it is not there."""
        pattern = re.escape(self.text).replace(r"\{\}", f"({'|'.join(map(re.escape, self.values))})")
        found = re.search(pattern, rules)
        return None if found is None else (*found.groups(), "")[0]


def _kind(parts: str, text: str, values: Sequence[str], follows: Callable[[str, str], bool]) -> Kind:
    return Kind(text, tuple(values), follows, frozenset(parts.split()))


# A small chat model follows each of them now and then, so that its answers differ in score.
KINDS = (
    _kind("word", 'Use the word "{}".', ("music", "river", "summer", "ocean", "coffee"), lambda a, v: v in words(a)),
    _kind("other", 'Do not use the word "{}".', ("the", "you", "and", "to"), lambda a, v: v not in words(a)),
    _kind("letter", 'Do not use the letter "{}".', ("b", "w", "g"), lambda a, v: v not in a.lower()),
    _kind("length", "Use at most {} words.", ("8", "12", "16"), lambda a, v: len(words(a)) <= int(v)),
    _kind("length", "Use at least {} words.", ("20", "24"), lambda a, v: len(words(a)) >= int(v)),
    _kind(
        "form",
        "Write exactly {}.",
        ("one sentence", "two sentences", "three sentences"),
        lambda a, v: sentences(a) == NUMBERS[v.split()[0]],
    ),
    _kind("form start length", "Answer as a list.", ("",), lambda a, v: points(a) >= 2),
    _kind(
        "start",
        'Begin with the word "{}".',
        ("Sure", "Perhaps", "Today"),
        lambda a, v: words(a)[:1] == [v.lower()],
    ),
    _kind("end", "End with a question mark.", ("",), lambda a, v: a.rstrip().endswith("?")),
    _kind("end", "End with an exclamation mark.", ("",), lambda a, v: a.rstrip().endswith("!")),
    _kind("number", "Use a number.", ("",), lambda a, v: re.search(r"\d", a) is not None),
    _kind("comma", "Use no commas.", ("",), lambda a, v: "," not in a),
)


def add_instructions(question: str, rng: random.Random) -> str:
    """Return a question with one to three instructions that one answer can follow together."""
    wanted, taken, rules = rng.randint(1, 3), set[str](), list[str]()
    for kind in rng.sample(KINDS, len(KINDS)):
        if len(rules) < wanted and not kind.parts & taken:
            taken |= kind.parts
            rules.append(kind.text.format(rng.choice(kind.values)))
    return f"{question}\n\n{' '.join(rules)}"


def instructions_of(prompt: str) -> list[tuple[Kind, str]]:
    """Return the instructions of a prompt that `add_instructions` wrote, each with its value."""
    rules = prompt.rpartition("\n\n")[2]
    found = [(kind, kind.find(rules)) for kind in KINDS]
    return [(kind, value) for kind, value in found if value is not None]


def is_text(prompt: str, answer: str) -> bool:
    """Return whether an answer is a text of its own: some words, few of them again, and not the prompt's."""
    found, asked = words(answer), words(prompt)
    if len(found) < MIN_WORDS or max(map(len, found)) > 20:
        return False
    of_words = sum(map(len, found)) / len("".join(answer.split()))
    runs = _runs(found)
    copied = len(runs & _runs(asked)) / len(runs)
    return of_words >= 0.7 and len(set(found)) >= 0.6 * len(found) and copied <= 0.5


def _runs(found: list[str]) -> set[tuple[str, ...]]:
    return set(zip(found, found[1:], found[2:], strict=False))


def instruction_score(prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> list[float]:
    """Return the gold score of each completion, in [-0.25, 1].

    Args:
        prompts: Chats whose last message `add_instructions` wrote.
        completions: Answers, as text or as messages.
        kwargs: Other arguments of a TRL reward function.
    """
    pairs = zip(prompts, completions, strict=True)
    return [_score(prompt[-1]["content"], as_text(completion)) for prompt, completion in pairs]


def _score(prompt: str, answer: str) -> float:
    if not is_text(prompt, answer):
        return NO_TEXT
    followed = [kind.follows(answer, value) for kind, value in instructions_of(prompt)]
    return sum(followed) / len(followed)
