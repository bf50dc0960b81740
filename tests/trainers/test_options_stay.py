"""A run never changes the options of the user: trainers, TRL and transformers write into a copy."""

import copy

import pytest
import tiny
from datasets import Dataset
from trl import SFTConfig

from rlhf_recipes import PPOTrainer, RewardModelTrainer
from rlhf_recipes.durability.preemption import PreemptionCallback
from rlhf_recipes.trainers.sft import SFTTrainer

pytestmark = pytest.mark.tiny

SET_FOR_A_RUN = {
    "lr_scheduler_type": "constant",  # else a longer run is another one
    "model_init_kwargs": {"attn_implementation": "eager"},
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "eval_on_start": True,
    "hub_token": "hf_" + "a" * 30,
}


def _ppo(directory, **options):
    return PPOTrainer, tiny.ppo_config(directory, **options), tiny.prompts(), {"reward_funcs": tiny.length_reward}


def _reward_modeling(directory, **options):
    return RewardModelTrainer, tiny.reward_config(directory, **options), tiny.preferences(), {}


def _sft(directory, **options):
    args = SFTConfig(str(directory), **tiny.QUIET | options)
    return SFTTrainer, args, Dataset.from_dict({"text": tiny.TEXTS}), {}


@pytest.mark.parametrize("make", [_ppo, _reward_modeling, _sft])
def test_a_run_and_its_resume_leave_the_options_as_they_are(tmp_path, make):
    """For a stream of data, TRL writes into `accelerator_config`."""
    path = tiny.save(tiny.policy(tiny.tokenizer()), tmp_path / "base")
    for max_steps in (1, 2):
        trainer_class, args, data, kwargs = make(tmp_path / "out", max_steps=max_steps, **SET_FOR_A_RUN)
        before = copy.deepcopy(args)
        trainer = trainer_class(
            path, args=args, train_dataset=data.to_iterable_dataset(), eval_dataset=data,
            processing_class=tiny.tokenizer(), peft_config=tiny.lora(), callbacks=[PreemptionCallback()], **kwargs,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=max_steps == 2)
        evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_runtime" in entry]
        assert evaluated == [*range(max_steps + 1)], "at the start of the run, not of its resume"
        trainer.evaluate()
        trainer.save_model()
        assert trainer.state.global_step == max_steps
        assert args == before
