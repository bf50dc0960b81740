"""Each recipe saves its model before the final evaluation, which may fail."""

import runpy
from pathlib import Path

import pytest
import tiny
import tiny_steps
from datasets import Dataset
from transformers import Trainer
from trl import ModelConfig, ScriptArguments, SFTConfig

from rlhf_recipes import ProcessRewardModelConfig
from rlhf_recipes.options.recipes import BoundaryArguments, PreflightArguments, TrackingArguments
from rlhf_recipes.rewards.card import RewardModelCard
from rlhf_recipes.rewards.process import ProcessRewardModelCard

pytestmark = pytest.mark.tiny
RECIPES = Path(__file__).parents[2] / "recipes"


def _run(recipe, tmp_path, eval_steps=9):
    kinds = {"reward_modeling": tiny.preferences(), "process_reward_modeling": tiny_steps.rows()}
    data = kinds.get(recipe, Dataset.from_dict({"text": tiny.TEXTS}))
    tiny.write_splits(data, tmp_path / "data")
    base = tiny.save(tiny.policy(tiny.tokenizer()), tmp_path / "base")
    if recipe == "reward_modeling":
        options = [tiny.reward_config(tmp_path / "out"), ModelConfig(model_name_or_path=base)]
    elif recipe == "process_reward_modeling":
        training = ProcessRewardModelConfig(str(tmp_path / "out"), **{**tiny.QUIET, "max_steps": 2})
        options = [training, ModelConfig(model_name_or_path=base)]
    else:
        evaluated = {"eval_strategy": "steps", "eval_steps": eval_steps}
        training = SFTConfig(str(tmp_path / "out"), **{**tiny.QUIET, "max_steps": 2, **evaluated})
        options = [training, ModelConfig(model_name_or_path=base), BoundaryArguments()]
    script = ScriptArguments(dataset_name=str(tmp_path / "data"))
    main = runpy.run_path(str(RECIPES / f"{recipe}.py"))["main"]
    return main(script, *options, TrackingArguments(tracking=False), PreflightArguments())


@pytest.mark.parametrize("recipe", ["sft", "reward_modeling", "process_reward_modeling"])
def test_a_final_evaluation_that_fails_costs_no_model(tmp_path, monkeypatch, recipe):
    def evaluation_loop(*args, **kwargs):
        raise KeyError("eval_score_mean")

    monkeypatch.setattr(Trainer, "evaluation_loop", evaluation_loop)
    with pytest.raises(KeyError, match="eval_score_mean"):
        _run(recipe, tmp_path)
    assert (tmp_path / "out/model.safetensors").is_file()
    assert (tmp_path / "out/tokenizer.json").is_file()
    if recipe == "reward_modeling":
        assert RewardModelCard.load(tmp_path / "out").score_mean is None


@pytest.mark.parametrize(("eval_steps", "evaluations"), [(9, 1), (2, 1), (1, 2)])
def test_sft_evaluates_the_weights_that_it_saves_once(tmp_path, monkeypatch, eval_steps, evaluations):
    steps, evaluate = [], Trainer.evaluation_loop

    def evaluation_loop(self, *args, **kwargs):
        steps.append(self.state.global_step)
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "evaluation_loop", evaluation_loop)
    metrics = _run("sft", tmp_path, eval_steps)
    assert (steps[-1], len(steps)) == (2, evaluations)
    assert {"eval_loss", "eval_mean_token_accuracy", "train_loss"} <= metrics.keys()


def test_the_card_gets_the_result_of_the_evaluation_that_follows(tmp_path):
    metrics = _run("reward_modeling", tmp_path)
    card = RewardModelCard.load(tmp_path / "out")
    assert (card.score_mean, card.score_std) == (metrics["eval_score_mean"], metrics["eval_score_std"])
    assert card.eval_accuracy == metrics["eval_accuracy"]


def test_a_process_reward_model_ends_with_its_card_and_its_verdict(tmp_path, capsys):
    metrics = _run("process_reward_modeling", tmp_path)
    card = ProcessRewardModelCard.load(tmp_path / "out")
    assert (card.eval_accuracy, card.first_error_f1) == (metrics["eval_accuracy"], metrics["eval_first_error_f1"])
    assert "of held-out steps" in capsys.readouterr().out
