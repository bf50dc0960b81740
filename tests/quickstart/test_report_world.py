"""The report world: prompts, demonstrations and a gold score that needs the whole answer."""

import random
import re
import statistics
from collections import Counter
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from strategies import seeds

from rlhf_recipes.quickstart import build, report_world, world
from rlhf_recipes.quickstart.report_world import REPORT_WORLD, WEIGHTS
from rlhf_recipes.quickstart.worlds import WORLDS

PROMPTS = REPORT_WORLD.prompts()
TRAIN, HELD_OUT = build.split_prompts(REPORT_WORLD, seed=0)
SEPARATOR = "\n"
CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"

# One prompt of the world, and its true facts: cave, roars, red and in spring; swamp, growls, green and at noon.
PROMPT = "Report on the fox and the goat: home, voice, colour and hours."
FOX = ["The fox lives in the cave.", "The fox roars.", "The fox is red.", "The fox is awake in spring."]
GOAT = ["The goat lives in the swamp.", "The goat growls.", "The goat is green.", "The goat is awake at noon."]
FOX_END, GOAT_END = "That makes four facts about the fox.", "That makes four facts about the goat."
ONE_FOX, THREE_FOX = "That makes one fact about the fox.", "That makes three facts about the fox."
WHOLE = [*FOX, FOX_END, *GOAT, GOAT_END]
EVERY_SENTENCE = [*REPORT_WORLD.grammar, *REPORT_WORLD.closings]


def demonstrations(n=2000, seed=0):
    rows = build.build_dataset(REPORT_WORLD, TRAIN, n, seed)
    return list(zip(rows["prompt"], rows["completion"], strict=True))


DEMONSTRATIONS = demonstrations()
GOLD = [REPORT_WORLD.gold_score(prompt, answer) for prompt, answer in DEMONSTRATIONS]


@pytest.fixture(scope="module")
def tokenizer():
    return build.train_tokenizer(SEPARATOR.join(pair) for pair in DEMONSTRATIONS)


def score(sentences):
    return REPORT_WORLD.gold_score(PROMPT, " ".join(sentences))


def without(sentences, *dropped):
    return [sentence for sentence in sentences if sentence not in dropped]


@pytest.mark.parametrize(
    ("sentences", "expected"),
    [
        (WHOLE, 13.0),  # eight facts, two counts, and the bonus
        (["You can find the fox in the cave.", *WHOLE[1:]], 13.0),  # in its other wording
        (FOX, 4.0),
        ([*FOX, FOX_END], 5.0),
        ([*FOX, *GOAT], 8.0),
        (without(WHOLE, FOX_END), 9.0),
        (without(WHOLE, GOAT[-1]), 7.0),  # the number in the closing is wrong too
        ([FOX[1], FOX[0], *FOX[2:], FOX_END, *GOAT, GOAT_END], 9.0),  # one fact too late
        ([FOX[3], *FOX[:3], FOX_END, *GOAT, GOAT_END], 7.0),  # a fact too early costs all that it skips
        ([*GOAT, GOAT_END, *FOX, FOX_END], 5.0),  # the blocks too
        ([GOAT[0], *FOX, FOX_END], 1.0),
        ([*WHOLE, GOAT[0]], 9.0),  # repeated, and no bonus
        ([*FOX, "You can hear that the fox roars."], 3.0),  # one fact in two wordings
        ([*FOX, FOX_END, FOX_END], 4.0),
        ([*FOX, THREE_FOX], 3.0),
        ([*FOX, THREE_FOX, FOX_END], 2.0),  # the first number counts
        ([*FOX[:3], THREE_FOX, FOX[3]], 4.0),  # the block is over
        ([*FOX[:3], ONE_FOX, FOX[3]], 2.0),  # after a wrong number too
        ([*FOX[:3], THREE_FOX, FOX[3], FOX_END], 3.0),  # no second closing
        ([*FOX[:3], "The fox eats leaves.", FOX_END], 3.5),  # true and unasked, but given
        ([*FOX[:3], "The fox is awake at dawn.", THREE_FOX], 2.5),  # false facts are not given
        ([*FOX[:3], "The fox is awake at dawn.", FOX_END], 0.5),
        ([ONE_FOX], -1.0),
        ([FOX[0], ONE_FOX], 2.0),
        ([GOAT[0], FOX[0], ONE_FOX], 1.0),  # right, but after the goat has begun
        (["The otter goes out at noon."], -1.0),
        (["That makes one fact about the otter."], -1.0),
        (["Good question."], -0.5),  # no courtesy is asked for
        (["I hope this helps."], -0.5),
        (["Well, it depends."], -0.5),
        (["Go away."], -1.5),
        (["The fox cave the leaves."], -1.5),
        (["The fox lives in the cave"], -1.5),  # cut off by the length limit
        (["That makes six facts about the fox."], -1.5),
        ([*WHOLE, "The fox"], 8.5),
        ([], -3.0),
    ],
)
def test_gold_score_by_hand(sentences, expected):
    assert score(sentences) == expected


