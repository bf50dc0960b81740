"""The answers of a judge stay on disk: nothing is asked twice, whatever happens to the process."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import judge_server
import pytest
import tiny
import torch
import yaml
from processes import run_script, start_script

from rlhf_recipes.rewards.attempts import PermanentRewardError, RewardCallError
from rlhf_recipes.rewards.judge_answers import DEFAULT_FILE, Answer, AnswerCache
from rlhf_recipes.rewards.language_model_judge import load_judge

KEY, VARIABLE = "a-key-that-nobody-may-see", "MY_JUDGE_KEY"
PAIRS = [("a" * number, "b" * (number + 1)) for number in range(1, 7)]
SCRIPT = """
import json, sys
from rlhf_recipes.rewards.language_model_judge import load_judge

pairs = json.loads(sys.argv[1])
judge = load_judge("judge.yaml", "run")
print(judge.compare(["x"] * len(pairs), *zip(*pairs)))
open(sys.argv[2], "w").write("done")
"""


@pytest.fixture
def server():
    with judge_server.serving() as server:
        yield server


@pytest.fixture
def load(tmp_path, server):
    def load(**options):
        path = tmp_path / "judge.yaml"
        path.write_text(yaml.safe_dump({"model": "tiny-judge", "address": server.address} | options))
        return load_judge(str(path), str(tmp_path / "run"))

    return load


def _compare(judge, pairs=PAIRS):
    first, second = zip(*pairs, strict=True)
    return judge.compare(["x"] * len(pairs), first, second)


def test_nothing_is_asked_twice(server, load, tmp_path):
    assert _compare(load(), [*PAIRS, *PAIRS]) == [0.0] * 12
    assert len(server.asked) == 12, "equal questions of a call are one"
    server.reply = lambda texts: "[[C]]"
    assert _compare(load()) == [0.0] * 6
    assert len(server.asked) == 12
    assert (tmp_path / "run" / DEFAULT_FILE).is_file()
    assert _compare(load(sampling={"top_p": 0.5})) == [0.5] * 6, "what changes an answer is another question"
    assert _compare(load(cache=str(tmp_path / "own" / "answers.sqlite"))) == [0.5] * 6
    assert (tmp_path / "own" / "answers.sqlite").is_file()


def test_a_killed_process_loses_no_answer(server, load, tmp_path):
    load(concurrency=1)
    server.delay = 0.1
    process = _started(tmp_path, "one")
    while len(server.asked) < 5:
        assert process.is_alive(), (tmp_path / "output.txt").read_text()[-2000:]
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    asked, server.delay = len(server.asked), 0.0
    assert 5 <= asked < 12
    assert _compare(load()) == [0.0] * 6
    assert len(server.asked) - asked in (12 - asked, 13 - asked), "but for the question that was on its way"


def test_two_processes_share_the_answers(server, load, tmp_path):
    load(concurrency=2)
    server.delay = 0.05
    turn = iter(range(10_000))
    server.reply = lambda texts: f"[[{'AB'[next(turn) % 2]}]]"  # never the same answer to a question
    processes = [_started(tmp_path, name) for name in ("one", "two")]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    results = [line for line in (tmp_path / "output.txt").read_text().splitlines() if line.startswith("[")]
    assert len(results) == 2
    assert results[0] == results[1] == str(_compare(load()))
    assert len(server.asked) <= 24


def _started(directory, name):
    (directory / "ask.py").write_text(SCRIPT)
    pairs = str([list(pair) for pair in PAIRS]).replace("'", '"')
    return start_script(directory / "ask.py", pairs, name, directory=directory)


def test_a_damaged_file_is_named_and_stays(server, load, tmp_path):
    _compare(load())
    file = tmp_path / "run" / DEFAULT_FILE
    whole = file.read_bytes()
    for damaged in (b"no database" * 1000, whole[:4096] + b"\xff" * 4096 + whole[8192:]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"is damaged: .*{DEFAULT_FILE} .*move it away"):
            load()
        assert file.read_bytes() == damaged
    file.write_bytes(whole)
    judge, asked = load(), len(server.asked)
    file.write_bytes(b"no database" * 1000)  # in the middle of a run
    with pytest.raises(PermanentRewardError, match="Put a copy of it back"):
        _compare(judge)
    file.write_bytes(whole)
    assert _compare(judge) == [0.0] * 6
    assert len(server.asked) == asked


def test_a_place_that_cannot_be_written_is_named(load, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be kept in .*file/answers.sqlite: File exists"):
        load(cache=str(tmp_path / "file" / "answers.sqlite"))
    with pytest.raises(RewardCallError, match="unable to open"):
        AnswerCache(tmp_path).known(["a"])


def test_the_first_answer_counts(tmp_path):
    cache = AnswerCache(tmp_path / "a.sqlite")
    first, second = Answer("one", "stop", 1), Answer("two", "length", 2)
    assert cache.keep("k", first) == cache.keep("k", second) == first
    assert cache.known(["k", *map(str, range(1200))]) == {"k": first}


def _trainer(tmp_path, load, **options):
    judge = load(key_variable=VARIABLE)
    own = {"num_generations": 2, "save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "constant"}
    return tiny.ppo_trainer(
        tmp_path / "ppo", rewards=judge, pairwise_judges={"held": judge}, eval_data=tiny.prompts(count=2),
        eval_strategy="steps", eval_steps=4, **own, **options,
    )  # fmt: skip


def test_ppo_goes_on_without_asking_again_and_writes_no_key(server, load, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, KEY)
    whole = _trainer(tmp_path, load, max_steps=8)
    whole.train()
    asked = len(server.asked)
    assert asked > 0
    assert len({request["messages"][0]["content"] for request in server.asked}) == asked
    assert set(server.keys) == {f"Bearer {KEY}"}
    logged = {name for entry in whole.state.log_history for name in entry}
    assert {"rewards/judge/first_position_wins", "rewards/judge/tokens", "eval_held/win_rate"} <= logged
    weights = {name: value.clone() for name, value in whole.model.state_dict().items()}

    server.reply = lambda texts: "[[C]]"
    resumed = _trainer(tmp_path, load, max_steps=8)
    resumed.train(str(tmp_path / "ppo" / "checkpoint-4"))
    assert len(server.asked) == asked
    assert all(torch.equal(value, weights[name]) for name, value in resumed.model.state_dict().items())

    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == DEFAULT_FILE for path in files)
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []

    changed = _trainer(tmp_path, lambda **options: load(rubric="Be brief.", **options), max_steps=12)
    with pytest.raises(ValueError, match="of another run: the rewards was"):
        changed.train(str(tmp_path / "ppo" / "checkpoint-8"))


@pytest.mark.slow(reason="three runs of recipes; the parts have their own tests")
@pytest.mark.recipe
def test_the_recipes_take_the_file_of_a_judge(server, load, tmp_path):
    load()
    tiny.save(tiny.policy(tiny.tokenizer()), tmp_path / "policy")
    tiny.write_splits(tiny.prompts(), tmp_path / "prompts")
    common = {"model_name_or_path": "policy", "dataset_name": "prompts", "tracking": False, "max_completion_length": 6}
    training = {"steps_per_generation": 2, "num_iterations": 2, "max_steps": 4, "num_generations": 2}
    rewards = {"reward_functions": ["judge.yaml"], "pairwise_judges": ["judge.yaml"]}
    rewards |= {"eval_strategy": "steps", "eval_steps": 4}
    _run(tmp_path, "ppo", common | tiny.RECIPE | training | rewards | {"output_dir": "ppo"})
    log = json.loads((tmp_path / "ppo" / "trainer_state.json").read_text())["log_history"]
    assert {"rewards/judge/flipped", "eval_judge/win_rate"} <= {name for entry in log for name in entry}
    own = {"baseline_path": "policy", "pairwise_judges": ["judge.yaml"], "output_dir": "evaluation"}
    asked = len(server.asked)
    _run(tmp_path, "evaluate", common | own)
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert (results["judge/win_rate"], results["judge/tied"], len(server.asked)) == (0.5, 1.0, asked)
    rows = [json.loads(line) for line in (tmp_path / "evaluation" / "completions.jsonl").read_text().splitlines()]
    assert all(row["baseline_completion"] == row["policy_completion"] for row in rows)

    shutil.copytree(tmp_path / "prompts", tmp_path / "referenced")
    for split in ("train", "test"):  # as the page of judges says
        shutil.copy(tmp_path / "evaluation" / "completions.jsonl", tmp_path / "referenced" / f"{split}.jsonl")
    load(reference_column="baseline_completion")
    against = {"reward_functions": ["judge.yaml"], "dataset_name": "referenced", "output_dir": "against"}
    _run(tmp_path, "ppo", common | tiny.RECIPE | training | against)
    assert len(server.asked) > asked


def _run(directory, stage, options):
    (directory / f"{stage}.yaml").write_text(yaml.safe_dump(options))
    script = Path(__file__).parents[2] / "recipes" / f"{stage}.py"
    code, output = run_script(script, "--config", f"{stage}.yaml", directory=directory)
    assert code == 0, output[-3000:]
