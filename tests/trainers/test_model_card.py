"""The card of every trained model is true: facts of the run, nothing empty, nothing of the machine."""

import json
import logging
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from datasets import Dataset
from huggingface_hub import ModelCard
from tolerances import FP32
from trl import SFTConfig

from rlhf_recipes.durability.origin import Origin, command_of, configuration_of, public_text
from rlhf_recipes.evaluation.figures import rounded
from rlhf_recipes.options.shipped import shipped
from rlhf_recipes.trainers.model_card import hub_name
from rlhf_recipes.trainers.sft import SFTTrainer

pytestmark = pytest.mark.tiny

TOKEN = "hf_" + "a" * 30
SCRIPT = SimpleNamespace(
    dataset_name="me/prompts", dataset_config=None, dataset_train_split="train", reward_model_path="runs/rm"
)
MODEL = SimpleNamespace(model_name_or_path="me/base")


def card_of(folder):
    """Return a card, after the checks that hold for every one."""
    content = Path(folder, "README.md").read_text("utf-8")
    card = ModelCard(content)
    for empty in ("None", "nan", "RewardModel", "[]", "()", "huggingface.co/None", "More Information", TOKEN):
        assert empty not in content, f"{empty!r} in {content}"
    assert str(Path.home()) + "/" not in content
    assert not re.search(r"(?<![\w:/.])/(tmp|home|root|work)/", content), content
    assert "licence" not in content, "TRL's misspelling"
    for line in card.text.splitlines():
        assert line.count("|") in (0, 3, 4), line
    return card


def results_of(card):
    return {result.metric_type: result.metric_value for result in card.data.eval_results or []}


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """A reward model that was trained, saved, evaluated and described, as its recipe does it."""
    folder = tmp_path_factory.mktemp("rm")
    trainer = tiny.reward_trainer(folder, max_steps=1)
    trainer.describe(SCRIPT, MODEL)
    trainer.train()
    trainer.save_model()
    before = card_of(folder)
    trainer.evaluate()
    trainer.save_card()
    return SimpleNamespace(folder=folder, before=before, card=card_of(folder), trainer=trainer)


def test_the_card_of_a_reward_model_has_its_evaluation(reward_model):
    assert "This model has not been evaluated." in reward_model.before.text
    card = reward_model.card
    assert "not been evaluated" not in card.text
    assert (card.data.base_model, card.data.datasets) == ("me/base", "me/prompts")
    assert (card.data.pipeline_tag, card.data.library_name) == ("text-classification", "transformers")
    assert {"trl", "reward-trainer", "rlhf-recipes"} <= set(card.data.tags)
    saved = json.loads((reward_model.folder / "reward_model_card.json").read_text())
    results = results_of(card)
    assert results["accuracy"] == pytest.approx(saved["eval_accuracy"])
    assert results["calibration_error"] == pytest.approx(saved["calibration_error"])
    assert card.data.eval_results[0].dataset_type == "me/prompts"
    assert "A reward model, made from `me/base` by reward modelling on pairs of answers" in card.text
    assert "| reads | plain text: the prompt, then '\\n\\n', then the answer |" in card.text
    assert "AutoModelForSequenceClassification" in card.text
    assert "| steps | 1 of 1 |" in card.text
    assert "arxiv" not in card.content, "no paper is behind this loss"


def test_the_card_of_ppo_names_kl_win_rate_and_reward_model(reward_model, tmp_path):
    shutil.copytree(reward_model.folder, tmp_path / "second", ignore=shutil.ignore_patterns("checkpoint-*"))
    rewards = [str(reward_model.folder), str(tmp_path / "second")]
    trainer = tiny.ppo_trainer(
        tmp_path, rewards=rewards, eval_data=tiny.prompts(), judges={"short": _short},
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, max_steps=2, num_iterations=1,
    )  # fmt: skip
    trainer.describe(SCRIPT, MODEL)
    trainer.train()
    trainer.save_model()
    card = card_of(tmp_path)
    last = [entry for entry in trainer.state.log_history if "eval_win_rate" in entry][-1]
    results = results_of(card)
    assert results["short/win_rate"] == pytest.approx(last["eval_short/win_rate"])
    assert results["objective/kl"] == pytest.approx(last["eval_objective/kl"], abs=FP32["atol"])
    low, high = (last[f"eval_short/win_rate_{end}"] for end in ("low", "high"))
    row = next(line for line in card.text.splitlines() if "by the judge `short`" in line)
    assert f"| {rounded(low)} to {rounded(high)} |" in row
    assert "On 8 held-out prompts, after step 2." in card.text
    base = public_text(reward_model.trainer._card["base_model"])
    assert all(f"reward model `{place}`, trained from `{base}`" in card.text for place in ("runs/rm", "second"))
    assert "calibration error" in card.text
    assert "loss" not in results
    assert "| judges, not trained on | `short` |" in card.text
    assert "[Proximal Policy Optimization Algorithms](https://arxiv.org/abs/1707.06347)" in card.text
    assert card.data.pipeline_tag == "text-generation"
    assert "after step 1." in card_of(tmp_path / "checkpoint-1").text
    assert "| steps | 1 of 2 |" in card_of(tmp_path / "checkpoint-1").text

    (tmp_path / "README.md").unlink()
    resumed = tiny.ppo_trainer(
        tmp_path, rewards=rewards, eval_data=tiny.prompts(), judges={"short": _short},
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, max_steps=2, num_iterations=1,
    )  # fmt: skip
    resumed.describe(SCRIPT, MODEL)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    resumed.save_model()
    assert card_of(tmp_path).content == card.content, "what the resumed run did not measure itself is in its log"