def test_the_hand_scores_use_every_weight():
    said = [WHOLE, [FOX[1], FOX[0]], [*FOX, THREE_FOX, FOX_END, FOX_END], ["The fox is blue.", "Go away.", "Hm."], []]
    said += [["The fox eats leaves.", "Well, it depends.", "The otter goes out at noon."]]
    kinds = sum((REPORT_WORLD.assess(PROMPT, " ".join(sentences)) for sentences in said), Counter())
    assert kinds.keys() == WEIGHTS.keys()


def test_the_same_ending_is_worth_more_or_less_by_what_was_said_before():
    """The value of a sentence is not its own."""
    ending = [*GOAT, GOAT_END]
    gains = [score([*start, *ending]) - score(start) for start in ([*FOX, FOX_END], [*FOX, THREE_FOX], [*GOAT])]
    assert gains == [8.0, 5.0, -3.0]


def test_the_same_prefix_can_end_in_very_different_scores():
    half = [*FOX, FOX_END]
    endings = [[*GOAT, GOAT_END], [], ["Go away.", "The goat is blue.", "That makes one fact about the goat."]]
    assert [score([*half, *ending]) for ending in endings] == [13.0, 5.0, 1.0]


@pytest.mark.parametrize("index", range(len(WHOLE)))
def test_every_sentence_of_a_whole_report_is_needed(index):
    assert score([*WHOLE[:index], *WHOLE[index + 1 :]]) <= 9.0
    assert score([*WHOLE[:index], "Well, it depends.", *WHOLE[index + 1 :]]) <= 8.5


@given(seeds)
def test_nothing_beats_the_best_answer(seed):
    """Shorten and extend the best answer with sentences about its animals."""
    rng = random.Random(seed)
    prompt = rng.choice(PROMPTS)
    answer = world.split_sentences(REPORT_WORLD.best_response(prompt))
    best = REPORT_WORLD.gold_score(prompt, " ".join(answer))
    animals = "|".join({topic.subject for topic in REPORT_WORLD.plans[prompt]})
    useful = [sentence for sentence in EVERY_SENTENCE if re.search(f" ({animals})", sentence)]
    assert best == len(REPORT_WORLD.plans[prompt]) + 2 + WEIGHTS["whole"]
    for _ in range(20):
        changed = [sentence for sentence in answer if rng.random() < 0.9]
        for sentence in rng.sample(useful, rng.randint(0, 3)):
            changed.insert(rng.randint(0, len(changed)), sentence)
        assert REPORT_WORLD.gold_score(prompt, " ".join(changed)) <= best


