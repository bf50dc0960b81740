"""The preflight shows two rows as they are read, with the boundary of what is trained."""

import pytest
import tiny
from datasets import Dataset
from trl import SFTConfig

from rlhf_recipes.preflight.examples import WIDTH, example_lines
from rlhf_recipes.trainers.sft import SFTTrainer

pytestmark = pytest.mark.tiny

READ = {
    False: ("hello\\n\\n", "the fox is red "),
    True: ("<|user|>hello<|assistant|>", "the fox is red "),
}


def _sft(directory, data, **options):
    tok = tiny.tokenizer()
    args = SFTConfig(str(directory), **{**tiny.QUIET, **options})
    return SFTTrainer(tiny.policy(tok), args, train_dataset=data, processing_class=tok)


@pytest.mark.parametrize("chat", [False, True])
def test_a_rollout_ends_where_the_policy_writes(tmp_path, chat):
    lines = example_lines(tiny.ppo_trainer(tmp_path, chat=chat))
    assert list(lines) == ["example 0", "example 1"]
    assert lines["example 0"] == READ[chat][0] + "‖"


@pytest.mark.parametrize("chat", [False, True])
def test_a_pair_shows_its_better_answer(tmp_path, chat):
    lines = example_lines(tiny.reward_trainer(tmp_path, chat=chat))
    assert lines["example 0"] == "{}‖{}<eos>".format(*READ[chat])


def test_whole_chats_have_no_boundary(tmp_path):
    data = tiny.preferences(chat=True)
    whole = data.map(lambda row: {name: [*row["prompt"], *row[name]] for name in ("chosen", "rejected")})
    trainer = tiny.reward_trainer(tmp_path, data=whole.remove_columns("prompt"))
    assert example_lines(trainer)["example 0"] == "{}{}<eos>".format(*READ[True])


def test_sft_marks_the_tokens_that_it_trains(tmp_path):
    data = tiny.preferences(chat=True).rename_column("chosen", "completion").remove_columns("rejected")
    assert example_lines(_sft(tmp_path, data))["example 0"] == "{}‖{}<eos>".format(*READ[True])
    every = example_lines(_sft(tmp_path, data, completion_only_loss=False))["example 0"]
    assert every == "{}{}<eos>".format(*READ[True])


def test_a_long_row_is_shortened_in_the_middle_of_both_parts(tmp_path):
    long = {"prompt": "where? " * 60, "chosen": "there. " * 60, "rejected": "no"}
    lines = example_lines(tiny.reward_trainer(tmp_path, data=Dataset.from_list([long] * 4)))
    asked, answer = lines["example 0"].split("‖")
    assert asked.startswith("where? where?")
    assert asked.endswith("where? \\n\\n")
    assert answer.endswith("there. <eos>")
    assert len(lines["example 0"]) <= WIDTH + 10
    assert lines["example 0"].count(" … ") == 2


def test_a_short_answer_leaves_its_room_to_the_prompt(tmp_path):
    row = {"prompt": "where? " * 20, "chosen": "there", "rejected": "no"}
    lines = example_lines(tiny.reward_trainer(tmp_path, data=Dataset.from_list([row] * 4)))
    assert lines["example 0"] == "where? " * 20 + "\\n\\n‖there<eos>"


def test_a_stream_has_no_examples(tmp_path):
    data = tiny.preferences().to_iterable_dataset()
    assert example_lines(tiny.reward_trainer(tmp_path, data=data)) == {}
