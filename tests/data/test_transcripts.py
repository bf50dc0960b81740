"""A dialogue in one text is split after its last "Assistant:", and a boundary inside a sentence is noticed."""

import pytest
import trl
from datasets import Dataset, IterableDataset, concatenate_datasets

from rlhf_recipes.data.prompts import add_separator
from rlhf_recipes.data.rows import mend_transcripts
from rlhf_recipes.data.transcripts import begun_answer, split_transcript

HEAD = "\n\nHuman: How do I bake bread?\n\nAssistant:"
TURN = HEAD + " With flour.\n\nHuman: And then?\n\nAssistant:"
PAIR = {"chosen": " I would start with water.", "rejected": " I don't know."}


def _whole(head):
    return {name: head + text for name, text in PAIR.items()}


@pytest.mark.parametrize("head", [HEAD, TURN])
def test_the_answer_begins_after_the_last_assistant(head):
    assert split_transcript(_whole(head)) == {"prompt": head, **PAIR}
    assert split_transcript({"completion": head + " Yes."}) == {"prompt": head, "completion": " Yes."}


@pytest.mark.parametrize("head", [HEAD, TURN])
def test_a_prompt_cut_elsewhere_is_split_again(head):
    cut = trl.extract_prompt(_whole(head))
    assert cut["prompt"] == head + " I"
    assert split_transcript(cut) == {"prompt": head, **PAIR}
    assert split_transcript({"prompt": head, **_whole(head)}) == {"prompt": head, **PAIR}


def test_dialogues_that_part_earlier_share_the_last_common_turn():
    row = {"chosen": HEAD + " Yes.\n\nHuman: a\n\nAssistant: b", "rejected": HEAD + " No.\n\nHuman: c\n\nAssistant: d"}
    assert split_transcript(row)["prompt"] == HEAD
    assert split_transcript(trl.extract_prompt(row)) == split_transcript(row)


def test_text_without_a_shared_assistant():
    with pytest.raises(
        ValueError, match="No 'Assistant:' begins a turn in all of chosen, rejected, which begin with 'a b'"
    ):
        split_transcript({"chosen": "a b", "rejected": "a c"})


@pytest.mark.parametrize(
    ("prompt", "begun"),
    [
        (HEAD, ""),
        (HEAD + "\n\n", ""),
        (HEAD + " I", " I"),
        (TURN + " I would", " I would"),
        (HEAD + " With flour.\n\nHuman: And then?", ""),  # the separator may be "\n\nAssistant:"
        (HEAD + " With flour.\n\nHow polite is this assistant?", ""),  # a question about the dialogue
        ("User: hi\nAI:", ""),
        ("User: hi\nAI: Hel", " Hel"),
        ("### Human: hi### Assistant: Hel", " Hel"),
        ("Summarise this chat.\nUser: hi\nAssistant: hello", ""),
        ("What does an assistant: do", ""),
        ("", ""),
    ],
)
def test_an_answer_that_the_prompt_has_begun(prompt, begun):
    assert begun_answer(prompt) == begun


@pytest.mark.parametrize("stream", [False, True])
def test_pairs_that_were_cut_inside_a_sentence_are_mended(stream):
    data = Dataset.from_list([{"prompt": HEAD, **PAIR}, trl.extract_prompt(_whole(TURN))])
    earlier = {name: HEAD + text + TURN[len(HEAD) :] for name, text in PAIR.items()}
    data = concatenate_datasets([data, Dataset.from_list([trl.extract_prompt(earlier)])])
    rows = list(mend_transcripts(data.to_iterable_dataset() if stream else data))
    assert rows == [{"prompt": HEAD, **PAIR}, {"prompt": TURN, **PAIR}, split_transcript(earlier)]
    assert rows[2]["prompt"] == HEAD


def test_pairs_that_are_right_stay_the_same_dataset():
    data = Dataset.from_list([{"prompt": HEAD, **PAIR}, {"prompt": "Is it I", "chosen": " am", "rejected": "?"}])
    assert mend_transcripts(data) is data
    assert mend_transcripts(Dataset.from_dict({"prompt": [HEAD + " I"]})).column_names == ["prompt"]
    summaries = Dataset.from_dict({"prompt": [HEAD + " Yes."], "completion": ["A greeting."]})
    assert mend_transcripts(summaries) is summaries
    assert mend_transcripts(None) is None


def test_a_separator_inside_a_sentence_is_refused_by_row():
    data = Dataset.from_dict({"prompt": [HEAD, HEAD + " I would"]})
    with pytest.raises(
        ValueError, match=r"row 1 ends inside .* \(' I would'\).*split_transcript.*response_separator: ''"
    ):
        add_separator(data, "\n\n")
    assert add_separator(data, "") is data


def test_a_stream_is_refused_when_it_is_read():
    stream = add_separator(
        IterableDataset.from_generator(lambda: iter([{"prompt": HEAD}, {"prompt": HEAD + " I"}])), "\n"
    )
    with pytest.raises(ValueError, match="row 1 ends inside"):
        list(stream)
