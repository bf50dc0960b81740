"""Make preference pairs of several answers to each prompt: choose, clean, divide into splits, and write.

The format is TRL's: `prompt`, `chosen`, `rejected`, as JSON lines, and `margin` if earlier pairs have one.
"""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any, Literal, NamedTuple

from rlhf_recipes.data.messages import Text, as_text

TEST_SHARE = 0.1  # of the prompts that no earlier pair has
COLUMNS = ("prompt", "chosen", "rejected")
Rows = list[dict[str, Any]]


class Pair(NamedTuple):
    """Two answers by their numbers, the first of which a person sees first."""

    first: int
    second: int


def pairs_at_random(
    prompts: int, samples: int, how: Literal["disjoint", "all"], seed: int, texts: Sequence[str]
) -> tuple[list[Pair], Counter[str]]:
    """Return pairs of answers to the same prompt in a random order, and count those that nobody could label.

    `disjoint` lets every answer occur once: the pairs of a prompt are then independent, and each comparison of a judge
    or a person is used. `all` gives `samples (samples - 1) / 2` pairs, which repeat what few answers say. The best and
    the worst answer alone, by a learned score, would be the two about which this score errs most.

    Args:
        prompts: Number of prompts.
        samples: Answers to each prompt. Those of prompt i have the numbers from `i * samples` on.
        how: Rule.
        seed: Seed of the choice and of the order in a pair.
        texts: Text of each answer.
    """
    rng, kept, left_out = random.Random(seed), [], Counter({"duplicates": 0, "empty": 0})
    for prompt in range(prompts):
        numbers = list(range(prompt * samples, (prompt + 1) * samples))
        rng.shuffle(numbers)
        chosen = combinations(numbers, 2) if how == "all" else zip(numbers[::2], numbers[1::2], strict=True)
        for pair in chosen:
            if reason := why_useless(*(texts[number] for number in pair)):
                left_out[reason] += 1
            else:
                kept.append(Pair(*pair))
    return kept, left_out


def best_and_worst(scores: Sequence[float], samples: int, texts: Sequence[str]) -> tuple[list[Pair], Counter[str]]:
    """Return the answer with the highest and the one with the lowest score of each prompt, and count useless pairs.

    An answer without a score (NaN) is in no pair. Of equal scores, the first answer counts.

    Args:
        scores: Score of each answer; see `pairs_at_random` for their order.
        samples: Answers to each prompt.
        texts: Text of each answer.
    """
    kept, left_out = [], Counter({"duplicates": 0, "empty": 0, "unlabelled": 0})
    for start in range(0, len(scores), samples):
        scored = [number for number in range(start, start + samples) if scores[number] == scores[number]]
        if len(scored) < 2:
            left_out["unlabelled"] += 1
            continue
        pair = Pair(max(scored, key=scores.__getitem__), min(scored, key=scores.__getitem__))
        if pair.first == pair.second:  # all are equal: another one is the partner, and the pair a tie
            pair = Pair(scored[0], scored[1])
        if reason := why_useless(*(texts[number] for number in pair)):
            left_out[reason] += 1
        else:
            kept.append(pair)
    return kept, left_out


def why_useless(one: str, other: str) -> str:
    """Return why two answers make no pair: `empty` or `duplicates`; an empty text if they do."""
    if not (one.strip() and other.strip()):
        return "empty"
    return "duplicates" if one.strip() == other.strip() else ""


def divide(earlier: Iterable[tuple[Rows, Rows]], new: Rows) -> tuple[Rows, Rows, Counter[str]]:
    """Return the pairs to train on, those to evaluate on, and counts. No prompt is in both.

    A prompt that an earlier set trains on stays in training, and its pairs to evaluate on move there. One that earlier
    sets only evaluate on stays there. Of a new prompt, a hash decides: another run with other prompts decides in the
    same way. A pair that was there before is left out.

    Args:
        earlier: Pairs of each earlier set: those to train on, and those to evaluate on.
        new: New pairs.

    Raises:
        ValueError: If all pairs are about one prompt.
    """
    sets = [*earlier]
    places = {key_of(row["prompt"]): "test" for _, test in sets for row in test}
    places |= {key_of(row["prompt"]): "train" for train, _ in sets for row in train}
    unknown = sorted({key_of(row["prompt"]) for row in new} - places.keys(), key=_hash)
    places |= {key: "test" if _hash(key) < TEST_SHARE else "train" for key in unknown}
    for place, nearest in (("test", unknown[:1]), ("train", unknown[-1:])):
        if place not in places.values():  # there are few prompts
            places |= dict.fromkeys(nearest, place)
    if len({*places.values()}) < 2:
        raise ValueError(
            f"All pairs are about {len(places)} prompt: the data need one to train on and one to evaluate on. Give "
            "more prompts, or more answers per prompt (`num_samples`)."
        )
    moved = sum(places[key_of(row["prompt"])] == "train" for _, test in sets for row in test)
    counts, known = Counter(moved=moved, repeated=0), set()
    splits: dict[str, Rows] = {"train": [], "test": []}
    old = [row for each in sets for rows in each for row in rows]
    for kind, rows in (("earlier", old), ("new", new)):
        for row in rows:
            whole = json.dumps([row[name] for name in COLUMNS], sort_keys=True)
            counts["repeated" if whole in known else kind] += 1
            if whole not in known:
                splits[places[key_of(row["prompt"])]].append(row)
            known.add(whole)
    if any("margin" in row for row in (*old, *new)):  # files with other columns cannot be read together
        splits = {split: [{"margin": 0.0} | row for row in rows] for split, rows in splits.items()}
    return splits["train"], splits["test"], counts


def key_of(prompt: Text) -> str:
    """Return a text that two rows with the same prompt share, with or without a separator behind it."""
    if isinstance(prompt, str):
        return prompt.rstrip()
    return json.dumps([{name: m.get(name) for name in ("role", "content")} for m in prompt], sort_keys=True)


def _hash(key: str) -> float:
    """Return a number in [0, 1) that is the same in every process."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def longer_chosen(rows: Rows) -> float:
    """Return the share of pairs whose chosen answer has more characters, of those whose lengths differ; else 0.5."""
    lengths = [(len(as_text(row["chosen"])), len(as_text(row["rejected"]))) for row in rows]
    differing = [chosen > rejected for chosen, rejected in lengths if chosen != rejected]
    return sum(differing) / len(differing) if differing else 0.5


def json_lines(rows: Rows) -> str:
    """Return rows as the text of a file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
