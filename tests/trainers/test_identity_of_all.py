"""SFT, reward modelling and the baselines resume only the same run, as PPO does (`test_resume.py`)."""

import json
import logging
import re

import pytest
import tiny
import torch
from datasets import Dataset

from rlhf_recipes.durability.manifest import write_manifest
from rlhf_recipes.options.baselines import DPOConfig, RLOOConfig
from rlhf_recipes.options.resume import ResumeConfig
from rlhf_recipes.options.sft import SFTConfig
from rlhf_recipes.trainers.baselines import DPOTrainer, RLOOTrainer
from rlhf_recipes.trainers.run_identity import IDENTITY_FILE
from rlhf_recipes.trainers.sft import SFTTrainer
from rlhf_recipes.trainers.stock import Scoring

pytestmark = pytest.mark.tiny
TRAINING = {**tiny.QUIET, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}


def _sft(directory, *, seed=0, count=8, **options):
    tok = tiny.tokenizer()
    data = Dataset.from_dict({"text": tiny.TEXTS[:count]})
    args = SFTConfig(str(directory), **TRAINING | options)
    return SFTTrainer(tiny.policy(tok, seed=seed), args, train_dataset=data, processing_class=tok)


def _reward_model(directory, *, seed=0, count=8, **options):
    tok = tiny.tokenizer()
    data = tiny.preferences(count=count)
    return tiny.reward_trainer(directory, tiny.reward_model(tok, seed=seed), data=data, **TRAINING | options)


MAKERS = {"sft": _sft, "reward_modeling": _reward_model}


@pytest.fixture(scope="module", params=MAKERS)
def trained(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    make = MAKERS[request.param]
    make(directory).train()
    return make, directory / "checkpoint-1"


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"learning_rate": 0.5}, "`learning_rate` was .*, is 0.5"),
        ({"count": 7}, "the training data was .*, is "),
        ({"seed": 1}, "the model to start from was .*, is "),
        ({"lr_scheduler_type": "cosine"}, "`lr_scheduler_type` was linear, is cosine"),
    ],
)
def test_another_run_is_refused(trained, tmp_path, change, name):
    make, checkpoint = trained
    message = f"The checkpoint is of another run: .*{name}.*set `allow_changes_on_resume: true`"
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **change).train(resume_from_checkpoint=str(checkpoint))


def test_the_same_run_and_an_allowed_change_resume(trained, tmp_path, caplog):
    make, checkpoint = trained
    same = make(tmp_path / "same", logging_steps=2, per_device_eval_batch_size=2)
    same.train(resume_from_checkpoint=str(checkpoint))
    assert same.state.global_step == 2
    assert "of another run" not in caplog.text
    assert "the learning rate jumps" not in caplog.text
    other = make(tmp_path / "other", learning_rate=0.5, max_steps=3, allow_changes_on_resume=True)
    other.train(resume_from_checkpoint=str(checkpoint))
    assert re.search("of another run: `learning_rate` .*resumes anyway", caplog.text)
    message = "The run had 2 steps, and has 3 now. `lr_scheduler_type` linear .* the learning rate jumps at step 1"
    assert len(re.findall(message, caplog.text)) == 1


def test_a_new_head_of_a_model_in_memory_is_no_other_model(tmp_path, caplog):
    """A user of the library draws it anew in each session. The checkpoint has the trained one."""
    _reward_model(tmp_path, max_steps=1, lr_scheduler_type="constant").train()
    tok = tiny.tokenizer()
    model = tiny.reward_model(tok, seed=0)
    torch.nn.init.normal_(model.score.weight)
    options = TRAINING | {"lr_scheduler_type": "constant"}
    resumed = tiny.reward_trainer(tmp_path, model, data=tiny.preferences(count=8), **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2
    assert "the learning rate jumps" not in caplog.text, "the length has no part in a constant one"


def test_a_checkpoint_of_an_older_version_resumes_and_says_it(tmp_path, caplog):
    _sft(tmp_path, max_steps=1).train()
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    (checkpoint / IDENTITY_FILE).unlink()
    write_manifest(checkpoint, 1)
    with caplog.at_level(logging.WARNING):
        _sft(tmp_path, max_steps=2).train(resume_from_checkpoint=True)
    assert "is of an older version, which did not note models, data and options" in caplog.text


@pytest.mark.parametrize(
    ("trainer", "config", "data", "options"),
    [
        (RLOOTrainer, RLOOConfig, tiny.prompts(count=8), {"num_generations": 2, "max_completion_length": 8}),
        (DPOTrainer, DPOConfig, tiny.preferences(count=8), {"max_completion_length": 8}),
    ],
)
def test_a_baseline_has_an_identity_with_its_rewards(tmp_path, trainer, config, data, options):
    base = tiny.save(tiny.policy(tiny.tokenizer()), tmp_path / "base")
    args = config(str(tmp_path / "out"), **TRAINING | options | {"max_steps": 1})
    made = trainer(base, args, Scoring([tiny.length_reward], "\n"), data, processing_class=tiny.tokenizer())
    made.train()
    facts = json.loads((tmp_path / "out" / "checkpoint-1" / IDENTITY_FILE).read_text())
    assert {"the model to start from", "the training data", "the number of processes", "`seed`"} <= facts.keys()
    assert len(facts["the rewards"]) == 1
    made._identity.load_state_dict(facts)
    with pytest.raises(ValueError, match="of another run: the rewards was"):
        made._identity.load_state_dict(facts | {"the rewards": ["other"]})


@pytest.mark.parametrize("config", [SFTConfig, RLOOConfig, DPOConfig])
def test_every_training_has_the_option(config):
    assert issubclass(config, ResumeConfig)