@given(seeds)
def test_appending_to_a_closed_answer_never_helps(seed):
    """Every demonstration closes both blocks, so nothing that follows has a place."""
    rng = random.Random(seed)
    prompt = rng.choice(PROMPTS)
    answer = REPORT_WORLD.sample_response(prompt, rng)
    last = REPORT_WORLD.gold_score(prompt, answer)
    for sentence in rng.sample(EVERY_SENTENCE, 20):
        answer = f"{answer} {sentence}"
        before, last = last, REPORT_WORLD.gold_score(prompt, answer)
        assert last <= before


@pytest.mark.parametrize("text", [FOX[0], FOX_END, " ".join(WHOLE), "Go away."])
@pytest.mark.parametrize("times", [2, 5, 40])
def test_repetition_never_helps(text, times):
    assert score([text] * times) < score([text])


def test_saying_everything_scores_low():
    assert score(EVERY_SENTENCE) < WEIGHTS["empty"]


@given(seeds)
def test_only_asked_facts_and_true_counts_have_value(seed):
    sentence, prompt = random.Random(seed).choice(EVERY_SENTENCE), random.Random(seed).choice(PROMPTS)
    meaning = REPORT_WORLD.grammar.get(sentence)
    is_asked = getattr(meaning, "topic", None) in REPORT_WORLD.plans[prompt]
    is_true = is_asked and REPORT_WORLD.truth[meaning.topic] == meaning.value
    assert (REPORT_WORLD.gold_score(prompt, sentence) > 0) is is_true


def test_every_demonstration_is_grammatical():
    for prompt, answer in DEMONSTRATIONS:
        assert all(sentence in EVERY_SENTENCE for sentence in world.split_sentences(answer))
        assert {"nonsense", "empty"}.isdisjoint(REPORT_WORLD.assess(prompt, answer))


def test_demonstrations_show_every_virtue_and_flaw():
    seen = sum((REPORT_WORLD.assess(*pair) for pair in DEMONSTRATIONS), Counter())
    assert set(seen) == set(WEIGHTS) - {"nonsense", "empty"}
    assert min(seen.values()) > len(DEMONSTRATIONS) / 10


def test_demonstrations_leave_room_above_and_below():
    best = [REPORT_WORLD.gold_score(prompt, REPORT_WORLD.best_response(prompt)) for prompt in PROMPTS]
    assert 0.2 < statistics.mean(GOLD) / statistics.mean(best) < 0.6
    assert max(GOLD) == max(best) == 15


def test_answers_to_one_prompt_differ_widely_in_quality():
    rng = random.Random(0)
    scores = [REPORT_WORLD.gold_score(PROMPT, REPORT_WORLD.sample_response(PROMPT, rng)) for _ in range(200)]
    assert statistics.stdev(scores) > 4


def test_answers_fit_the_completion_length(tokenizer):
    lengths = [len(tokenizer(answer)["input_ids"]) + 1 for _, answer in DEMONSTRATIONS]
    assert max(lengths) <= WORLDS["report"].max_completion_length
    assert 60 <= statistics.mean(lengths) <= 80


def test_prompts_are_disjoint_and_cover_every_topic():
    assert (len(TRAIN), len(HELD_OUT)) == (320, 80)
    assert sorted(TRAIN + HELD_OUT) == sorted(set(PROMPTS))
    assert {REPORT_WORLD.topic(prompt) for prompt in TRAIN} == set(REPORT_WORLD.truth)
    assert not {REPORT_WORLD.plans[prompt] for prompt in TRAIN} & {REPORT_WORLD.plans[prompt] for prompt in HELD_OUT}


def test_a_prompt_names_its_plan():
    names = "home", "voice", "colour", "hours"
    assert REPORT_WORLD.plans[PROMPT] == tuple(
        world.Topic(animal, name) for animal in ("fox", "goat") for name in names
    )
    assert Counter(len(plan) for plan in REPORT_WORLD.plans.values()) == {6: 80, 8: 160, 10: 160}


