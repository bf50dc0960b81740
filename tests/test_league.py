"""The league of `benchmarks/league.py` in its world of instructions, on a tiny chat model."""

import json
import pickle
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from tolerances import FP64, assert_close

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import instruction_base  # noqa: E402
import league  # noqa: E402
from instruction_base import Sizes, differing_pairs, questions  # noqa: E402
from league import Cell, build_base, main, measure_base, measure_path, run_cells, run_recipe  # noqa: E402
from league_methods import METHODS, WORLDS, instructions, rewarded_by, true_labels  # noqa: E402
from league_report import best_policies, gold_at, known_part  # noqa: E402

from rlhf_recipes.quickstart.report_world import REPORT_WORLD  # noqa: E402

SIZES = Sizes(answered=8, held_out_answered=2, max_completion_length=6)


def chat(text):
    return [{"role": "user", "content": "hello"}, {"role": "user", "content": text}]


def write_questions(folder, train, held_out):
    folder.mkdir()
    for name, asked in (("train", train), ("eval", held_out)):
        lines = [json.dumps({"prompt": chat(text)}) + "\n" for text in asked]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def test_questions_are_short_last_turns_each_once(tmp_path):
    asked = ["is the fox red?", "is the fox red?", "short", "two\nlines of text", "a" * 61, "  where is the bear? "]
    folder = write_questions(tmp_path / "data", asked, [])
    assert questions(folder / "train.jsonl", longest=60) == ["is the fox red?", "where is the bear?"]


def test_pairs_differ_in_score_and_share_no_answer():
    scores = [0.5, 0.5, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0]
    texts = ["a"] * 9 + ["", "b", "c"]
    assert differing_pairs(scores, texts) == [(0, 2), (1, 3), (8, 10)]


