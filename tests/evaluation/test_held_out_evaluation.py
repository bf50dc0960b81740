"""Evaluations during training compare with the policy of step 0, and do not change the training."""

import json

import pandas as pd
import pytest
import tiny
from peft import PeftModel
from tolerances import EXACT, assert_close

pytestmark = pytest.mark.tiny

EVALUATION = {"eval_strategy": "steps", "eval_steps": 4, "per_device_eval_batch_size": 3}
WIN_RATES = [f"eval_{judge}/{key}" for judge in ("score", "brevity", "longer") for key in ("win_rate", "win_rate_low")]


def brevity(completions, **kwargs):
    """Judge by the opposite of the reward."""
    return [-x for x in tiny.length_reward(completions)]


def longer(prompts, completions_a, completions_b, **kwargs):
    """Judge pairs."""
    lengths = (tiny.length_reward(completions) for completions in (completions_a, completions_b))
    return [float(a > b) for a, b in zip(*lengths, strict=True)]


def _trainer(output_dir, *, chat=False, peft=None, **options):
    return tiny.ppo_trainer(
        output_dir,
        chat=chat,
        peft=peft,
        eval_data=tiny.prompts(chat=chat),
        judges={"brevity": brevity},
        pairwise_judges={"longer": longer},
        **{**EVALUATION, "max_steps": 8, "learning_rate": 0.02, **options},
    )


def _evaluations(trainer):
    return [entry for entry in trainer.state.log_history if "eval_loss" in entry]


def _weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_judges_agree_with_what_they_are(tmp_path, chat, peft):
    trainer = _trainer(tmp_path, chat=chat, peft=tiny.lora() if peft else None)
    trainer.train()
    start, *later = _evaluations(trainer)
    assert [entry["step"] for entry in (start, *later)] == [0, 4, 8]
    assert all(start[name] == 0.5 for name in WIN_RATES)
    assert any(entry["eval_score/win_rate"] != 0.5 for entry in later)
    for entry in later:
        assert entry["eval_prompts"] == 8
        assert entry["eval_brevity/win_rate"] == 1 - entry["eval_score/win_rate"]
        assert entry["eval_longer/win_rate"] == entry["eval_score/win_rate"]
        assert entry["eval_win_rate"] == entry["eval_brevity/win_rate"], "a judge that is not trained on decides"
        gain = entry["eval_score/policy"] - entry["eval_score/baseline"]
        assert gain == pytest.approx(entry["eval_score/gain"])
        assert entry["eval_score/baseline"] == start["eval_score/policy"]
    assert {"eval_objective/kl", "eval_completions/clipped_ratio", "eval_completions/mean_length"} <= later[0].keys()


def test_an_evaluation_changes_no_training(tmp_path):
    weights = []
    for strategy in ("no", "steps"):
        trainer = _trainer(tmp_path / strategy, eval_strategy=strategy)  # sets the seed
        trainer.train()
        weights.append(_weights(trainer))
    plain, evaluated = weights
    for name, weight in plain.items():
        assert_close(evaluated[name], weight, EXACT)


def test_a_policy_that_does_not_learn_says_the_same_again(tmp_path):
    """Every evaluation draws the same random numbers, independent of the training."""
    trainer = _trainer(tmp_path, learning_rate=0.0)
    trainer.train()
    start, _, end = (
        pd.read_json(tmp_path / "samples" / f"evaluation-00000{step}.json", orient="split") for step in (0, 4, 8)
    )
    assert start["completion"].tolist() == end["completion"].tolist()
    assert len(set(start["completion"])) > 1


