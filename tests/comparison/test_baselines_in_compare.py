"""Runs of stock trainers and of PPO are ranked on one page."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import yaml
from processes import run_script

from rlhf_recipes.comparison.groups import group_runs
from rlhf_recipes.comparison.runs import read_experiment
from rlhf_recipes.comparison.verdict import decide

pytestmark = pytest.mark.recipe

RECIPES = Path(__file__).parents[2] / "recipes"
SAMPLING = {
    "steps_per_generation": 2, "num_generations": 2, "num_generations_eval": 1, "num_iterations": 2, "beta": 0.1,
}  # fmt: skip
STAGES = {"ppo": {"steps_per_generation": 2}, "rloo": SAMPLING, "grpo": SAMPLING, "dpo": {}}


def _run(directory, stage, **options):
    config = {
        **tiny.RECIPE, "model_name_or_path": "policy", "reward_model_path": "rm", "dataset_name": "pairs",
        "response_separator": " ", "output_dir": f"runs/{stage}", "max_completion_length": 8, "max_steps": 2,
        "learning_rate": 0.01, "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 8,
    }  # fmt: skip
    (directory / f"{stage}.yaml").write_text(yaml.safe_dump(config | options))
    script, method = ("ppo", []) if stage == "ppo" else ("baseline", ["--method", stage])
    return run_script(RECIPES / f"{script}.py", *method, "--config", f"{stage}.yaml", directory=directory)


@pytest.fixture(scope="module")
def directory(empty_store, tmp_path_factory):
    """Train with each method, recorded in one store."""
    directory, tok = tmp_path_factory.mktemp("baselines"), tiny.tokenizer()
    shutil.copy(empty_store, directory)
    tiny.save(tiny.policy(tok), directory / "policy")
    tiny.save(tiny.reward_model(tok), directory / "rm")
    tiny.write_splits(tiny.preferences(), directory / "pairs")
    for stage, options in STAGES.items():
        code, output = _run(directory, stage, **options)
        assert code == 0, output[-3000:]
    return directory


@pytest.mark.parametrize("stage", STAGES)
def test_a_policy_is_saved_with_its_log(directory, stage):
    folder = directory / "runs" / stage
    assert (folder / "model.safetensors").is_file()
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    first, *later = [entry for entry in log if "eval_objective/kl" in entry]
    assert first["eval_objective/kl"] == 0 != later[-1]["eval_objective/kl"]
    assert first["eval_score/win_rate"] == 0.5
    assert first["eval_objective/scores"] != later[-1]["eval_objective/scores"]


def test_a_comparison_ranks_all_methods(directory):
    runs = read_experiment("rlhf_recipes", [], f"sqlite:///{directory}/mlflow.db")
    assert [run.options["method"] for run in runs] == ["ppo", "rloo", "grpo", "dpo"]
    assert [run.held_out for run in runs] == [False, False, False, True]
    groups, _ = group_runs(runs)
    assert [f"method {name}" in group.label for name, group in zip(STAGES, groups, strict=True)] == [True] * 4
    verdict = decide(groups)
    assert {*verdict.frontier.best} == {"A", "B", "C", "D"}
    assert any("The training of D logs no score and KL of its own answers" in caveat for caveat in verdict.caveats)
    code, output = run_script(RECIPES / "compare.py", "--experiment", "rlhf_recipes", directory=directory)
    assert code == 0, output[-3000:]
    page = (directory / "runs" / "compare" / "report.html").read_text()
    assert all(f"method {name}" in page for name in STAGES)


@pytest.mark.parametrize(
    ("stage", "option", "message"),
    [
        ("rloo", {"kl_coef": 0.1}, "kl_coef"),
        ("dpo", {"num_generations": 2}, "num_generations"),
    ],
)
def test_an_option_of_another_method_is_refused(directory, stage, option, message):
    code, output = _run(directory, stage, **option)
    assert code == 1
    assert message in output.splitlines()[-1]
