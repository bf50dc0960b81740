"""The stages as a user runs them, shortened: exit code, artifacts, messages."""

import functools
import json
import re
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import mlflow
import nbformat
import pytest
from processes import free_port, run_command, run_launch

pytestmark = pytest.mark.recipe

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
CONFIGS = RECIPES / "configs" / "quickstart"
SHORT = {
    "sft": ["--max_steps", "4"],
    "reward_modeling": ["--max_steps", "2"],
    "ppo": ["--max_steps", "4", "--eval_steps", "4", "--kl_horizon", "64", "--per_device_train_batch_size", "16"],
    "evaluate": ["--num_prompts", "8", "--tracking_uri", "sqlite:///mlflow.db"],
}
BEGINS = {
    "sft": "runs/quickstart/base, with runs/quickstart/data",
    "reward_modeling": "runs/quickstart/sft, with runs/quickstart/preferences",
    "ppo": "runs/quickstart/sft, with runs/quickstart/prompts",
}
NEXT = {"sft": "reward_modeling", "reward_modeling": "ppo", "ppo": "evaluate"}
RAW = re.compile(r"total_flos|-0\.00\b|\d\.\d{5,}|\{'|\x1b|\d%\||Failed to load CPU")
HELD_OUT = 30  # prompts are left for the evaluations: with fewer the preflight warns
UNTRACKED = ("--tracking", "false")  # a new store takes seconds


def _run(run, *command, expect=0, **options):
    result = run(*command, **options)
    assert (result.returncode == 0) is (expect == 0), result.stdout[-3000:] + result.stderr[-6000:]
    return result


def _recipe(directory, stage, *arguments, **options):
    config = CONFIGS / f"{stage}.yaml"
    return _run(run_command, RECIPES / f"{stage}.py", "--config", config, *arguments, directory=directory, **options)


def _on_two_processes(*arguments):
    """Return the arguments of `accelerate launch` to run a recipe as on several devices."""
    launch = ("--config_file", ROOT / "accelerate_configs" / "multi_gpu.yaml", "--num_processes", "2")
    return (*launch, "--mixed_precision", "no", "--main_process_port", free_port(), *arguments)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """Run every stage for a few steps. Return the directory, and the reports of the recipes by stage.

    SFT is a fresh interpreter, started by accelerate's launcher of one process. PPO starts so on two processes in
    `test_preemption_of_recipes.py`.
    """
    directory = tmp_path_factory.mktemp("quickstart")
    launched = {"sft": run_launch, "ppo": functools.partial(run_launch, *_on_two_processes())}
    reports = {}
    for stage in ("world", "sft", "preferences", "reward_modeling", "ppo", "evaluate"):
        command = (RECIPES / f"{stage}.py", "--config", CONFIGS / f"{stage}.yaml", *SHORT.get(stage, ()))
        if stage in ("world", "preferences"):
            command = (RECIPES / "quickstart.py", "--start", stage, "--until", stage, "--num_pairs", "48")
        reports[stage] = _run(launched.get(stage, run_command), *command, directory=directory)
        if stage == "world":
            held_out = directory / "runs/quickstart/prompts/test.jsonl"
            held_out.write_text("".join(held_out.read_text().splitlines(keepends=True)[:HELD_OUT]))
    return directory, reports


