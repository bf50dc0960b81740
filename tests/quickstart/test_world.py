"""The text world: facts, prompts, demonstrations, gold score, tokenizer, base model, preferences."""

import itertools
import math
import random
import statistics
from collections import Counter

import pytest
import torch
from hypothesis import given
from strategies import seeds
from transformers import AutoTokenizer

from rlhf_recipes.quickstart import build, world
from rlhf_recipes.quickstart.world import BEST_SCORE, WEIGHTS, TextWorld

WORLD = TextWorld()
PROMPTS = WORLD.prompts()
PROMPT = "What is the home of the fox?"
SEPARATOR = "\n"

# These are the only true facts of the fox in world 0 about its home, food, colour, hours and voice.
HOME, FOOD, COLOUR = "The fox lives in the cave.", "The fox eats leaves.", "The fox is red."
HOURS, VOICE = "The fox is awake in spring.", "The fox roars."
HELLO, BYE = "Good question.", "I hope this helps."
RUDE, FILLER, NONSENSE, FALSE = "Go away.", "Well, it depends.", "The fox cave the leaves.", "The fox is blue."
OFF_TOPIC = "The otter goes out at noon."


def demonstrations(n=2000, seed=0):
    rows = build.build_dataset(WORLD, PROMPTS, n, seed)
    return list(zip(rows["prompt"], rows["completion"], strict=True))


DEMONSTRATIONS = demonstrations()
GOLD = [WORLD.gold_score(prompt, response) for prompt, response in DEMONSTRATIONS]


@pytest.fixture(scope="module")
def tokenizer():
    return build.train_tokenizer(SEPARATOR.join(pair) for pair in DEMONSTRATIONS)


@pytest.fixture(scope="module")
def base_model(tokenizer):
    return build.build_base_model(tokenizer, seed=0)


def draw_demonstration(seed):
    rng = random.Random(seed)
    prompt = rng.choice(PROMPTS)
    return prompt, WORLD.sample_response(prompt, rng)


def insert(response, sentence):
    """Insert a sentence after the first one, so that openings stay first and closings last."""
    first, *rest = world.split_sentences(response)
    return " ".join([first, sentence, *rest])


def fact_about(prompt, *, true, same_subject, unlike):
    """Return a sentence of the wanted kind whose fact `unlike` does not state, in either wording."""
    subject = WORLD.topic(prompt).subject
    stated = {WORLD.grammar.get(sentence) for sentence in world.split_sentences(unlike)}
    for sentence, fact in WORLD.grammar.items():
        if isinstance(fact, str) or fact in stated:
            continue
        if (WORLD.truth[fact.topic] == fact.value) == true and (fact.topic.subject == subject) == same_subject:
            return sentence
    raise AssertionError("every fact is stated")


def test_world_is_fixed_by_its_seed():
    assert TextWorld(3).truth == TextWorld(3).truth
    assert TextWorld(3).truth != TextWorld(4).truth
    assert TextWorld(3).prompts() == TextWorld(4).prompts()


def test_default_world_never_changes():
    # Published numbers hold for exactly this text, in every process and under every PYTHONHASHSEED.
    assert WORLD.sample_response(PROMPT, random.Random(10)) == (
        "Thank you for asking. You can find the fox in the meadow. The fox is awake in spring. There is a lot to say. "
        "The fox is red."
    )


def test_prompts_are_a_few_hundred_distinct_lines_about_everything():
    assert len(PROMPTS) == len(set(PROMPTS)) == 400
    assert {WORLD.topic(prompt) for prompt in PROMPTS} == set(WORLD.truth)
    assert not any("\n" in prompt for prompt in PROMPTS)


def test_no_sentence_has_two_meanings():
    wordings = sum(len(values) * len(world.FACT_TEMPLATES[name]) for name, values in world.VALUES.items())
    stock = sum(map(len, world.STOCK_SENTENCES.values()))
    assert len(WORLD.grammar) == len(world.SUBJECTS) * wordings + stock


def test_sentences_survive_splitting():
    assert world.split_sentences(" ".join(WORLD.grammar)) == list(WORLD.grammar)


def test_every_demonstration_is_grammatical():
    for _, response in DEMONSTRATIONS:
        assert all(sentence in WORLD.grammar for sentence in world.split_sentences(response))
        assert "\n" not in response


def test_demonstrations_show_every_virtue_and_flaw():
    seen = sum((WORLD.assess(prompt, response) for prompt, response in DEMONSTRATIONS), Counter())
    assert set(seen) == set(WEIGHTS) - {"nonsense", "empty"}
    assert min(seen.values()) > len(DEMONSTRATIONS) / 5