def test_the_seed_changes_facts_and_no_prompts():
    other = report_world.ReportWorld(seed=1)
    assert other.prompts() == PROMPTS
    assert other.truth != REPORT_WORLD.truth == world.DEFAULT_WORLD.truth


def test_demonstrations_are_fixed_by_their_seed():
    assert demonstrations(50, seed=1) == demonstrations(50, seed=1)
    assert demonstrations(50, seed=1) != demonstrations(50, seed=2)


def test_report_score_has_the_signature_of_a_reward_function():
    answers = [" ".join(WHOLE), FOX[0]]
    scores = report_world.report_score(
        prompts=[PROMPT, PROMPT + SEPARATOR], completions=answers, completion_ids=[[1], [2]]
    )
    assert scores == [13.0, 1.0]
    assert all(type(value) is float for value in scores)


@pytest.mark.parametrize("prompt", ["", "What is the home of the fox?", PROMPT.rstrip(".")])
def test_foreign_prompts_are_refused(prompt):
    with pytest.raises(ValueError, match="not a prompt of the text world"):
        REPORT_WORLD.gold_score(prompt, FOX[0])


def test_tokenizer_round_trip_and_boundary(tokenizer):
    for prompt, answer in DEMONSTRATIONS[:200]:
        question, reply, both = (
            tokenizer(text)["input_ids"] for text in (prompt + SEPARATOR, answer, prompt + SEPARATOR + answer)
        )
        assert question + reply == both
        assert tokenizer.decode(both, skip_special_tokens=True) == prompt + SEPARATOR + answer
    assert all(len(tokenizer(" " + word)["input_ids"]) == 1 for word in (*world.SUBJECTS, "facts", "three", "makes"))


def test_a_world_is_written_from_its_own_text(tmp_path):
    build.write_world(REPORT_WORLD, tmp_path, 0, SEPARATOR, num_demonstrations=50)
    assert len((tmp_path / "data" / "train.jsonl").read_text().splitlines()) == 50
    assert len((tmp_path / "prompts" / "test.jsonl").read_text().splitlines()) == 80
    assert "Report on the" in (tmp_path / "data" / "train.jsonl").read_text().splitlines()[0]


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("stage", ["ppo", "evaluate"])
def test_the_configurations_fit_their_world(name, stage):
    options = yaml.safe_load((CONFIGS / name / f"{stage}.yaml").read_text())
    gold = WORLDS[name].gold_score
    assert options["max_completion_length"] == WORLDS[name].max_completion_length
    assert options["judge_functions"] == [f"{gold.__module__}:{gold.__name__}"]
    assert options["model_name_or_path"].startswith(f"runs/{name}/")


def test_the_sentences_of_a_report_have_the_parts_of_its_score():
    answers = [*DEMONSTRATIONS[:200], *((prompt, REPORT_WORLD.best_response(prompt)) for prompt in PROMPTS[:20])]
    answers += [(PROMPT, text) for text in ("", "  ", "The fox", "The fox roars.  The fox is red. ", " ".join(WHOLE))]
    prompts, texts = zip(*answers, strict=True)
    parts = report_world.report_sentence_scores(prompts, texts)
    assert [sum(reward for _, reward in row) for row in parts] == report_world.report_score(prompts, texts)
    for text, row in zip(texts, parts, strict=True):
        ends = [end for end, _ in row]
        assert ends == sorted(set(ends))
        assert ends[-1] <= len(text)
    assert parts[-2] == [(14, 1.0 * (REPORT_WORLD.gold_score(PROMPT, FOX[1]))), (31, parts[-2][1][1])]
    # What comes later does not change the reward of a sentence.
    assert report_world.report_sentence_scores([PROMPT], [" ".join(WHOLE[:4])])[0] == parts[-1][:4]
    assert parts[-1][-1] == (len(" ".join(WHOLE)), WEIGHTS["count"] + WEIGHTS["whole"])