def test_the_best_checkpoint_is_loaded_and_patience_ends(tmp_path):
    """The reward is length and the judge wants short answers: no evaluation is better than the first ones."""
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 40, "load_best_model_at_end": True}
    trainer = _trainer(tmp_path, early_stopping_patience=2, learning_rate=0.05, **options)
    trainer.train()
    evaluations = _evaluations(trainer)[1:]
    lower_ends = [entry["eval_win_rate_low"] for entry in evaluations]
    best = lower_ends.index(max(lower_ends))
    assert trainer.args.metric_for_best_model == "win_rate_low"
    assert trainer.state.best_metric == lower_ends[best]
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{evaluations[best]['step']}")
    assert len(evaluations) == best + 3 < 10, "two evaluations in a row without a better one"
    loaded = _weights(trainer)
    step = evaluations[best]["step"]
    resumed = _trainer(tmp_path / "other", max_steps=step, allow_changes_on_resume=True, **EVALUATION)
    resumed.train(resume_from_checkpoint=trainer.state.best_model_checkpoint)
    for name, weight in _weights(resumed).items():
        assert_close(loaded[name], weight, EXACT)


def test_a_resumed_run_compares_with_the_same_start(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4}
    whole = _trainer(tmp_path / "whole", **options)
    whole.train()
    resumed = _trainer(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert [entry["step"] for entry in _evaluations(resumed)] == [0, 4, 8], "the start is not evaluated again"
    start, *_, end = _evaluations(resumed)
    for judge in ("score", "brevity"):
        assert end[f"eval_{judge}/baseline"] == start[f"eval_{judge}/policy"]
        assert end[f"eval_{judge}/policy"] != end[f"eval_{judge}/baseline"]


def test_a_checkpoint_without_a_baseline_is_refused(tmp_path):
    _trainer(tmp_path, eval_strategy="no", save_strategy="steps", save_steps=4).train()
    with pytest.raises(ValueError, match="Resume with `eval_strategy: no`"):
        _trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_tables_hold_what_was_said(tmp_path):
    trainer = _trainer(tmp_path, logging_steps=4, logged_samples=3)
    trainer.train()
    tables = {file.name: pd.read_json(file, orient="split") for file in (tmp_path / "samples").glob("*.json")}
    assert sorted(tables) == [
        *(f"evaluation-{step:06d}.json" for step in (0, 4, 8)),
        "evaluation.json",
        *(f"training-{step:06d}.json" for step in (4, 8)),
    ]
    training, evaluation = tables["training-000008.json"], tables["evaluation-000008.json"]
    assert len(training) == 3
    assert training["score"].tolist() == [len(text) for text in training["completion"]]
    assert training["score"].tolist() == training["length_reward"].tolist()
    assert (tables["training-000004.json"]["kl"] == 0).all(), "of the first rollout"
    assert (training["kl"] != 0).any()
    assert set(training["stop"]) <= {"eos", "length"}
    assert sorted(evaluation["prompt"][:8]) == sorted(f"{p}\n\n" for p in tiny.PROMPTS)
    assert (evaluation["judge/brevity"] == -evaluation["score"]).all()
    assert set(evaluation["stop"]) == {"eos", "length"}


def test_no_table_is_written_where_none_is_wanted(tmp_path):
    tiny.ppo_trainer(tmp_path, logged_samples=0).train()
    assert not (tmp_path / "samples").exists()


def test_the_value_head_of_the_best_checkpoint_is_saved(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4, "load_best_model_at_end": True}
    trainer = _trainer(tmp_path, peft=tiny.lora(), **options)
    trainer.train()
    assert isinstance(trainer.model, PeftModel)
    trainer.save_model()
    state = json.loads((tmp_path / "checkpoint-8" / "ppo_state.json").read_text())
    assert set(state["held_out"]["baseline"]) == {f"{p}\n\n" for p in tiny.PROMPTS}
    assert (tmp_path / "value_head.safetensors").is_file()


def test_a_decline_needs_a_judge(tmp_path):
    options = {"eval_data": tiny.prompts(), "eval_strategy": "steps", "eval_steps": 2, "stop_on_decline": True}
    with pytest.raises(ValueError, match="`stop_on_decline` needs a held-out judge"):
        tiny.ppo_trainer(tmp_path, **options)
    tiny.ppo_trainer(tmp_path, judges={"judge": tiny.length_reward}, **options)
