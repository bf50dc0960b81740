"""A harder world of text: reports on two animals, whose gold score needs the whole answer.

A prompt names two animals and three to five attributes, for example "Report on the fox and the crab: food, voice and
home." A right answer is a block for each animal: one true fact for each attribute, in the order of the prompt, and a
closing that counts the facts of the block. A right answer has 50 to 90 tokens.

A sentence has no value of its own. A true fact counts only in its place, so a fact that is said too early costs those
that it skips. The right number in a closing depends on the facts that were really given. One flaw anywhere loses the
bonus for a whole report. Facts, wordings and stock sentences are those of `TextWorld`. As there, every sentence is
looked up, so the gold score of any text is exact, and neither length nor a magic token raises it.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, product
from typing import ClassVar, NamedTuple

from rlhf_recipes.quickstart.world import (
    FACT_TEMPLATES,
    SUBJECTS,
    VALUES,
    Fact,
    TextWorld,
    Topic,
    ended_sentences,
    split_sentences,
)

PROMPT = "Report on the {subject} and the {partner}: {attributes} and {last}."
CLOSING = "That makes {count} about the {subject}."
COUNTS = ("one fact", "two facts", "three facts", "four facts", "five facts")
LENGTHS = (3, 4, 4, 5, 5)  # attributes in the five prompts of a topic
LEAST_CARE = 0.6
FLAWS = ("skipped", "unasked", "false", "off_topic", "filler", "rude", "repeated")
WEIGHTS = {
    "fact": 1.0,
    "count": 1.0,
    "whole": 3.0,
    "misplaced": 0.0,
    "unasked": -0.5,
    "filler": -0.5,
    "off_topic": -1.0,
    "miscount": -1.0,
    "repeated": -1.0,
    "false": -1.5,
    "rude": -1.5,
    "nonsense": -1.5,
    "empty": -3.0,
}


class Closing(NamedTuple):
    """Hold the claim of a closing: the number of facts about an animal."""

    subject: str
    number: int


@dataclass(frozen=True)
class ReportWorld(TextWorld):
    """Write prompts and answers of the harder world, and score answers.

    Args:
        seed: Seed of the facts. Prompts and grammar are the same in every world.
    """

    weights: ClassVar[dict[str, float]] = WEIGHTS

    @cached_property
    def plans(self) -> dict[str, tuple[Topic, ...]]:
        """Return the facts that each prompt asks for, in order: first those of one animal, then those of the other."""
        rng, plans = random.Random(0), {}
        for subject, first in self.truth:
            partners = rng.sample([name for name in SUBJECTS if name != subject], len(LENGTHS))
            for partner, length in zip(partners, LENGTHS, strict=True):
                names = [first, *rng.sample([name for name in VALUES if name != first], length - 1)]
                *most, last = names
                prompt = PROMPT.format(subject=subject, partner=partner, attributes=", ".join(most), last=last)
                plans[prompt] = tuple(Topic(*pair) for pair in product((subject, partner), names))
        return plans

    @cached_property
    def topics(self) -> dict[str, Topic]:
        """Return the first fact that each prompt asks for. Five prompts share it and differ in all the others."""
        return {prompt: plan[0] for prompt, plan in self.plans.items()}

    @cached_property
    def closings(self) -> dict[str, Closing]:
        """Return every closing of the grammar with its claim."""
        return {
            CLOSING.format(count=text, subject=subject): Closing(subject, number)
            for subject, (number, text) in product(SUBJECTS, enumerate(COUNTS, start=1))
        }

    def sample_response(self, prompt: str, rng: random.Random) -> str:
        """Return a demonstration of mixed quality: both blocks, written with a random care.

        Care is uniform on [`LEAST_CARE`, 1]. It is the probability of a block in order, of a sentence without flaw and
        of a right count. It differs between the answers to one prompt, so that their scores spread widely.
        """
        care, said = rng.uniform(LEAST_CARE, 1), list[str]()
        for subject, block in self._blocks(prompt):
            unasked = [Topic(subject, name) for name in VALUES if Topic(subject, name) not in block] or block
            if rng.random() > care:
                block.insert(rng.randrange(len(block) - 1), block.pop(rng.randrange(len(block))))
            for topic in block:
                flaw = None if rng.random() < care else rng.choice(FLAWS)
                if flaw != "skipped":
                    about = rng.choice(unasked) if flaw == "unasked" else topic
                    said.append(self._body_sentence(about, flaw, said, rng))
            right = self.facts_given(said, subject)
            number = right if right and rng.random() < care else rng.randint(1, len(COUNTS))
            said.append(CLOSING.format(count=COUNTS[number - 1], subject=subject))
        return " ".join(said)

    def best_response(self, prompt: str) -> str:
        """Return one answer with the highest score: every fact in its place, and both counts."""
        said = []
        for subject, block in self._blocks(prompt):
            values = [(topic.attribute, self.truth[topic]) for topic in block]
            said += [FACT_TEMPLATES[name][0].format(subject=subject, value=value) for name, value in values]
            said.append(CLOSING.format(count=COUNTS[len(block) - 1], subject=subject))
        return " ".join(said)

    def _blocks(self, prompt: str) -> list[tuple[str, list[Topic]]]:
        plan = self.plans[self.question(prompt)]
        return [(subject, list(block)) for subject, block in groupby(plan, key=lambda topic: topic.subject)]

    def facts_given(self, sentences: Sequence[str], subject: str) -> int:
        """Return how many different true facts about an animal the sentences state, asked or not."""
        said = {self.grammar.get(sentence) for sentence in sentences}
        return sum(Fact(topic, value) in said for topic, value in self.truth.items() if topic.subject == subject)

    def assess(self, prompt: str, response: str) -> Counter[str]:
        """Return how often each virtue and flaw of `weights` occurs in the response.

        A sentence that is not in the grammar letter for letter is nonsense. Two wordings of a fact are the same fact.
        A fact is in its place if no later fact of the plan was said before it and its block has no closing yet.
        The report is whole if every fact is in its place, both counts are right, and there is nothing else.
        """
        kinds = self.judge_sentences(prompt, split_sentences(response))
        return Counter(kinds or ["empty"]) + Counter(whole=int(self._is_whole(prompt, kinds)))

    def judge_sentences(self, prompt: str, sentences: Sequence[str]) -> list[str]:
        """Return the virtue or flaw of each sentence. What comes later does not change it."""
        plan, kinds = self.plans[self.question(prompt)], list[str]()
        seen: set[Fact | Closing | str] = set()
        place = 0  # in the plan; the facts before it are over
        for position, sentence in enumerate(sentences):
            meaning = self.closings.get(sentence) or self.grammar.get(sentence) or "nonsense"
            key = sentence if isinstance(meaning, str) else meaning
            if isinstance(meaning, Closing):
                given = self.facts_given(sentences[:position], meaning.subject)
                is_second = any(isinstance(other, Closing) and other.subject == meaning.subject for other in seen)
                kind, after = judge_closing(meaning, plan, place, 0 if is_second else given)
            else:
                kind, after = self._judge_sentence(meaning, plan, place)
            kinds.append("repeated" if key in seen else kind)
            place = max(place, after)
            seen.add(key)
        return kinds

    def _is_whole(self, prompt: str, kinds: Sequence[str]) -> bool:
        plan = self.plans[self.question(prompt)]
        return kinds.count("fact") == len(plan) and kinds.count("count") == 2 and len(kinds) == len(plan) + 2

    def score_sentences(self, prompt: str, response: str) -> list[tuple[int, float]]:
        """Return for each sentence where it ends and its part of the gold score. The last one has the bonus, too."""
        ended = ended_sentences(response)
        kinds = self.judge_sentences(prompt, [sentence for sentence, _ in ended])
        if not kinds:
            return [(len(response), self.weights["empty"])]
        parts = [(end, self.weights[kind]) for (_, end), kind in zip(ended, kinds, strict=True)]
        end, last = parts.pop()
        return [*parts, (end, last + self.weights["whole"] * self._is_whole(prompt, kinds))]

    def _judge_sentence(self, meaning: Fact | str, plan: Sequence[Topic], place: int) -> tuple[str, int]:
        """Return the kind of a sentence that is no closing, and the place after it."""
        if isinstance(meaning, str):
            return ("filler" if meaning in ("opening", "closing") else meaning), place
        if meaning.topic.subject not in {topic.subject for topic in plan}:
            return "off_topic", place
        if self.truth[meaning.topic] != meaning.value:
            return "false", place
        if meaning.topic not in plan:
            return "unasked", place
        index = plan.index(meaning.topic)
        return ("fact", index + 1) if index >= place else ("misplaced", place)


def judge_closing(closing: Closing, plan: Sequence[Topic], place: int, given: int) -> tuple[str, int]:
    """Return the kind of a closing, and the place after it: the end of its block.

    Args:
        closing: Claim of the closing.
        plan: Facts that the prompt asks for, in order.
        place: Place in the plan before the closing.
        given: Number of facts given about its animal, or 0 if they have been counted before.
    """
    ends = [index + 1 for index, topic in enumerate(plan) if topic.subject == closing.subject]
    if not ends:
        return "off_topic", place
    if closing.number != given:
        return "miscount", ends[-1]
    return ("count" if place <= ends[-1] else "misplaced"), ends[-1]


REPORT_WORLD = ReportWorld()


def report_score(prompts: Sequence[str], completions: Sequence[str], **kwargs) -> list[float]:
    """Score reports in the default world, with the signature of a TRL reward function.

    Args:
        prompts: Prompts, with or without the separator.
        completions: Plain texts without special tokens.
        **kwargs: Token ids, dataset columns and the trainer state, which TRL also passes. They are ignored.
    """
    return [REPORT_WORLD.gold_score(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]


def report_sentence_scores(
    prompts: Sequence[str], completions: Sequence[str], **kwargs
) -> list[list[tuple[int, float]]]:
    """Judge the sentences of reports one by one: pairs `(end, reward)`, whose sum is `report_score`.

    Args:
        prompts: Prompts, with or without the separator.
        completions: Plain texts without special tokens.
        **kwargs: What TRL also passes. It is ignored.
    """
    return [REPORT_WORLD.score_sentences(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