def _short(completions, **kwargs):
    return [-float(len(completion)) for completion in completions]


def test_the_card_of_an_adapter_replaces_that_of_peft(tmp_path, monkeypatch):
    base = tiny.save(tiny.policy(tiny.tokenizer()), tmp_path / "base")
    ModelCard("---\nbase_model: me/ancestor\n---\n").save(tmp_path / "base" / "README.md")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "my.py"), "--hub_token", TOKEN, "--seed=1"])
    args = SFTConfig(str(tmp_path / "out"), max_steps=1, save_steps=1, **tiny.QUIET | {"save_strategy": "steps"})
    data = Dataset.from_dict({"text": tiny.TEXTS})
    trainer = SFTTrainer(base, args, train_dataset=data, processing_class=tiny.tokenizer(), peft_config=tiny.lora())
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-1"):
        card = card_of(folder)
        assert (card.data.base_model, card.data.library_name) == ("me/ancestor", "peft")
        assert "accelerate launch my.py --seed=1" in card.text
        assert "A language model, made from `base` by supervised fine-tuning" in card.text


def test_a_command_is_written_without_machine_and_secrets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["/x/pkg/__main__.py"])
    main = SimpleNamespace(__spec__=SimpleNamespace(name="pkg.__main__", origin="/x/pkg/__main__.py"))
    monkeypatch.setitem(sys.modules, "__main__", main)
    assert Origin.of_process(1).command == "accelerate launch -m pkg"
    config = tmp_path / "my.yaml"
    config.write_text(
        f"output_dir: {tmp_path}/runs/a\ntracking_uri: http://intern:5000\nhub_token: {TOKEN}\nseed: 3\n"
        "model_init_kwargs: {token: abc, revision: main}\ndeepspeed: /home/me/ds.json\njudge_functions: ['a.b:c']\n"
    )
    recipe = str(shipped("recipes") / "ppo.py")
    argv = [recipe, "--config", str(config), "--hub_token", TOKEN, "--parent_run_id", "12", "--learning_rate", "1e-5"]
    assert command_of(argv) == "rlhf ppo --config my.yaml --learning_rate 1e-5"
    assert command_of(argv[:3], 4) == "rlhf ppo --num_processes 4 --config my.yaml"
    shipped_yaml = str(shipped("recipes") / "configs" / "quickstart" / "ppo.yaml")
    assert command_of([recipe, "--config", shipped_yaml]) == "rlhf ppo --config quickstart/ppo"
    assert command_of(["ppo.py", "--mine", "1"]) == "accelerate launch ppo.py --mine 1", "a script of the user's own"
    assert command_of(["/x/pkg/train.py", "--a=1"], 2, "pkg.train") == (
        "accelerate launch --num_processes 2 -m pkg.train --a=1"
    )
    assert command_of(["/usr/bin/pytest", "-q"]) is None
    assert command_of(["/x/ipykernel_launcher.py", "-f", "/x/kernel.json"]) is None
    assert configuration_of(argv) == {
        "output_dir": "runs/a", "seed": 3, "model_init_kwargs": {"revision": "main"}, "deepspeed": "ds.json",
        "judge_functions": ["a.b:c"],
    }  # fmt: skip
    assert configuration_of([recipe]) == configuration_of([recipe, "--config", "none.yaml"]) == {}
    config.write_text("[1")
    assert configuration_of(argv) == {}
    assert public_text(f"sqlite:///{tmp_path}/a.db and file:///home/me/d") == "a.db and d"
    assert public_text("see http://a/b, not /home/me/c or ~/d") == "see http://a/b, not c or d"


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("me/model", "me/model"),
        ("gpt2", "gpt2"),
        ("runs/a/sft", None),
        ("./a", None),
        ("http://a:1", None),
        (None, None),
    ],
)
def test_only_a_name_on_the_hub_is_linked(name, known):
    assert hub_name(name) == known


@pytest.mark.parametrize(
    ("head", "known"),
    [
        (b"---\nbase_model: me/ancestor\nlanguage: 1\n1: 2\n---\n", "me/ancestor"),
        (b"---\n- a\n---\n", None),
        (b"---\na: [\n---\n", None),
        (b"---\n---\n", None),
        (b"\xff\xfe", None),
    ],
)
def test_the_card_of_a_local_base_is_read_if_it_can_be(tmp_path, head, known):
    (tmp_path / "README.md").write_bytes(head)
    assert hub_name(str(tmp_path)) == known


def test_only_the_process_that_writes_cards_asks_for_the_origin(tmp_path, monkeypatch):
    monkeypatch.setattr(Origin, "of_process", lambda *_: pytest.fail("another process asked"))
    monkeypatch.setattr(SFTTrainer, "is_world_process_zero", lambda trainer: False)
    data = Dataset.from_dict({"text": tiny.TEXTS})
    args = SFTConfig(str(tmp_path), **tiny.QUIET)
    SFTTrainer(tiny.policy(tiny.tokenizer()), args, train_dataset=data, processing_class=tiny.tokenizer())


def test_a_run_from_memory_is_described_too(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    trainer = tiny.ppo_trainer(tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model()
    card = card_of(tmp_path)
    assert card.data.base_model is None
    assert "made from `a model in memory` by PPO" in card.text
    assert "| data | 8 rows |" in card.text
    assert "function `tiny.length_reward`" in card.text
