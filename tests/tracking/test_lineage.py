"""A run knows its code, its packages and the runs before it."""

import subprocess
from types import SimpleNamespace

import pytest
from datasets import Dataset, load_dataset

from rlhf_recipes.data.digest import dataset_digest
from rlhf_recipes.durability.origin import git_tags
from rlhf_recipes.tracking.description import described_inputs
from rlhf_recipes.tracking.lineage import note_model, read_run_file, upstream_runs, write_run_file

ROWS = [{"prompt": [{"role": "user", "content": f"question {i}"}], "score": i / 2} for i in range(2_500)]


def test_a_digest_is_of_the_content(tmp_path):
    data = Dataset.from_list(ROWS)
    data.to_json(tmp_path / "a.jsonl")
    data.to_json(tmp_path / "b.jsonl", batch_size=7)
    loaded = [load_dataset("json", data_files=str(tmp_path / name), split="train") for name in ("a.jsonl", "b.jsonl")]
    digest = dataset_digest(loaded[0])
    assert dataset_digest(loaded[1]) == digest, "another file, the same rows"
    assert dataset_digest(loaded[0].select(range(2_500))) == digest
    assert dataset_digest(loaded[0].select_columns(["score", "prompt"])) == digest
    assert dataset_digest(data.select([1, 0, *range(2, 2_500)])) != dataset_digest(data), "the order counts"


@pytest.mark.parametrize("row", [0, 1_700, 2_499])
def test_a_digest_depends_on_every_row(row):
    changed = [dict(entry) for entry in ROWS]
    changed[row] = {"prompt": [{"role": "user", "content": "another"}], "score": row / 2}
    assert dataset_digest(Dataset.from_list(changed)) != dataset_digest(Dataset.from_list(ROWS))


def test_a_digest_depends_on_the_names_of_the_columns():
    data = Dataset.from_dict({"chosen": ["a"], "rejected": ["b"]})
    swapped = data.rename_columns({"chosen": "rejected", "rejected": "chosen"})
    renamed = data.rename_column("rejected", "refused")
    assert len({dataset_digest(entry) for entry in (data, swapped, renamed)}) == 3


def test_a_checkout_has_a_commit_and_may_be_dirty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("RLHF_RECIPES_COMMIT", raising=False)
    assert git_tags() == {}
    monkeypatch.setenv("RLHF_RECIPES_COMMIT", "built")  # by the image
    assert git_tags() == {"git.commit": "built"}
    (tmp_path / "code.py").write_text("x = 1\n")
    for command in (
        ["init", "-q"], ["add", "code.py"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--no-gpg-sign", "-m", "x"],
    ):  # fmt: skip
        subprocess.run(["git", *command], check=True)
    clean = git_tags()
    assert len(clean["git.commit"]) == 40
    assert clean["git.dirty"] == "false"
    (tmp_path / "code.py").write_text("x = 2\n")
    assert git_tags() == {**clean, "git.dirty": "true"}


def test_a_run_is_found_from_its_directory_and_its_checkpoints(tmp_path):
    write_run_file(tmp_path / "sft", {"run_id": "a"})
    write_run_file(tmp_path / "rm", {"run_id": "b"})
    assert read_run_file(tmp_path / "sft" / "checkpoint-8") == {"run_id": "a"}
    assert read_run_file(tmp_path / "sft" / "tokenizer") is None
    assert read_run_file("organisation/model") is None
    model = SimpleNamespace(model_name_or_path=str(tmp_path / "sft" / "checkpoint-8"))
    script = SimpleNamespace(reward_model_path=str(tmp_path / "rm"), baseline_path=None)
    assert upstream_runs(model, script) == {"policy": {"run_id": "a"}, "reward_model": {"run_id": "b"}}


def test_a_model_id_is_of_the_weights_that_stand_beside_it(tmp_path):
    write_run_file(tmp_path, {"run_id": "a"})
    note_model(tmp_path, "b", "m-b")
    assert read_run_file(tmp_path) == {"run_id": "a"}, "another run has written there since"
    note_model(tmp_path, "a", "m-a")
    assert read_run_file(tmp_path) == {"run_id": "a", "model_id": "m-a"}
    assert read_run_file(tmp_path / "checkpoint-8") == {"run_id": "a"}, "a checkpoint has other weights"


def test_each_of_several_models_has_its_run(tmp_path):
    for name in ("a", "b"):
        note = {"run_id": name, "experiment_id": "1", "tracking_uri": "sqlite:///x"}
        write_run_file(tmp_path / name, note)
    config = SimpleNamespace(reward_models=[str(tmp_path / "a"), "http://127.0.0.1:1", str(tmp_path / "b")])
    found = upstream_runs(config)
    assert {role: note["run_id"] for role, note in found.items()} == {"reward_model": "a", "reward_model_3": "b"}
    inputs = described_inputs((config,), {})
    assert [given.role for given in inputs] == ["reward model", "reward model 2", "reward model 3"]
    assert [given.name for given in inputs] == config.reward_models
