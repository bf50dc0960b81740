"""A small world of text in which the quality of an answer is known exactly: the default data of the recipes.

Sixteen animals have a home, a food, a colour, hours and a voice, drawn from a seed. A prompt asks about one of them.
An answer is a few sentences of a closed grammar: courtesies, true or false facts, facts about another animal, filler,
insults, repetitions. Every sentence is looked up in the grammar, so the gold score of any text is exact and needs no
network. A long text or one magic token does not raise it. Demonstrations have mixed quality on purpose: SFT ends in
the middle of the range, and PPO has room to improve. The reward model never sees the gold score, but only noisy
preferences that are drawn from it.

Prompts and answers hold no newline. The caller joins them with its `response_separator`.
"""

import itertools
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

SUBJECTS = (
    *("fox", "bear", "otter", "heron", "beetle", "hare", "wolf", "goat"),
    *("crow", "toad", "seal", "mole", "lynx", "moth", "deer", "crab"),
)
VALUES = {
    "home": ("forest", "desert", "river", "valley", "meadow", "swamp", "cave", "garden"),
    "food": ("berries", "grass", "fish", "insects", "nuts", "seeds", "leaves", "roots"),
    "colour": ("red", "brown", "black", "white", "grey", "green", "yellow", "blue"),
    "hours": ("at dawn", "at noon", "at dusk", "at night", "in spring", "in summer", "in autumn", "in winter"),
    "voice": ("barks", "hums", "whistles", "growls", "clicks", "sings", "squeaks", "roars"),
}
FACT_TEMPLATES = {
    "home": ("The {subject} lives in the {value}.", "You can find the {subject} in the {value}."),
    "food": ("The {subject} eats {value}.", "The {subject} likes the taste of {value}."),
    "colour": ("The {subject} is {value}.", "You can see that the {subject} is {value}."),
    "hours": ("The {subject} is awake {value}.", "The {subject} goes out {value}."),
    "voice": ("The {subject} {value}.", "You can hear that the {subject} {value}."),
}
PROMPT_TEMPLATES = (
    "What is the {attribute} of the {subject}?",
    "Tell me about the {attribute} of the {subject}.",
    "Do you know the {attribute} of the {subject}?",
    "I want to learn about the {subject} and its {attribute}.",
    "Describe the {subject} and above all its {attribute}.",
)
STOCK_SENTENCES = {
    "opening": ("Good question.", "Thank you for asking.", "I am happy to help."),
    "closing": ("I hope this helps.", "Ask me more.", "Have a good day."),
    "filler": ("There is a lot to say.", "Well, it depends.", "Some people know this."),
    "rude": ("What a stupid question.", "Go away.", "You know nothing."),
}
FLAWS = ("false", "off_topic", "filler", "rude", "repeated")
WEIGHTS = {
    "fact": 1.0,
    "asked": 1.5,
    "courtesy": 0.5,
    "filler": -0.5,
    "off_topic": -1.0,
    "false": -1.5,
    "rude": -2.0,
    "repeated": -2.0,
    "nonsense": -2.0,
    "empty": -3.0,
}
MAX_FACTS = 3
BEST_SCORE = MAX_FACTS * WEIGHTS["fact"] + WEIGHTS["asked"] + 2 * WEIGHTS["courtesy"]


class Topic(NamedTuple):
    """Hold the subject and the attribute that a prompt asks about."""

    subject: str
    attribute: str


class Fact(NamedTuple):
    """Hold the claim of a sentence, true or false."""

    topic: Topic
    value: str