def test_the_notebook_shows_a_run(pipeline, tmp_path, monkeypatch, capsys):
    """Every cell runs in this process. The stages that they start have run already."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "notebook").symlink_to(pipeline[0])
    monkeypatch.chdir(tmp_path)
    names = {}
    first, *cells = (c for c in nbformat.read(ROOT / "notebooks/quickstart.ipynb", 4).cells if c.cell_type == "code")
    exec(first.source, names)
    names["rlhf"] = lambda *command: None
    for cell in cells:
        exec(cell.source, names)
    assert len(plt.get_fignums()) == 2
    assert all(axes.lines and len(axes.lines[0].get_xdata()) for n in plt.get_fignums() for axes in plt.figure(n).axes)
    plt.close("all")
    assert "Win rate over SFT by the gold score: 0." in capsys.readouterr().out


def test_artifacts(pipeline):
    run = pipeline[0] / "runs" / "quickstart"
    for name in (
        "sft/model.safetensors",
        "reward_modeling/model.safetensors",
        "reward_modeling/reward_model_card.json",
        "ppo/model.safetensors",
        "ppo/trainer_state.json",
        "evaluate/results.json",
        "evaluate/completions.jsonl",
    ):
        assert (run / name).is_file(), name
    results = json.loads((run / "evaluate" / "results.json").read_text())
    assert results["prompts"] == 8
    assert {"gold_score/policy", "reward_model/win_rate_low", "policy/kl", "policy/length"} <= results.keys()
    samples_per_prompt = 4
    assert len((run / "evaluate" / "completions.jsonl").read_text().splitlines()) == 8 * samples_per_prompt


def test_a_reward_model_ends_with_its_metrics(pipeline):
    report = pipeline[1]["reward_modeling"].stdout
    assert "eval_accuracy_margin_q4" in report
    assert "eval_length_correlation" in report


def test_every_stage_ends_with_its_result_a_verdict_and_the_next_command(pipeline):
    directory, reports = pipeline
    for stage, following in NEXT.items():
        lines = reports[stage].stdout.splitlines()
        result = lines.index(f"Result: {directory / 'runs/quickstart' / stage}")
        verdict, command = lines[result + 1 : -1], lines[-1]
        assert 1 <= len(verdict) <= 3
        assert all(re.match("  (good|doubtful|bad) ", line) for line in verdict), verdict
        config = CONFIGS / f"{following}.yaml"
        launcher = "python" if following == "evaluate" else "accelerate launch"
        assert command == f"Next: {launcher} recipes/{following}.py --config {config}"
    compare = "python recipes/compare.py --experiment rlhf_recipes --tracking_uri sqlite:///mlflow.db"
    assert reports["evaluate"].stdout.splitlines()[-1] == f"Next: {compare}"


def test_what_a_stage_prints_is_rounded_and_fit_for_a_file(pipeline):
    for stage, report in pipeline[1].items():
        # torch writes the time into a warning of its own.
        lines = [line for line in (report.stdout + report.stderr).splitlines() if "reducer.cpp" not in line]
        assert not RAW.search("\n".join(lines)), stage


def test_every_stage_is_a_finished_run(pipeline):
    mlflow.set_tracking_uri(f"sqlite:///{pipeline[0]}/mlflow.db")
    runs = mlflow.search_runs(experiment_names=["rlhf_recipes"])
    assert sorted(runs["tags.stage"]) == ["evaluation", "ppo", "reward_modeling", "sft"]
    assert set(runs["status"]) == {"FINISHED"}
    ppo = runs[runs["tags.stage"] == "ppo"].iloc[0]
    assert ppo["metrics.objective/scores"] == ppo["metrics.objective/scores"], "the callback's metrics are in the run"
    assert "params.learning_rate" in runs.columns


def test_no_warning_of_ours_in_a_first_run(pipeline):
    for stage, report in pipeline[1].items():
        for line in (report.stdout + report.stderr).splitlines():
            # The reward model has made two steps, and torch finds no unused parameter in the first forward.
            if not line.startswith("Warning: The reward model") and "reducer.cpp" not in line:
                assert "Warning" not in line, f"{stage}: {line}"
            assert "UNEXPECTED" not in line, f"{stage}: {line}"


@pytest.fixture(scope="module")
def trained_card(pipeline):
    """Let the reward model's card say what that of the whole quickstart says."""
    path = pipeline[0] / "runs/quickstart/reward_modeling/reward_model_card.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eval_accuracy": 0.65}))


