"""A trainer that a script builds is checked, recorded, saved and compared as by a recipe."""

import importlib.util
import re
from pathlib import Path

import pytest
import tiny
from datasets import DatasetDict

import rlhf_recipes
from rlhf_recipes import train
from rlhf_recipes.comparison.runs import read_experiment
from rlhf_recipes.options.recipes import PreflightArguments, TrackingArguments
from rlhf_recipes.tracking.callback import RunCallback

pytestmark = pytest.mark.tiny

README = Path(__file__).parents[2] / "recipes" / "README.md"


def _runs(client):
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments)
    assert len({run.data.tags.get("stage") for run in runs}) == len(runs), [run.data.tags for run in runs]
    return {run.data.tags["stage"]: run for run in runs}


def test_the_example_of_the_readme(client, tmp_path, monkeypatch, capsys):
    """Its models and data are replaced by small ones here."""
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    tok = tiny.tokenizer()
    policy = tiny.save(tiny.policy(tok), tmp_path / "policy")
    data = {"pairs": tiny.preferences(), "prompt": tiny.prompts()}
    splits = {name: DatasetDict(train=rows, test=rows) for name, rows in data.items()}
    monkeypatch.setattr("datasets.load_dataset", lambda name: splits["prompt" if name.endswith("prompt") else "pairs"])
    small = {**tiny.RECIPE, "max_steps": 2}
    ppo = {"max_completion_length": 6, "steps_per_generation": 2, "num_iterations": 1, "check_numerics": True}
    for name, options in (("RewardModelConfig", small), ("PPOConfig", small | ppo)):
        given = getattr(rlhf_recipes, name)
        monkeypatch.setattr(rlhf_recipes, name, lambda *a, _of=given, _own=options, **kw: _of(*a, **_own, **kw))
    scope = {}
    exec(example.replace("Qwen/Qwen2.5-0.5B-Instruct", policy), scope)

    assert "train_loss" in scope["metrics"]
    printed = capsys.readouterr().out
    assert printed.count("Preflight:") == 2
    assert scope["trainer"].numbers is not None
    runs = _runs(client)
    assert {stage: run.info.status for stage, run in runs.items()} == {
        "reward_modeling": "FINISHED",
        "ppo": "FINISHED",
    }
    assert runs["ppo"].data.tags["lineage.reward_model"] == runs["reward_modeling"].info.run_id
    assert "eval_accuracy" in runs["reward_modeling"].data.metrics
    for name in runs["ppo"].data.metrics:
        steps = [value.step for value in client.get_metric_history(runs["ppo"].info.run_id, name)]
        assert len(set(steps)) == len(steps), f"{name} is recorded twice at a step"
    assert "total_flos" in runs["ppo"].data.metrics, "transformers prints the others, and takes this one out"
    assert [len(run.outputs.model_outputs) for run in runs.values()] == [1, 1]
    assert {tag.value for data in runs["ppo"].inputs.dataset_inputs for tag in data.tags} == {"training"}
    (run,) = read_experiment("rlhf_recipes", (), client.tracking_uri)
    assert run.lineage["reward model"].startswith("runs/my_model/reward_modeling")
    assert run.options["model_name_or_path"] == policy
    assert len(run.curves["objective/scores"]) == 1
    assert not [c for c in scope["trainer"].callback_handler.callbacks if isinstance(c, RunCallback)]


def test_a_resume_continues_the_run(client, tmp_path):
    others = ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    options = {
        "report_to": ["mlflow", *others],
        "save_strategy": "steps",
        "save_steps": 2,
        "lr_scheduler_type": "constant",
    }
    train(tiny.ppo_trainer(tmp_path / "out", max_steps=2, **options))
    resumed = tiny.ppo_trainer(tmp_path / "out", max_steps=4, resume_from_checkpoint="true", **options)
    train(resumed, TrackingArguments(log_model=False))
    run = _runs(client)["ppo"]
    assert [value.step for value in client.get_metric_history(run.info.run_id, "loss")] == [1, 2, 3, 4]
    assert run.data.tags["mlflow.note.content"].startswith("**PPO**: finished at step 4 of 4.")
    folders = [path.name for path in (tmp_path / "out").glob("runs/*")]
    assert folders == [run.info.run_id for _ in others], "TensorBoard shows one run, too"


def test_nothing_is_recorded_without_mlflow_in_report_to_or_without_training(client, tmp_path):
    trainer, weights = tiny.reward_trainer(tmp_path / "out"), tmp_path / "out" / "model.safetensors"
    weights.parent.mkdir(exist_ok=True)
    weights.write_text("earlier")
    train(trainer, checks=PreflightArguments(overwrite=True))
    other = tiny.reward_trainer(tmp_path / "other", report_to=["mlflow"])
    with pytest.raises(SystemExit):
        train(other, checks=PreflightArguments(preflight_only=True))
    assert _runs(client) == {}
    assert (tmp_path / "out.replaced-1" / weights.name).read_text() == "earlier"
    assert weights.stat().st_size > len("earlier")
    assert (tmp_path / "out" / "reward_model_card.json").exists()


def test_a_dataset_without_a_length_is_refused(client, tmp_path):
    trainer = tiny.reward_trainer(tmp_path / "out")
    trainer.given_data = trainer.train_dataset.to_iterable_dataset(), None
    with pytest.raises(ValueError, match=r"`train_dataset` is a IterableDataset\. .* or call `trainer\.train\(\)`"):
        train(trainer)
