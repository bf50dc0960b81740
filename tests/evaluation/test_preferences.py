"""Answers become preference pairs: sampled once, labelled by judges or people, and written for the trainers."""

import json
import shutil
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from processes import run_script
from trl import ScriptArguments

from rlhf_recipes.data.digest import dataset_digest
from rlhf_recipes.data.loading import load_earlier_pairs, load_split
from rlhf_recipes.data.pairs import Pair
from rlhf_recipes.evaluation import sampled_answers as sampling
from rlhf_recipes.evaluation.labelling import Asked, decided, scores_of, strengths
from rlhf_recipes.evaluation.preferences import (
    Labellers,
    figures_of,
    labelled_pairs,
    preferences_verdict,
    rows_of_pairs,
    write_preferences,
)
from rlhf_recipes.evaluation.sampled_answers import as_judges_see, sampled_answers
from rlhf_recipes.options.preferences import PreferenceArguments
from rlhf_recipes.rewards.attempts import PermanentRewardError, RewardCallError
from rlhf_recipes.rewards.calls import RewardCalls
from rlhf_recipes.rewards.protocol import Scorer

pytestmark = pytest.mark.tiny
RECIPE = Path(__file__).parents[2] / "recipes" / "sample_preferences.py"


def options(output_dir, **changes):
    given = {"judge_functions": ["tiny:length_reward"], "num_samples": 4, "max_completion_length": 6, "batch_size": 32}
    return PreferenceArguments(**{"dataset_name": "prompts", "output_dir": str(output_dir), **given, **changes})


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """Return the directory of a policy."""
    return tiny.save(tiny.policy(tiny.tokenizer()), tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def sampled(policy, tmp_path_factory):
    """Return the answers of the policy, by whether the prompts are chats, and their directories."""
    folders = {chat: tmp_path_factory.mktemp("sampled") for chat in (False, True)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "BATCHES", 1)
        of = {
            chat: sampled_answers(options(folder, batch_size=8), policy, tiny.prompts(chat=chat))
            for chat, folder in folders.items()
        }
    return of, folders


def asked_of(answers, prompts=("a", "b"), **columns):
    each = [prompt for prompt in prompts for _ in range(len(answers) // len(prompts))]
    return Asked(each, answers, [[1]] * len(answers), columns, len(answers) // len(prompts), at_once=3)


def test_answers_on_disk_are_not_sampled_again(policy, sampled, tmp_path, monkeypatch):
    whole, folders = sampled[0][False], sampled[1]
    shutil.copytree(folders[False], tmp_path, dirs_exist_ok=True)
    prompts, script_args = tiny.prompts(), options(tmp_path, batch_size=8)
    assert len(whole.texts) == 4 * len(prompts)
    assert len({*whole.texts[:4]}) > 1
    parts = sorted((tmp_path / "__answers").glob("0*.jsonl"))
    assert len(parts) == 4
    calls, sample = [], sampling.sample_answers

    def counted(*args, **kwargs):
        calls.append(args)
        return sample(*args, **kwargs)

    monkeypatch.setattr(sampling, "BATCHES", 1)
    monkeypatch.setattr(sampling, "sample_answers", counted)
    parts[1].unlink()
    parts[3].rename(parts[3].with_suffix(".jsonl.partial"))  # a stop in the middle of a write
    torch.manual_seed(5)
    assert sampled_answers(script_args, policy, prompts) == whole
    assert len(calls) == 2
    monkeypatch.setattr(sampling, "load_policy", None)  # with all parts there, nobody needs the policy
    assert sampled_answers(script_args, policy, prompts) == whole


def test_answers_that_were_sampled_otherwise_are_refused(policy, tmp_path):
    prompts = tiny.prompts(count=1)
    sampled_answers(options(tmp_path), policy, prompts)
    with pytest.raises(
        ValueError, match=r"sampled otherwise: `temperature` was 1.0, is 0.5. Use the same options, or"
    ):
        sampled_answers(options(tmp_path, temperature=0.5), policy, prompts)
    with pytest.raises(ValueError, match=r"`dataset_name` was \w+, is \w+\."):
        sampled_answers(options(tmp_path), policy, tiny.prompts(count=3))
    (tmp_path / "__answers" / "facts.json").unlink()
    with pytest.raises(ValueError, match=r"has answers without a readable facts.json. Delete it"):
        sampled_answers(options(tmp_path), policy, prompts)


def test_a_policy_on_the_hub_is_known_after_its_download(policy, tmp_path, monkeypatch):
    load, here = sampling.load_policy, []
    monkeypatch.setattr(sampling, "load_policy", lambda path, **kwargs: here.append(path) or load(path, **kwargs))
    monkeypatch.setattr(sampling, "fingerprint", lambda path: "hash" if here else path)
    first = sampled_answers(options(tmp_path), policy, tiny.prompts(count=1))
    assert sampled_answers(options(tmp_path), policy, tiny.prompts(count=1)) == first
    assert first.policy == "hash"


def test_the_mean_of_judges_in_their_own_units_decides_and_their_disagreement_is_counted():
    """Judge two has units 100 times as large. Its standard deviation is 100, so it prefers the second answer by 1."""
    asked = asked_of(list("pqrs"))
    judges = {
        "one": lambda completions, **_: [{"p": 3.0, "q": 0.0, "r": 1.0, "s": 1.0}[c] for c in completions],
        "two": lambda completions, **_: [{"p": 0.0, "q": 100.0, "r": None, "s": 50.0}[c] for c in completions],
    }
    preferred = strengths([Pair(0, 1), Pair(2, 3)], scores_of(judges, asked), {}, asked)
    deviations = np.std([3.0, 0.0, 1.0, 1.0]), np.std([0.0, 100.0, 50.0])
    np.testing.assert_allclose(preferred[0], [3 / deviations[0], -100 / deviations[1]])
    assert decided(preferred, only_agreed=False) == ([1, 0], {"unlabelled": 1, "disagreed": 1, "ties": 0})
    assert decided(preferred, only_agreed=True)[0] == [0, 0]
    alone = strengths([Pair(2, 3), Pair(0, 1)], scores_of({"one": judges["one"]}, asked), {}, asked)
    assert decided(alone, only_agreed=True) == ([0, 1], {"unlabelled": 0, "disagreed": 0, "ties": 1})


def test_the_answers_to_a_prompt_are_scored_in_one_call():
    seen = []

    def judge(prompts, completions, **columns):
        seen.append([*prompts])
        return [0.0] * len(prompts)

    for prompts in ("abc", "ab"):
        scores_of({"judge": judge}, asked_of(list("123456"), prompts=tuple(prompts)))
    assert seen == [["a"] * 2, ["b"] * 2, ["c"] * 2, ["a"] * 3, ["b"] * 3]  # 3 at a time


def test_each_score_head_of_a_reward_model_is_a_judge():
    class TwoHeads:
        """Combine two heads, as a reward model with score heads does."""

        @staticmethod
        def combine(scores):
            return scores.mean(dim=1)

        def __call__(self, completions, **kwargs):
            return self.combine(torch.tensor([[float(c), 10.0 * (float(c) > 1)] for c in completions])).tolist()

    judge, asked = TwoHeads(), asked_of(["0", "1", "2", "5"])
    scores = scores_of({"two": judge}, asked)
    np.testing.assert_allclose(scores, np.array([[0, 0], [1, 0], [2, 10], [5, 10]]) / [np.std([0, 1, 2, 5]), 5])
    assert judge.combine is TwoHeads.combine


def test_scores_by_head_of_a_late_call_stay_out_of_the_others():
    """The first call fails by its time limit. It ends while the second one fails, with as many scores."""
    begun, late = threading.Event(), threading.Event()

    class TwoHeads:
        """Give each answer its number, and ten times that."""

        __name__ = "two"

        @staticmethod
        def combine(scores):
            return scores.mean(dim=1)

        def __call__(self, completions, **kwargs):
            if completions[0] == "2":  # while its time passes, the first call ends
                begun.set()
                late.wait(5.0)
                raise PermanentRewardError("no")
            is_late = completions[0] == "0"
            if is_late:
                begun.wait(5.0)
            scores = self.combine(torch.tensor([[float(c), 10 * float(c)] for c in completions])).tolist()
            if is_late:
                late.set()
            return scores

    calls = RewardCalls(timeout=0.5, retries=0, failed="mask")
    asked = replace(asked_of(list("012345"), prompts=("a", "b", "c")), at_once=2)
    scores = scores_of({"two": TwoHeads()}, asked, calls)
    np.testing.assert_allclose(scores, [[np.nan] * 2] * 4 + [[8, 8], [10, 10]])


def test_judges_compare_by_their_own_method_and_functions_in_both_orders():
    class Judge:
        """Prefer the first text of the alphabet, and refuse x."""

        def compare(self, prompts, first, second):
            assert set(prompts) <= {"a", "b"}
            return [float("nan") if "x" in (a, b) else float(a < b) for a, b in zip(first, second, strict=True)]

    def first_place(prompts, completions_a, completions_b, topic):
        assert len(topic) == len(prompts) == len(completions_a)
        return [1.0] * len(prompts)

    asked, pairs = asked_of(["p", "q", "x", "a"], topic=list("uvwz")), [Pair(1, 0), Pair(3, 2)]
    nothing = scores_of({}, asked)
    np.testing.assert_array_equal(strengths(pairs, nothing, {"j": Judge()}, asked), [[-1.0], [np.nan]])
    assert strengths(pairs, nothing, {"f": first_place}, asked).tolist() == [[0.0], [0.0]]  # its bias cancels


def test_the_figures_of_judges_are_kept_and_a_failed_comparison_can_be_masked(sampled, tmp_path):
    class Judge(Scorer):
        """Prefer the longer answer. Tell how many were refused."""

        __name__ = "j"

        def compare(self, prompts, first, second):
            if broken:
                raise RuntimeError("no answer")
            return [(1 + (len(a) > len(b)) - (len(a) < len(b))) / 2 for a, b in zip(first, second, strict=True)]

        def __call__(self, prompts, completions, **columns):
            return [len(text) for text in completions]

        def take_counts(self):
            return Counter(asked=10, refused=4)

        def figures(self, counts):
            return {"refused": counts["refused"] / counts["asked"]}

    asked, broken = as_judges_see(sampled[0][False], tiny.prompts()), False
    arguments = (asked, sampled[0][False], Labellers({}, {"j": Judge()}))
    scored = labelled_pairs(options(tmp_path), asked, sampled[0][False], Labellers({"j": Judge()}, {}))
    compared = labelled_pairs(options(tmp_path), *arguments)
    assert compared.labels == scored.labels
    assert any(compared.labels)
    expected = {"pairs/j/refused": 0.4, "pairs/j/failed_attempts": 0.0, "pairs/j/failed_calls": 0.0}
    assert scored.figures == compared.figures == expected
    broken = True
    masked = labelled_pairs(options(tmp_path, failed_rewards="mask"), *arguments)
    assert not any(masked.labels)
    assert masked.figures == expected | {"pairs/j/failed_attempts": 1.0, "pairs/j/failed_calls": 1.0}
    with pytest.raises(RewardCallError, match="`j` failed at the first attempt: RuntimeError: no answer"):
        labelled_pairs(options(tmp_path), *arguments)


def test_pairs_without_agreement_count_as_lost():
    figures = {"pairs/new": 40.0, "pairs/disagreed": 60.0, "pairs/longer_chosen": 0.5}
    assert preferences_verdict(figures)[0].level == "good"
    left_out = preferences_verdict(figures, only_agreed=True)[0]
    assert left_out.level == "doubtful"
    assert "60% of the comparisons gave none" in left_out.text


def test_people_label_the_pairs_of_a_file(sampled, tmp_path, capsys):
    prompts, file, answers = tiny.prompts(), tmp_path / "label.jsonl", sampled[0][False]
    script_args = options(tmp_path / "out", judge_functions=[], label_file=str(file))
    asked = as_judges_see(answers, prompts)
    nobody = Labellers({}, {})
    assert labelled_pairs(script_args, asked, answers, nobody) is None
    assert labelled_pairs(script_args, asked, answers, nobody) is None  # the file is there, and still empty
    said = " ".join(capsys.readouterr().out.split())
    assert "Write `1`, `2` or `tie` into the column `better` of each, and run this command again." in said
    rows = [json.loads(line) for line in file.read_text().split("\n") if line]
    for row in rows:  # people prefer the longer answer
        lengths = len(row["answer_1"]), len(row["answer_2"])
        row["better"] = "tie" if lengths[0] == lengths[1] else 1 + (lengths[1] > lengths[0])
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    labelled = labelled_pairs(script_args, asked, answers, nobody)
    new = rows_of_pairs(labelled, prompts["prompt"], asked)
    assert len(new) == len(rows) - labelled.counts["ties"] > 0
    assert all(len(row["chosen"]) > len(row["rejected"]) for row in new)
    by_judge = labelled_pairs(options(tmp_path / "out"), asked, answers, Labellers({"l": tiny.length_reward}, {}))
    assert (by_judge.labels, labelled.by, by_judge.by) == (labelled.labels, ["people"], ["l (length_reward)"])


@pytest.mark.parametrize("chat", [False, True])
def test_trainers_read_what_is_written_and_nothing_else_in_the_directory(policy, sampled, tmp_path, chat):
    prompts, script_args, answers = tiny.prompts(chat=chat), options(tmp_path), sampled[0][chat]
    asked = as_judges_see(answers, prompts)
    labelled = labelled_pairs(script_args, asked, answers, Labellers({"length": tiny.length_reward}, {}))
    new = rows_of_pairs(labelled, prompts["prompt"], asked)
    figures = figures_of(new, (new[1:], new[:1]), labelled.counts, answers)
    assert figures["pairs/longer_chosen"] == 1.0
    assert [judgement.level for judgement in preferences_verdict({**figures, "pairs/new": 16.0})][1] == "bad"
    facts = {"labelled by": labelled.by, "policy": policy}
    (tmp_path / "__answers").mkdir()
    (tmp_path / "__answers" / "00000.jsonl").write_text('{"text": "a"}\n')
    files = write_preferences(script_args, (new[2:], new[:2]), figures, facts)
    write_preferences(script_args, (new[1:], new[:1]), figures, facts)
    earlier = sorted(path.name for path in (tmp_path / "__earlier").iterdir())
    assert earlier == ["test.jsonl", "train.jsonl"]  # of another content; card and figures are the same
    data = ScriptArguments(dataset_name=str(tmp_path))
    train, test = load_split(data, "train"), load_split(data, "test")
    assert [*train] == new[1:]
    assert [*test] == new[:1]
    assert load_earlier_pairs(options("other", earlier_pairs=[str(tmp_path)])) == [(new[1:], new[:1])]
    card = files[2].read_text()
    assert "| labelled by | length (length_reward) |" in card
    assert str(tmp_path) not in card
    tiny.reward_trainer(tmp_path / "rm", data=train, eval_data=test, chat=chat, max_steps=1).train()


def test_the_best_and_the_worst_answer_by_a_judge(sampled, tmp_path):
    answers, prompts = sampled[0][False], tiny.prompts()
    asked = as_judges_see(answers, prompts)
    script_args = options(tmp_path, pair_answers="best_and_worst")
    labelled = labelled_pairs(script_args, asked, answers, Labellers({"length": tiny.length_reward}, {}))
    for row in rows_of_pairs(labelled, prompts["prompt"], asked):
        lengths = [
            len(text) for prompt, text in zip(asked.prompts, asked.answers, strict=True) if prompt == row["prompt"]
        ]
        assert len(row["chosen"]) == max(lengths)
        assert len(row["rejected"]) == min(lengths)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judge_functions": []}, "Set either `label_file`, for people who label, or judges"),
        ({"label_file": "a.csv"}, "Set either `label_file`, for people who label, or judges"),
        ({"judge_functions": [], "label_file": "a.xlsx"}, "`label_file` must end with .csv or .jsonl, got 'a.xlsx'"),
        ({"num_samples": 3}, "`num_samples` is 3: it must be at least 2, and even"),
        ({"num_samples": 1, "pair_answers": "all"}, "`num_samples` is 1: it must be at least 2"),
        ({"pair_answers": "best_and_worst", "pairwise_judges": ["a:b"]}, "needs a score of each answer"),
        ({"earlier_pairs": ["old", "out/../out"]}, "`output_dir` is out/../out, which this run reads"),
    ],
)
def test_options_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match="`") as error:
        options("out", **changes)
    assert message in str(error.value)


@pytest.mark.recipe
def test_the_recipe_writes_pairs_beside_earlier_ones_and_its_run_is_tracked(policy, tmp_path):
    tiny.write_splits(tiny.prompts(), tmp_path / "prompts")
    old = tiny.preferences(count=4)
    (tmp_path / "old").mkdir()
    old.select([0, 1, 2]).to_json(tmp_path / "old" / "train.jsonl")
    old.select([3]).to_json(tmp_path / "old" / "test.jsonl")
    (tmp_path / "judges.py").write_text(
        "def short(completions, **kwargs):\n    return [-len(c) for c in completions]\n"
    )
    given = {
        "model_name_or_path": policy,
        "dataset_name": "prompts",
        "judge_functions": "judges:short",
        "dtype": "float32",
    }
    given |= {"earlier_pairs": "old", "output_dir": "new", "max_completion_length": "6", "num_samples": "4"}
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    code, output = run_script(RECIPE, *words, directory=tmp_path)
    assert code == 0, output
    results = json.loads((tmp_path / "new" / "results.json").read_text())
    splits = [Dataset.from_json(str(tmp_path / "new" / f"{split}.jsonl")) for split in ("train", "test")]
    assert [*splits[0]][:3] == [*old.select([0, 1, 2])]
    assert [*splits[1]][0] == old[3]
    assert not {*splits[0]["prompt"]} & {*splits[1]["prompt"]}
    assert results["pairs/earlier"] == 4
    assert results["pairs/new"] == sum(map(len, splits)) - 4 > 4
    assert results["pairs/longer_chosen"] == 0.0
    assert "recipes/reward_modeling.py --config YOUR_CONFIG.yaml --dataset_name new" in output
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("rlhf_recipes").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.tags["stage"] == "preferences"
    assert run.data.metrics["pairs/new"] == results["pairs/new"]
    read = load_split(ScriptArguments(dataset_name=str(tmp_path / "new")), "train")
    assert run.data.tags["dataset.training"] == dataset_digest(read)  # the tag that a run on these pairs has