def words_of(prompts, completions, **kwargs):
    return [float(len(set(str(each)))) for each in completions]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Build the base of a tiny world."""
    folder = tmp_path_factory.mktemp("league")
    tok = tiny.tokenizer()
    model = Path(tiny.save(tiny.policy(tok, max_position_embeddings=512), folder / "model"))
    train = [f"is the fox red in cave {number}?" for number in range(16)]
    data = write_questions(folder / "data", train, [train[0], *(f"where is the bear {n}?" for n in range(4))])
    world = instructions(SIZES, steps=4, best_of=4)
    options = {**world.options, **rewarded_by("tiny:length_reward"), "judge_functions": []}
    options |= {"per_device_train_batch_size": 8, "tracking": False}
    sampling = {**world.sampling, "steps_per_generation": 2}
    world = replace(world, gold=words_of, options=options, sampling=sampling)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(instruction_base, "instruction_score", words_of)
        patch.setattr(sys, "argv", [])
        cell = Cell(world, METHODS["rloo"], 0, 0, folder)
        cell.base.parent.mkdir(parents=True)
        build_base(cell, model, data)
    return cell


def test_a_base_has_no_held_out_question_in_training(base):
    prompts = {
        split: [json.loads(line)["prompt"][0]["content"] for line in file.read_text().splitlines()]
        for split in ("train", "test")
        for file in [base.base / "prompts" / f"{split}.jsonl"]
    }
    asked = {split: {text.split("\n\n")[0] for text in texts} for split, texts in prompts.items()}
    assert (len(prompts["train"]), len(prompts["test"])) == (16, 4)
    assert not asked["train"] & asked["test"]


@pytest.mark.parametrize("method", ["ppo", "rloo", "grpo", "dpo"])
def test_each_method_is_trained_and_measured(base, method, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    cell = replace(base, method=METHODS[method])
    run_recipe(cell)
    result = measure_path(cell)
    assert [point["step"] for point in result["path"]] == [1, 2, 3, 4]
    assert all(point["proxy"] == point["gold"] > 0 for point in result["path"])
    assert -0.5 < result["path"][0]["kl"] < 0.5
    assert result["sft"]["gold"] > 0
    assert set(measure_base(cell)["best_of"]) == {"1", "2", "4"}


def test_a_reward_model_can_be_between_the_true_score_and_the_training(base, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", [])
    options = {name: value for name, value in base.world.options.items() if name not in rewarded_by("")}
    settings = {"ppo": [{"critic_pairs": 4}]}
    world = replace(base.world, name="learned", has_reward_model=True, options=options, settings=settings)
    cell = replace(base, world=world, method=METHODS["ppo"], root=tmp_path)
    shutil.copytree(base.base, cell.base)
    tiny.save(tiny.reward_model(tiny.tokenizer()), cell.base / "reward_modeling")
    run_recipe(cell)
    end = measure_path(cell)["path"][-1]
    assert end["gold"] > 0 != end["proxy"] != end["gold"]


def write_base(cell):
    if cell.seed == 2:
        raise ValueError("no base")
    (cell.root / "built").write_text("yes")


def train_nothing(cell):
    (cell.folder / "run").mkdir()


def measure_nothing(cell):
    assert (cell.folder / "run").exists()
    return {"built": (cell.root / "built").read_text(), "path": [{"gold": 1.0, "kl": 2.0}]}


def test_runs_without_a_result_are_built_trained_and_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(league, "run_recipe", train_nothing)
    cells = [Cell(WORLDS["quickstart"], METHODS["ppo"], 0, seed, tmp_path) for seed in range(3)]
    cells[0].folder.mkdir(parents=True)
    (cells[0].folder / "result.json").write_text("{}")
    run_cells(cells, jobs=1, build=write_base, measure=measure_nothing)
    assert cells[0].result() == {}
    assert cells[1].result().keys() == {"setting", "cpu_seconds", "built", "path"}
    assert not (cells[1].folder / "run").exists()
    assert cells[2].result() is None
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"[1/2] {cells[1].folder}: gold 1.00, KL 2.00, ")
    assert lines[1] == f"[2/2] {cells[2].folder} failed: see log.txt there"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ([(1.0, 2.0)], 2.0),  # the budget is never spent
        ([(1.0, 2.0), (9.0, 4.0)], 3.0),  # halfway by the square root: 2 of 1 to 3
        ([(9.0, 4.0), (1.0, 2.0), (9.0, 6.0)], 4.0),  # the last time
        ([(9.0, 4.0), (-0.1, 1.0)], 1.0),  # back below the budget
    ],
)
def test_gold_at_a_budget(path, expected):
    result = {"sft": {"gold": 0.0}, "path": [{"kl": kl, "gold": gold} for kl, gold in path]}
    assert gold_at(result, budget=4.0) == pytest.approx(expected)


def test_pairs_of_reports_have_the_labels_of_the_true_score():
    prompt = next(iter(REPORT_WORLD.plans))
    best = REPORT_WORLD.best_response(prompt)
    pairs = {"prompt": [prompt] * 3, "chosen": [best, "no", best], "rejected": ["no", best, best]}
    assert true_labels(pairs) == {"prompt": [prompt] * 2, "chosen": [best] * 2, "rejected": ["no"] * 2}


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_a_run_can_be_sent_to_its_process(world):
    cell = Cell(world, METHODS["ppo"], 0, 0, Path())
    assert pickle.loads(pickle.dumps(cell)).folder == cell.folder


def test_the_best_policies_are_the_tilted_ones():
    """With two answers of score 0 and 1 per prompt the weight of the better one is a logistic function."""
    points = best_policies({"proxy": [[0.0, 1.0]] * 3, "gold": [[5.0, 7.0]] * 3})
    prices = 0.5 * np.geomspace(8, 0.25, 21)
    better = 1 / (1 + np.exp(-1 / prices))
    kl = better * np.log(2 * better) + (1 - better) * np.log(2 * (1 - better))
    assert_close(points, np.stack([kl, 5 + 2 * better], axis=1).tolist(), FP64)


def test_the_curve_ends_where_few_answers_decide():
    points = [[0.5, 1.0], [2.0, 2.0], [2.1, 3.0]]
    assert known_part(points, answers=64) == points[:2]  # log(64 / 8) = 2.08
    assert known_part(points, answers=8) == []


@pytest.mark.parametrize(("world", "method"), [("report", "ppo-trl-1.12"), ("instructions", "ppo-as-it-was")])
def test_a_method_that_a_world_lacks_is_refused(world, method, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["league.py", "--world", world, "--methods", "ppo", method])
    with pytest.raises(SystemExit):
        main()
    assert f"the world {world} has no {method}: choose from ppo, rloo, grpo" in capsys.readouterr().err