@pytest.mark.parametrize("stage", ["sft", "reward_modeling", "ppo"])
def test_the_preflight_of_the_whole_quickstart_is_short_and_finds_nothing(pipeline, trained_card, stage):
    output_dir = f"runs/quickstart/preflight_{stage}"
    options = ("--preflight_only", "true", "--output_dir", output_dir, "--experiment_name", "preflight")
    lines = _recipe(pipeline[0], stage, *options).stdout.splitlines()
    assert lines[1] == f"  from {BEGINS[stage]}, to {output_dir}"
    lines = lines[2:]
    assert lines[0].startswith("Preflight: 1 process on cpu, ")
    numbers = [line for line in lines if line.startswith("Numbers: ")]
    assert len(numbers) == (stage == "ppo")
    assert len(lines) <= 16
    assert all(line.startswith("  ") for line in lines[1:] if line not in numbers), lines
    assert not list((pipeline[0] / output_dir).glob("*")), "nothing that looks like a trained model"
    mlflow.set_tracking_uri(f"sqlite:///{pipeline[0]}/mlflow.db")
    assert mlflow.get_experiment_by_name("preflight") is None


def test_a_run_opens_with_its_preflight(pipeline):
    for stage in ("sft", "reward_modeling", "ppo"):
        lines = pipeline[1][stage].stdout.splitlines()
        assert lines[1] == f"  from {BEGINS[stage]}, to runs/quickstart/{stage}"
        assert lines[2].startswith("Preflight: "), stage
    assert "  run         1 rollout, 64 completions" in pipeline[1]["ppo"].stdout


@pytest.mark.parametrize("fails", [False, True])
def test_two_processes_agree_on_a_preflight(pipeline, trained_card, fails):
    """The checks are the main process's; what they mean for the run is every one's, or the others would wait."""
    bad = pipeline[0] / "no_eos"
    shutil.copytree(pipeline[0] / "runs/quickstart/sft", bad, dirs_exist_ok=True)
    if fails:  # an end of answer that the policy does not have
        for name, change in (
            ("tokenizer_config.json", {"eos_token": "<nowhere>"}),
            ("config.json", {"eos_token_id": None}),
            ("generation_config.json", {"eos_token_id": None}),
        ):
            (bad / name).write_text(json.dumps(json.loads((bad / name).read_text()) | change))
    for only in ("true", "false") if fails else ("true",):
        recipe = (RECIPES / "ppo.py", "--config", CONFIGS / "ppo.yaml", "--per_device_train_batch_size", "16")
        options = ("--model_name_or_path", bad, "--preflight_only", only, "--output_dir", "runs/two", *UNTRACKED)
        report = _run(run_launch, *_on_two_processes(*recipe, *options), directory=pipeline[0], expect=int(fails))
        assert report.stdout.count("Preflight: 2 processes on cpu") == 1
        assert "64 completions (16 x 2 processes x 2 steps)" in report.stdout
        assert ("outside the policy's vocabulary" in report.stdout) is fails
        assert not (pipeline[0] / "runs/two/trainer_state.json").exists()


@pytest.mark.parametrize("options", [(), ("--kl_coef", "0.2", *UNTRACKED)], ids=["no options", "options"])
def test_ppo_without_a_configuration_is_the_quickstarts_stage(tmp_path, options):
    report = _run(run_command, RECIPES / "ppo.py", *options, directory=tmp_path, expect=1)
    last = report.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: `model_name_or_path` is runs/quickstart/sft, which does not exist")
    assert "`rlhf quickstart --until sft`" in last
    assert "Traceback" not in report.stderr, "a refusal is one line"


def test_a_bug_keeps_its_traceback(pipeline):
    (pipeline[0] / "broken.py").write_text("raise RuntimeError('a bug')\n")
    options = ("--reward_functions", "broken:function", "--output_dir", "broken", *UNTRACKED)
    report = _recipe(pipeline[0], "ppo", *options, expect=1)
    assert "Traceback" in report.stderr
    assert "a bug" in report.stderr