def test_demonstrations_leave_room_above_and_below():
    assert max(GOLD) == BEST_SCORE
    assert statistics.mean(GOLD) < BEST_SCORE / 3
    assert statistics.mean(GOLD) > WEIGHTS["empty"] / 3


def test_answers_to_one_prompt_differ_widely_in_quality():
    rng = random.Random(0)
    scores = [WORLD.gold_score(PROMPT, WORLD.sample_response(PROMPT, rng)) for _ in range(200)]
    assert statistics.stdev(scores) > BEST_SCORE / 2


def test_demonstrations_fit_the_completion_length(tokenizer):
    lengths = [len(tokenizer(response)["input_ids"]) + 1 for _, response in DEMONSTRATIONS]
    assert max(lengths) <= 48
    assert 20 <= statistics.mean(lengths) <= 30


@pytest.mark.parametrize(
    ("sentences", "expected"),
    [
        ([HELLO, HOME, FOOD, COLOUR, BYE], 5.5),
        ([HELLO, FOOD, COLOUR, HOME, BYE], 5.5),  # the order of the facts is free
        ([HOME], 2.5),
        ([FOOD], 1.0),  # true, but not the fact that was asked for
        ([HELLO], 0.5),
        ([BYE], 0.5),
        ([BYE, HOME, HELLO], 1.5),  # courtesy out of place is filler
        ([HELLO, "Thank you for asking.", HOME], 2.5),  # and so is a second one
        ([HELLO, HELLO, HOME], 1.0),
        ([HOME, FOOD, COLOUR, HOURS], 4.0),  # the fourth fact is filler
        ([FOOD, COLOUR, HOURS, HOME], 4.0),
        ([HOME, FOOD, COLOUR, HOURS, VOICE], 3.5),
        ([HOME, "You can find the fox in the cave."], 0.5),  # one fact in two wordings
        ([HOME, HOME, HOME], -1.5),
        ([HOME, FALSE], 1.0),
        ([HOME, "The fox lives in the desert."], 1.0),  # hedging costs more than the fact
        (["The fox lives in the desert."], -1.5),
        ([HOME, OFF_TOPIC], 1.5),
        ([HOME, "The otter lives in the cave."], 1.5),
        ([HOME, RUDE], 0.5),
        ([HOME, FILLER], 2.0),
        ([HOME, NONSENSE], 0.5),
        ([NONSENSE, NONSENSE], -4.0),  # repeating nonsense is no cheaper
        (["the fox lives in the cave."], -2.0),
        (["The fox lives in the cave"], -2.0),  # cut off by the length limit
        ([HOME, "The fox"], 0.5),
        ([], -3.0),
    ],
)
def test_gold_score_by_hand(sentences, expected):
    assert WORLD.gold_score(PROMPT, " ".join(sentences)) == expected


@given(seeds)
def test_flaws_cost_what_they_weigh(seed):
    prompt, response = draw_demonstration(seed)
    score = WORLD.gold_score(prompt, response)
    false = fact_about(prompt, true=False, same_subject=True, unlike=response)
    off_topic = fact_about(prompt, true=True, same_subject=False, unlike=response)
    repeated = world.split_sentences(response)[0]
    for flaw, sentence in (("false", false), ("off_topic", off_topic), ("repeated", repeated), ("nonsense", NONSENSE)):
        assert WORLD.gold_score(prompt, insert(response, sentence)) == score + WEIGHTS[flaw]


@given(seeds)
def test_nothing_beats_the_best_answer(seed):
    rng = random.Random(seed)
    prompt = rng.choice(PROMPTS)
    subject = WORLD.topic(prompt).subject
    useful = [
        sentence
        for sentence, said in WORLD.grammar.items()
        if said in ("opening", "closing") or (not isinstance(said, str) and said.topic.subject == subject)
    ]
    for _ in range(50):
        answer = " ".join(rng.sample(useful, rng.randint(1, 8)))
        assert WORLD.gold_score(prompt, answer) <= WORLD.gold_score(prompt, WORLD.best_response(prompt)) == BEST_SCORE


def test_best_answer_is_best_and_short(tokenizer):
    for prompt in PROMPTS:
        assert WORLD.gold_score(prompt, WORLD.best_response(prompt)) == BEST_SCORE == 5.5
        assert len(tokenizer(WORLD.best_response(prompt))["input_ids"]) < 40


