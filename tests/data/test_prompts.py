"""Wrong paths, splits, columns and functions are refused with a clear message."""

import json
from types import SimpleNamespace

import pytest
from datasets import Dataset, IterableDataset

from rlhf_recipes.console import completions_table, print_table
from rlhf_recipes.data.loading import load_demonstrations, load_prompts, load_split
from rlhf_recipes.data.prompts import add_separator
from rlhf_recipes.options.paths import require_path
from rlhf_recipes.options.recipes import EvaluationArguments, PPOArguments
from rlhf_recipes.rewards.functions import import_function


@pytest.fixture
def directory(tmp_path):
    """Write a directory of JSON lines with one row per split."""
    row = {"prompt": "a", "completion": "b", "answer": "c"}
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    return tmp_path


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Change to a directory without `runs/`."""
    monkeypatch.chdir(tmp_path)


def _arguments(path, **kwargs):
    defaults = {"dataset_config": None, "dataset_streaming": False}
    return SimpleNamespace(dataset_name=None if path is None else str(path), **{**defaults, **kwargs})


@pytest.mark.parametrize("name", ["base", "data", "prompts"])
def test_outputs_of_the_quickstarts_world(name):
    with pytest.raises(FileNotFoundError, match="Run `rlhf quickstart --until world` first"):
        require_path("model_name_or_path", f"runs/quickstart/{name}")


@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("runs/quickstart/sft", "`rlhf quickstart --until sft`"),
        ("runs/report/prompts", "`rlhf quickstart --world report --until world`"),
        ("runs/report/reward_modeling", "`rlhf quickstart --world report --until reward_modeling`"),
        ("runs/smollm2_135m/base", "`make smollm2`"),
        ("runs/smollm2_135m/ppo", "`rlhf ppo --config smollm2_135m/ppo_lora`"),
        (
            "runs/smollm2_135m/reward_modeling_qlora",
            "`rlhf reward-modeling --config smollm2_135m/reward_modeling_qlora`",
        ),
        ("runs/mine/sft", "`rlhf sft --config YOUR_CONFIG.yaml`"),
        ("runs/mine/ppo", "`rlhf ppo --config ppo.yaml`"),
    ],
)
def test_a_missing_stage_names_its_command(path, command, tmp_path):
    (tmp_path / "ppo.yaml").touch()
    with pytest.raises(FileNotFoundError) as error:
        require_path("model_name_or_path", path)
    assert command in str(error.value)


@pytest.mark.parametrize("path", ["./nowhere", "/no/where", "runs/quickstart/ppo/checkpoint-80"])
def test_other_missing_paths(path):
    with pytest.raises(FileNotFoundError, match="does not exist.$"):
        require_path("model_name_or_path", path)


def test_an_option_that_is_not_set():
    with pytest.raises(ValueError, match="`dataset_name` is not set"):
        load_split(_arguments(None), "train")


@pytest.mark.parametrize("name", ["my/modle", "data/nowhere/at/all"])
def test_what_is_neither_here_nor_on_the_hub(name):
    with pytest.raises(ValueError, match=f"`dataset_name` '{name}' cannot be loaded .not a directory here"):
        load_split(_arguments(name), "train")


def test_a_file_is_not_a_dataset(directory):
    with pytest.raises(ValueError, match="name the directory that holds it"):
        load_split(_arguments(directory / "train.jsonl"), "train")


def test_a_stream_is_refused(directory):
    with pytest.raises(ValueError, match="`dataset_streaming` is not available"):
        load_split(_arguments(directory, dataset_streaming=True), "train")


def test_a_split_that_is_not_there(directory):
    with pytest.raises(ValueError, match="no split 'eval', only 'train', 'test': set `dataset_train_split`"):
        load_split(_arguments(directory), "eval")


def test_prompts_keep_what_a_reward_function_may_want(directory):
    assert load_prompts(_arguments(directory), "train").column_names == ["prompt", "answer"]


def test_demonstrations_get_their_separator(directory):
    assert load_demonstrations(_arguments(directory), "train", " -> ")[0]["prompt"] == "a -> "


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "text": "b"}, "no column 'completion'"),
        ({"prompt": "a", "completion": ""}, "empty 'completion' in row 0"),
    ],
)
def test_bad_demonstrations(tmp_path, row, message):
    Dataset.from_list([row]).to_json(str(tmp_path / "train.jsonl"))
    with pytest.raises(ValueError, match=message):
        load_demonstrations(_arguments(tmp_path), "train", "\n")


def test_text_without_a_prompt_is_taken_as_it_is(tmp_path):
    Dataset.from_list([{"text": "a"}]).to_json(str(tmp_path / "train.jsonl"))
    assert load_demonstrations(_arguments(tmp_path), "train", "\n")[0] == {"text": "a"}


def test_a_column_of_messages_beside_text_prompts_changes_nothing():
    data = Dataset.from_dict({"prompt": ["a"], "messages": [[{"role": "user", "content": "b"}]]})
    assert add_separator(data, " -> ")[0]["prompt"] == "a -> "


def test_functions_of_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("def reward(completions, **kwargs):\n    return [1.0]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["elsewhere"])
    assert import_function("my_rewards:reward")(["a"]) == [1.0]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("no_such_module:f", "no module 'no_such_module'"),
        ("json:no_such", "json has no function 'no_such'"),
        ("json", "is named as `package.module:function`"),
    ],
)
def test_functions_that_are_not_there(reference, message):
    with pytest.raises(ValueError, match=message):
        import_function(reference)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Nothing judges"),
        ({"reward_model_path": "rm", "num_prompts": 0}, "`num_prompts` must be positive"),
        ({"reward_model_path": "rm", "num_samples": 0}, "`num_samples` must be positive"),
        ({"reward_model_path": "rm", "max_completion_length": 0}, "`max_completion_length` must be positive"),
        ({"reward_model_path": "rm", "batch_size": 0}, "`batch_size` must be positive"),
        ({"reward_model_path": "rm", "temperature": -1.0}, "`temperature` must not be negative"),
        ({"judge_models": ["a/b/"], "pairwise_judges": ["c:b"]}, "Judges must have different names, got b, b"),
        ({"judge_functions": ["a:b", "c:b"]}, "Judges must have different names, got b, b"),
        ({"judge_functions": "a:b"}, r"`judge_functions` must be a list, got 'a:b': write `judge_functions: \[a:b\]`"),
    ],
)
def test_evaluation_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        EvaluationArguments(dataset_name="data", **options)


def test_reward_functions_are_a_list():
    with pytest.raises(ValueError, match="`reward_functions` must be a list"):
        PPOArguments(dataset_name="data", reward_functions="a:b")


def test_what_a_model_says_is_no_markup(capsys):
    text = "list[int] a[bold]b [/INST] ok"
    columns = {"prompt": [text], "baseline_completion": [text], "policy_completion": [text]}
    completions_table(columns, 1)
    print_table("t", {"a": text})
    shown = capsys.readouterr().out
    assert shown.count("[/INST]") == 4
    assert shown.count("[bold]") == 4


@pytest.mark.parametrize(("bad", "reason"), [(None, "an empty 'prompt' in row 1"), (3, "a number .* in row 1")])
def test_a_later_row_of_a_stream_is_named(bad, reason):
    rows = IterableDataset.from_generator(lambda: iter([{"prompt": "a"}, {"prompt": bad}]))
    with pytest.raises(ValueError, match=reason):
        list(add_separator(rows, "\n"))