def test_an_evaluation_checks_the_reward_models_card(pipeline):
    report = _recipe(pipeline[0], "evaluate", "--response_separator", "###", *UNTRACKED, expect=1)
    assert "Set `response_separator:" in report.stderr


def test_stages_have_an_order(tmp_path):
    command = (RECIPES / "quickstart.py", "--start", "ppo", "--until", "sft")
    report = _run(run_command, *command, directory=tmp_path, expect=1)
    assert "--start ppo comes after --until sft" in report.stderr


def test_the_other_world_has_its_own_folder(tmp_path):
    _run(run_command, RECIPES / "quickstart.py", "--world", "report", "--until", "world", directory=tmp_path)
    assert (tmp_path / "runs/report/base/model.safetensors").is_file()
    assert "Report on the" in (tmp_path / "runs/report/prompts/train.jsonl").read_text()
    assert not (tmp_path / "runs/quickstart").exists()


def test_a_missing_reward_model_names_its_stage(pipeline):
    options = ("--reward_model_path", "runs/mine/reward_modeling", *UNTRACKED)
    report = _recipe(pipeline[0], "ppo", *options, expect=1)
    assert "`rlhf reward-modeling --config YOUR_CONFIG.yaml`" in report.stderr


def test_a_crash_is_recorded_as_failed(pipeline):
    _recipe(pipeline[0], "ppo", "--response_separator", "###", "--experiment_name", "crash", expect=1)
    mlflow.set_tracking_uri(f"sqlite:///{pipeline[0]}/mlflow.db")
    assert list(mlflow.search_runs(experiment_names=["crash"])["status"]) == ["FAILED"]


def test_reward_functions_are_named_as_module_and_function(pipeline):
    options = ("--max_steps", "2", "--eval_strategy", "no", "--max_completion_length", "8", *UNTRACKED)
    options += ("--output_dir", "runs/quickstart/ppo_gold")
    _recipe(pipeline[0], "ppo", "--reward_functions", "rlhf_recipes.quickstart.world:gold_score", *options)
    report = _recipe(pipeline[0], "ppo", "--reward_functions", "json:no_such_function", *UNTRACKED, expect=1)
    assert "json has no function 'no_such_function'" in report.stderr


def test_two_processes_are_one_run(pipeline):
    """The ranks must agree on what they save."""
    state = json.loads((pipeline[0] / "runs/quickstart/ppo/trainer_state.json").read_text())
    assert state["global_step"] == 4, pipeline[1]["ppo"].stderr[-2000:]
    mlflow.set_tracking_uri(f"sqlite:///{pipeline[0]}/mlflow.db")
    runs = mlflow.search_runs(experiment_names=["rlhf_recipes"], output_format="list")
    (run,) = (run for run in runs if run.data.tags["stage"] == "ppo")
    assert run.info.status == "FINISHED"
    assert run.data.tags["accelerate.num_processes"] == "2"
    assert run.data.metrics["episode"] == 2 * 16 * 2, "processes x batch x steps_per_generation"


def test_the_quickstart_groups_its_stages_under_one_run(pipeline):
    command = (RECIPES / "quickstart.py", "--start", "evaluate")
    report = _run(run_command, *command, directory=pipeline[0], MLFLOW_EXPERIMENT_NAME="grouped")
    assert "win rate over SFT" in report.stdout
    assert f"ui --backend-store-uri sqlite:///{pipeline[0]}/mlflow.db" in report.stdout
    mlflow.set_tracking_uri(f"sqlite:///{pipeline[0]}/mlflow.db")
    runs = mlflow.search_runs(experiment_names=["grouped"], output_format="list")
    evaluation, parent = sorted(runs, key=lambda run: run.data.tags["stage"])
    assert evaluation.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert (parent.data.tags["stage"], parent.info.status) == ("pipeline", "FINISHED")
    assert "lineage.baseline" in evaluation.data.tags