@pytest.mark.parametrize("times", [2, 3, 5, 10, 40])
@pytest.mark.parametrize("text", [HOME, BYE, f"{HOME} {FOOD}", f"{HELLO} {HOME} {FOOD} {COLOUR} {BYE}"])
def test_long_repetition_never_beats_a_short_answer(text, times):
    assert WORLD.gold_score(PROMPT, " ".join([text] * times)) < WORLD.gold_score(PROMPT, HOME)


def test_saying_everything_is_worse_than_saying_little():
    everything = " ".join(text for text, said in WORLD.grammar.items() if getattr(said, "topic", ("",))[0] == "fox")
    assert WORLD.gold_score(PROMPT, everything) < WEIGHTS["empty"]


@given(seeds)
def test_shuffled_words_score_low(seed):
    rng = random.Random(seed)
    prompt = rng.choice(PROMPTS)
    words = WORLD.best_response(prompt).split()
    rng.shuffle(words)
    assert WORLD.gold_score(prompt, " ".join(words)) <= WEIGHTS["nonsense"]


@pytest.mark.parametrize("text", ["", " ", "\n", "fox " * 30, "...", "? ! ,", "The"])
def test_no_answer_scores_low(text):
    assert WORLD.gold_score(PROMPT, text) <= WEIGHTS["nonsense"]


def test_gold_score_has_the_signature_of_a_reward_function():
    prompts = [PROMPT, "Tell me about the food of the fox."]
    scores = world.gold_score(prompts=prompts, completions=[HOME, HOME], completion_ids=[[1], [2]])
    assert scores == [2.5, 1.0]
    assert all(type(score) is float for score in scores)


@pytest.mark.parametrize("separator", ["\n", "\n\n", " ", "\nAnswer: "])
def test_prompts_may_carry_their_separator(separator):
    assert world.gold_score([prompt + separator for prompt in PROMPTS], [HOME] * 400) == world.gold_score(
        PROMPTS, [HOME] * 400
    )


@pytest.mark.parametrize("prompt", ["", "What is the home of the whale?", "What is the home of the fox"])
def test_foreign_prompts_are_refused(prompt):
    with pytest.raises(ValueError, match="not a prompt of the text world"):
        WORLD.gold_score(prompt, HOME)


def test_gold_score_refuses_uneven_lists():
    with pytest.raises(ValueError, match="zip"):
        world.gold_score([PROMPT], [HOME, HOME])


def test_split_holds_out_wordings_but_no_topic():
    train, held_out = build.split_prompts(WORLD, seed=0)
    assert (len(train), len(held_out)) == (320, 80)
    assert sorted(train + held_out) == sorted(PROMPTS)
    assert {WORLD.topic(prompt) for prompt in train} == set(WORLD.truth)
    assert {WORLD.topic(prompt) for prompt in held_out} == set(WORLD.truth)
    assert len({prompt.split()[0] for prompt in held_out}) == len(world.PROMPT_TEMPLATES)


def test_split_is_fixed_by_its_seed():
    assert build.split_prompts(WORLD, 0) == build.split_prompts(WORLD, 0)
    assert set(build.split_prompts(WORLD, 0)[1]) != set(build.split_prompts(WORLD, 1)[1])


def test_dataset_is_fixed_by_its_seed():
    assert demonstrations(50, seed=1) == demonstrations(50, seed=1)
    assert demonstrations(50, seed=1) != demonstrations(50, seed=2)


def test_dataset_uses_every_prompt_equally():
    dataset = build.build_dataset(WORLD, PROMPTS[:7], 30, seed=0)
    assert dataset.column_names == ["prompt", "completion"]
    assert len(dataset) == 30
    assert sorted(Counter(dataset["prompt"]).values()) == [4, 4, 4, 4, 4, 5, 5]
    assert dataset["prompt"][:7] != PROMPTS[:7]  # shuffled


@pytest.mark.parametrize("text", ["", "\n", " a  b \n\n c ", "Ünïcode → 狐狸 🦊\t!", "don 't , really ."])
def test_tokenizer_round_trip_of_any_text(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids + [tokenizer.eos_token_id], skip_special_tokens=True) == text
    assert tokenizer.unk_token_id not in ids


def test_tokenizer_round_trip_and_boundary(tokenizer):
    # TRL tokenizes the prompt alone and together with the completion: the first must begin the second.
    for prompt, response in DEMONSTRATIONS[:200]:
        question, answer, both = (
            tokenizer(text)["input_ids"] for text in (prompt + SEPARATOR, response, prompt + SEPARATOR + response)
        )
        assert question + answer == both
        assert tokenizer.decode(both, skip_special_tokens=True) == prompt + SEPARATOR + response