@dataclass(frozen=True)
class TextWorld:
    """Hold the facts of the world, write its prompts and answers, and score answers.

    Args:
        seed: Seed of the facts. Prompts and grammar are the same in every world.
    """

    seed: int = 0
    weights: ClassVar[dict[str, float]] = WEIGHTS

    @cached_property
    def truth(self) -> dict[Topic, str]:
        """Return the true value of every attribute of every animal."""
        rng = random.Random(self.seed)
        return {Topic(subject, name): rng.choice(VALUES[name]) for subject in SUBJECTS for name in VALUES}

    @cached_property
    def topics(self) -> dict[str, Topic]:
        """Return the topic of each prompt."""
        return {
            template.format(**topic._asdict()): topic
            for topic, template in itertools.product(self.truth, PROMPT_TEMPLATES)
        }

    @cached_property
    def grammar(self) -> dict[str, Fact | str]:
        """Return every sentence of the grammar with its fact or, for a stock sentence, its kind."""
        sentences: dict[str, Fact | str] = {text: kind for kind, texts in STOCK_SENTENCES.items() for text in texts}
        for topic in self.truth:
            for value, template in itertools.product(VALUES[topic.attribute], FACT_TEMPLATES[topic.attribute]):
                sentences[template.format(subject=topic.subject, value=value)] = Fact(topic, value)
        return sentences

    def prompts(self) -> list[str]:
        """Return all distinct prompts, in a fixed order."""
        return list(self.topics)

    def question(self, prompt: str) -> str:
        """Return a prompt without its separator, the text after its first full stop or question mark.

        Raises:
            ValueError: If the prompt is not one of `prompts()`.
        """
        text = re.split(r"(?<=[.?])", prompt, maxsplit=1)[0].strip()
        if text not in self.topics:
            raise ValueError(f"{prompt!r} is not a prompt of the text world, which can score only its own prompts.")
        return text

    def topic(self, prompt: str) -> Topic:
        """Return the topic of a prompt, with or without its separator."""
        return self.topics[self.question(prompt)]

    def sample_response(self, prompt: str, rng: random.Random) -> str:
        """Return a demonstration of mixed quality: a few sentences, written with a random care.

        Care is uniform on [0, 1]. It is the probability of a courtesy, of a start with the topic of the prompt, and of
        a sentence without flaw. It differs between the answers to one prompt, so that their scores spread widely.
        """
        topic, care = self.topic(prompt), rng.random()
        attributes = rng.sample(list(VALUES), len(VALUES))
        if rng.random() < care:
            attributes.sort(key=lambda name: name != topic.attribute)
        sentences = [rng.choice(STOCK_SENTENCES["opening"])] if rng.random() < care else []
        for name in attributes[: rng.randint(2, 4)]:
            flaw = None if rng.random() < care else rng.choice(FLAWS)
            sentences.append(self._body_sentence(topic._replace(attribute=name), flaw, sentences, rng))
        if rng.random() < care:
            sentences.append(rng.choice(STOCK_SENTENCES["closing"]))
        return " ".join(sentences)

    def _body_sentence(self, topic: Topic, flaw: str | None, said: list[str], rng: random.Random) -> str:
        if flaw in STOCK_SENTENCES:
            return rng.choice(STOCK_SENTENCES[flaw])
        if flaw == "repeated" and said:
            return rng.choice(said)
        if flaw == "off_topic":
            topic = topic._replace(subject=rng.choice([name for name in SUBJECTS if name != topic.subject]))
        value = self.truth[topic]
        if flaw == "false":
            value = rng.choice([other for other in VALUES[topic.attribute] if other != value])
        return rng.choice(FACT_TEMPLATES[topic.attribute]).format(subject=topic.subject, value=value)

    def best_response(self, prompt: str) -> str:
        """Return one answer with the highest score: two courtesies, the wanted fact and two more true facts."""
        topic = self.topic(prompt)
        names = sorted(VALUES, key=lambda name: name != topic.attribute)[:MAX_FACTS]
        facts = [
            FACT_TEMPLATES[name][0].format(subject=topic.subject, value=self.truth[topic._replace(attribute=name)])
            for name in names
        ]
        return " ".join([STOCK_SENTENCES["opening"][0], *facts, STOCK_SENTENCES["closing"][0]])

    def assess(self, prompt: str, response: str) -> Counter[str]:
        """Return how often each virtue and flaw of `weights` occurs in the response.

        A sentence that is not in the grammar letter for letter is nonsense. Two wordings of a fact are the same fact.
        An opening is a courtesy only as the first sentence, and a closing only as the last. Elsewhere they are filler,
        and so is a true fact after the third.
        """
        topic, sentences = self.topic(prompt), split_sentences(response)
        counts: Counter[str] = Counter() if sentences else Counter(empty=1)
        seen: set[Fact | str] = set()
        for position, sentence in enumerate(sentences):
            meaning = self.grammar.get(sentence, "nonsense")
            key = meaning if isinstance(meaning, Fact) else sentence
            kind = self._judge(meaning, topic, is_first=position == 0, is_last=position == len(sentences) - 1)
            counts["repeated" if key in seen else kind] += 1
            seen.add(key)
        surplus = max(counts["fact"] - MAX_FACTS, 0)
        asked = Fact(topic, self.truth[topic]) in seen
        counts.update({"fact": -surplus, "filler": surplus, "asked": int(asked)})
        return counts

    def _judge(self, meaning: Fact | str, topic: Topic, *, is_first: bool, is_last: bool) -> str:
        if isinstance(meaning, Fact):
            if meaning.topic.subject != topic.subject:
                return "off_topic"
            return "fact" if self.truth[meaning.topic] == meaning.value else "false"
        in_place = {"opening": is_first, "closing": is_last}
        return ("courtesy" if in_place[meaning] else "filler") if meaning in in_place else meaning

    def gold_score(self, prompt: str, response: str) -> float:
        """Return the exact quality of a response: the weighted sum of its virtues and flaws.

        s = sum_k weights[k] * assess(prompt, response)[k]

        It is at most that of `best_response(prompt)` and has no lower bound.
        """
        return sum(self.weights[kind] * count for kind, count in self.assess(prompt, response).items())


DEFAULT_WORLD = TextWorld()


def gold_score(prompts: Sequence[str], completions: Sequence[str], **kwargs) -> list[float]:
    """Score completions in the default world, with the signature of a TRL reward function.

    Args:
        prompts: Prompts, with or without the separator.
        completions: Plain texts without special tokens.
        **kwargs: Token ids, dataset columns and the trainer state, which TRL also passes. They are ignored.
    """
    return [DEFAULT_WORLD.gold_score(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]


def split_sentences(text: str) -> list[str]:
    """Cut a text after every full stop. An unfinished sentence at the end is a piece too."""
    return [sentence for sentence, _ in ended_sentences(text)]


def ended_sentences(text: str) -> list[tuple[str, int]]:
    """Return the sentences of a text, each with the number of characters up to its end."""
    pieces = re.finditer(r"[^.]*\.|[^.]+$", text)
    return [(piece[0].strip(), piece.end()) for piece in pieces if piece[0].strip()]
