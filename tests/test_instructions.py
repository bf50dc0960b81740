"""The checked instructions of `benchmarks/instructions.py`: each can be followed, and tricks do not score."""

import random
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from instructions import KINDS, NO_TEXT, NUMBERS, add_instructions, instruction_score, instructions_of  # noqa: E402

QUESTION = "What should I do with a rainy day?"


def score(prompt, answer):
    chat = ([{"role": role, "content": text}] for role, text in (("user", prompt), ("assistant", answer)))
    return instruction_score([next(chat)], [next(chat)])[0]


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        ('Use the word "river".', "We walk by a River today.", "We walk by rivers every day."),
        ('Do not use the word "the".', "Their other boats sail away.", "We like THE blue boats."),
        ('Do not use the letter "b".', "We like calm days.", "We like calm days. Bake!"),
        ("Use at most 8 words.", "One two three four five six seven eight.", "a b c d e f g h i"),
        ("Use at least 20 words.", "a b c d e f g h i j k l m n o p q r s t", "a b c d e f g h i j k l m n o p q r s"),
        ("Write exactly two sentences.", "Read books. Then sleep 2.5 hours!", "Read. Bake. Then sleep well."),
        ("Answer as a list.", "Ideas:\n1. Read a book\n2. Bake bread", "1. Read some books. 2. Bake bread"),
        ("Answer as a list.", "- Read a book\n\n* Bake bread", "- Read a book -\nBake bread"),
        ('Begin with the word "Sure".', "Sure, read some books.", "Surely you should read, sure."),
        ("End with a question mark.", "Why not read some books? ", "Why not? Read some books."),
        ("End with an exclamation mark.", "Why not? Read some books!", "Read! Some other books!?"),
        ("Use a number.", "Read some 12 good books.", "Read some twelve good books."),
        ("Use no commas.", "Read some books; bake bread.", "Read some books, bake bread."),
    ],
)
def test_an_instruction_is_checked(rule, good, bad):
    prompt = f"{QUESTION}\n\n{rule}"
    assert len(instructions_of(prompt)) == 1
    assert score(prompt, good) == 1
    assert score(prompt, bad) == 0


def test_every_instruction_is_found_again_with_its_value():
    for kind in KINDS:
        for value in kind.values:
            assert instructions_of(f"{QUESTION}\n\n{kind.text.format(value)}") == [(kind, value)]


def follow(prompt):
    """Return a text that follows the instructions of a prompt."""
    rules = {kind.text.split("{")[0]: value for kind, value in instructions_of(prompt)}
    first, inner = rules.get('Begin with the word "', "Soon"), rules.get('Use the word "', "music")
    count = NUMBERS[rules.get("Write exactly ", "one").split()[0]]
    number = "7" if "Use a number." in rules else ""
    if "Answer as a list." in rules:
        text = f"- read {inner}\n- sail {number} calm seas"
    else:
        more = "acdefhijklmnopqrstuvxy" if "Use at least " in rules else ""
        parts = [" ".join(filter(None, [first, inner, *more, number])), "Read", "Sleep"][:count]
        text = ". ".join(parts) + " calm seas"
    ends = {"End with a question mark.": "?", "End with an exclamation mark.": "!"}
    return text + next((sign for rule, sign in ends.items() if rule in rules), ".")


def test_the_instructions_of_one_prompt_can_be_followed_together():
    rng, kinds = random.Random(0), set()
    for _ in range(2_000):
        prompt = add_instructions(QUESTION, rng)
        found = instructions_of(prompt)
        kinds |= {(kind, len(found)) for kind, _ in found}
        assert score(prompt, follow(prompt)) == 1, (prompt, follow(prompt))
    assert kinds == {(kind, count) for kind in KINDS for count in (1, 2, 3)}


def test_the_seed_chooses_the_instructions():
    first, again, other = (
        [add_instructions(QUESTION, rng) for _ in range(9)] for rng in map(random.Random, (0, 0, 1))
    )
    assert first == again != other


def test_half_of_the_instructions_count_half():
    prompt = f"{QUESTION}\n\nUse no commas. End with a question mark."
    assert score(prompt, "Why not read some books, or newspapers?") == 0.5


@pytest.mark.parametrize(
    "trick",
    [
        "",
        "- - - -",
        "ok",
        "no no no no no no no no",
        "we read we read we read we read",
        "What should I do with a rainy day",
        "Use at most 12 words. Use no commas.",
        "abcdefghijklmnopqrstuvwxyz is a long word",
        "a ++ b ++ c ++ d ++ 1234 5678 9012",
    ],
)
def test_a_trick_that_follows_the_instructions_has_less_than_a_text_that_follows_none(trick):
    prompt = f"{QUESTION}\n\nUse no commas. Use at most 12 words."
    assert all(kind.follows(trick, value) for kind, value in instructions_of(prompt))
    assert score(prompt, trick) == NO_TEXT
    assert score(prompt, "Read some books, or bake bread, or sail the calm seas of the north.") == 0