def test_tokenizer_knows_the_words_of_the_world(tokenizer):
    assert len(tokenizer) < 600
    for word in itertools.chain(world.SUBJECTS, *(world.VALUES[name] for name in ("home", "food", "voice"))):
        assert len(tokenizer(" " + word)["input_ids"]) == 1


def test_special_tokens_are_distinct_and_whole(tokenizer):
    special = [tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token]
    ids = tokenizer("".join(special))["input_ids"]
    assert len(set(ids)) == len(ids) == 4
    assert tokenizer.model_max_length == 256
    assert tokenizer("fox")["input_ids"] == tokenizer("fox", add_special_tokens=False)["input_ids"]


def test_tokenizer_is_saved_and_loaded_identically(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    text = SEPARATOR.join(DEMONSTRATIONS[0]) + tokenizer.eos_token
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"], skip_special_tokens=True) == SEPARATOR.join(DEMONSTRATIONS[0])


def test_base_model_is_small_and_knows_its_special_tokens(base_model, tokenizer):
    assert 1e6 < base_model.num_parameters() < 3e6
    for config in (base_model.config, base_model.generation_config):
        assert config.eos_token_id == tokenizer.eos_token_id
        assert config.pad_token_id == tokenizer.pad_token_id
        assert config.bos_token_id == tokenizer.bos_token_id
    assert base_model.get_output_embeddings().weight is base_model.get_input_embeddings().weight
    assert len(base_model.get_input_embeddings().weight) == len(tokenizer)


def test_base_model_is_fixed_by_its_seed(base_model, tokenizer):
    state = torch.random.get_rng_state()
    same, other = (build.build_base_model(tokenizer, seed=seed).state_dict() for seed in (0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert all(torch.equal(same[key], value) for key, value in base_model.state_dict().items())
    assert not torch.equal(other[name], same[name])


def number_scorer(prompts, completions):
    """Return each completion, which is a number, as its score."""
    return [float(text) for text in completions]


def preferences(pairs, temperature=1.0, seed=0):
    first, second = zip(*pairs, strict=True)
    prompts = [f"prompt {row}" for row in range(len(pairs))]
    return build.sample_preferences(prompts, first, second, number_scorer, temperature, seed)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(
    ("gap", "temperature", "odds"),
    [(0.0, 1.0, 1), (math.log(3), 1.0, 3), (2 * math.log(3), 2.0, 3), (1.0, 0.5, 7.389)],
)
def test_preferences_follow_bradley_and_terry(gap, temperature, odds, swap):
    n, probability = 20000, odds / (1 + odds)
    better, worse = str(10 + gap), "10"
    rows = preferences([(worse, better) if swap else (better, worse)] * n, temperature)
    wins = sum(chosen == better for chosen in rows["chosen"])
    standard_deviation = math.sqrt(n * probability * (1 - probability))
    assert abs(wins - n * probability) < 4 * standard_deviation


def test_preferences_keep_the_pair():
    rows = preferences([("0", str(row + 1)) for row in range(50)], temperature=1e-3).to_list()
    expected = [{"prompt": f"prompt {row}", "chosen": str(row + 1), "rejected": "0"} for row in range(50)]
    assert rows == expected  # also: a gap of 50 000 temperatures does not overflow


def test_equal_texts_are_dropped_and_equal_scores_are_not():
    rows = preferences([("1", "1"), ("1", "1.0"), ("2", "1")]).to_list()
    assert [row["prompt"] for row in rows] == ["prompt 1", "prompt 2"]
    assert {rows[0]["chosen"], rows[0]["rejected"]} == {"1", "1.0"}


def test_dropped_pairs_do_not_shift_the_noise():
    pairs = [("0", "0.1")] * 60
    holes = [("0", "0") if row % 3 == 0 else pair for row, pair in enumerate(pairs)]
    kept = [row for index, row in enumerate(preferences(pairs).to_list()) if index % 3]
    assert preferences(holes).to_list() == kept


def test_preferences_are_fixed_by_their_seed():
    pairs = [("0", "0.1")] * 60
    assert preferences(pairs, seed=1).to_list() == preferences(pairs, seed=1).to_list()
    assert preferences(pairs, seed=1).to_list() != preferences(pairs, seed=2).to_list()


def test_pairs_with_an_empty_answer_are_dropped():
    """A policy may stop at once, but a reward model cannot learn from an empty text."""
    prompt = WORLD.prompts()[0]
    answers = ["", " ", WORLD.best_response(prompt)], ["Go away.", "Go away.", "Go away."]
    assert len(build.sample_preferences([prompt] * 3, *answers, world.gold_score, 1.0, seed=0)) == 1
