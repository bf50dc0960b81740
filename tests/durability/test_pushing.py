"""The Hub gets the model and its card, and nothing else; no failure of the Hub ends a run."""

import logging
from pathlib import Path

import hub
import pytest
import tiny
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.tiny

POLICY = {
    *("README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"),
    *("tokenizer_config.json", "training_args.bin", "chat_template.jinja"),
}
PUSH = {"push_to_hub": True, "hub_token": "hf_" + "a" * 30, "max_steps": 2, "num_iterations": 1}
CHECKPOINTS = {"save_strategy": "steps", "save_steps": 1, "hub_always_push": True}


@pytest.fixture
def server(monkeypatch):
    with hub.serving(monkeypatch) as server:
        yield server


def test_a_policy_is_pushed_without_its_value_head_and_with_its_card(tmp_path, server):
    trainer = tiny.ppo_trainer(
        tmp_path / "out", hub_model_id="me/policy", hub_private_repo=True, hub_strategy="end", **PUSH
    )
    trainer.train()
    trainer.save_model()
    assert server.created == [("me/policy", True)]
    assert server.tokens == {f"Bearer {PUSH['hub_token']}"}
    assert [(repository, message) for repository, message, _ in server.commits] == [("me/policy", "Model save")]
    assert set(server.files) == POLICY, "no samples, no notes of trackers, no critic"
    pushed = tmp_path / "pushed"
    pushed.mkdir()
    for name, content in server.files.items():
        (pushed / name).write_bytes(content)
    with safe_open(pushed / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
    assert names
    assert not [name for name in names if "value_head" in name]
    AutoModelForCausalLM.from_pretrained(pushed)
    AutoTokenizer.from_pretrained(pushed)
    card = ModelCard.load(pushed / "README.md")
    assert (card.data.model_name, card.data.pipeline_tag) == ("policy", "text-generation")
    assert '"me/policy"' in card.text
    assert (tmp_path / "out" / "value_head.safetensors").is_file()
    assert not (tmp_path / "out" / "_hub").exists(), "the files are not kept twice"
    before = server.files.pop("model.safetensors")
    trainer.push_to_hub()
    assert server.files["model.safetensors"] == before, "a push by hand has no value head either"
    assert trainer.args.output_dir == str(tmp_path / "out")


def test_checkpoints_are_pushed_as_the_strategy_says(tmp_path, server):
    trainer = tiny.ppo_trainer(tmp_path / "out", hub_strategy="all_checkpoints", **PUSH, **CHECKPOINTS)
    trainer.train()
    assert server.created == [("me/out", False)]
    named = {name.partition("/")[0] for _, _, names in server.commits for name in names}
    assert {"checkpoint-1", "checkpoint-2", "README.md", "model.safetensors"} <= named
    assert "checkpoint-2/ppo_state.json" in server.files
    assert not [name for name in server.files if name.startswith("samples")]


def test_a_hub_that_refuses_is_an_error_before_the_run(tmp_path, server):
    server.refuse = 401
    with pytest.raises(
        ValueError, match=r"`push_to_hub`: the Hub refuses `hub_model_id` me/x \(401: .*`hf auth login`"
    ):
        tiny.ppo_trainer(tmp_path / "out", hub_model_id="me/x", **PUSH)


def test_a_hub_that_fails_in_the_run_costs_nothing(tmp_path, server, caplog):
    trainer = tiny.ppo_trainer(tmp_path / "out", hub_model_id="me/x", hub_private_repo=True, **PUSH, **CHECKPOINTS)
    server.refuse = 503
    caplog.set_level(logging.WARNING, "rlhf_recipes")
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    folder = tmp_path / "out" / "_hub"
    wanted = f"The run goes on, and all files are here. To push later: `hf upload me/x {folder} --private`"
    assert [text for text in caplog.messages if text.endswith(wanted)]
    assert {path.name for path in folder.iterdir()} == POLICY
    assert (tmp_path / "out" / "checkpoint-2" / "manifest.json").is_file()
    assert (tmp_path / "out" / "value_head.safetensors").is_file()
    assert PUSH["hub_token"] not in caplog.text
    server.refuse = None
    trainer.save_card()
    assert set(server.files) == POLICY, "the Hub has come back"


def test_a_hub_that_is_away_at_the_start_is_asked_again(tmp_path, server, caplog, monkeypatch):
    with monkeypatch.context() as away:
        away.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        trainer = tiny.ppo_trainer(tmp_path / "out", hub_strategy="end", **PUSH)
    assert "The Hub cannot be reached" in caplog.text
    server.delay = 0.05  # slow, but there
    trainer.train()
    trainer.save_model()
    assert server.created == [("me/out", False)]
    assert set(server.files) == POLICY


def test_a_full_disk_is_not_taken_for_a_failure_of_the_hub(tmp_path, server, monkeypatch):
    trainer = tiny.ppo_trainer(tmp_path / "out", hub_model_id="me/x", **PUSH)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer, "_save", fail)
    with pytest.raises(OSError, match="No space left"):
        trainer.push_to_hub()
    assert not server.commits


def test_only_the_main_process_pushes(tmp_path, server, monkeypatch):
    trainer = tiny.ppo_trainer(tmp_path / "out", hub_model_id="me/x", hub_strategy="end", **PUSH)
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    server.commits.clear()
    trainer.push_to_hub()
    trainer._push_from_checkpoint(str(Path(tmp_path, "out")))
    assert not server.commits
