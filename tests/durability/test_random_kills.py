"""A few of the random kills of `benchmarks/kill_and_resume.py`: no tensor, figure or record may differ afterwards."""

import json
import random
import shutil
import sys
from pathlib import Path

import mlflow
import pytest
from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from kill_and_resume import compare, measure, start
from kill_cases import build_world, draw_case
from killed_run import PHASES, Kill

pytestmark = pytest.mark.recipe
KILLS = 2


@pytest.fixture(scope="module")
def world(tmp_path_factory, empty_store):
    directory = tmp_path_factory.mktemp("world")
    shutil.copy(empty_store, directory)
    needed = {"reward_model", "reward_adapter"}
    for case in (case for case in build_world(directory) if case.kind in needed):
        job = {"directory": str(directory), "recipe": case.recipe, "name": case.kind}
        assert start(job | {"arguments": case.arguments(case.kind)}, 1, None) == (0, False)
    return directory


@pytest.mark.parametrize(
    ("kind", "seed"),
    [
        ("reward modelling", 4),
        pytest.param("ppo one backbone", 1, marks=pytest.mark.slow(reason="the same driver on more kinds of runs")),
        pytest.param("sft lora", 2, marks=pytest.mark.slow(reason="the same")),
    ],
)
def test_random_kills_change_no_tensor_figure_or_record(world, kind, seed):
    draw = random.Random(seed)
    case = draw_case(draw, kind, world_size=1)
    outcomes = list(measure(world, kind.replace(" ", "-"), case, draw, KILLS, PHASES))
    assert [outcome for outcome in outcomes if not isinstance(outcome, Kill)] == []
    assert outcomes, "no kill came in time"


@pytest.mark.slow(reason="a launch of two processes waits for each of them to end")
@pytest.mark.parametrize("kind", ["ppo", "reward modelling lora"])
def test_random_kills_of_one_of_two_processes(world, kind):
    draw = random.Random(3)
    case = draw_case(draw, kind, world_size=2)
    outcomes = list(measure(world, f"two-{kind.replace(' ', '-')}", case, draw, KILLS, PHASES))
    assert [outcome for outcome in outcomes if not isinstance(outcome, Kill)] == []


def test_the_comparison_sees_a_changed_tensor_figure_and_record(world):
    case = draw_case(random.Random(2), "sft", world_size=1)
    names = ("one-run", "another")
    for name in names:
        job = {"directory": str(world), "recipe": case.recipe, "name": name, "arguments": case.arguments(name)}
        assert start(job, 1, None) == (0, False)
    assert compare(world, *names) == []

    weights = load_file(world / "another" / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1e-6
    save_file(weights, world / "another" / "model.safetensors", metadata={"format": "pt"})
    (*_, file) = sorted((world / "another").glob("checkpoint-*/trainer_state.json"))
    state = json.loads(file.read_text())
    state["log_history"][0]["loss"] += 1e-9
    file.write_text(json.dumps(state))
    client = mlflow.MlflowClient(f"sqlite:///{world}/mlflow.db")
    experiment = client.get_experiment_by_name("rlhf_recipes").experiment_id
    (run,) = client.search_runs([experiment], "tags.mlflow.runName = 'another'")
    client.log_metric(run.info.run_id, "loss", 1.0, step=1)
    client.set_terminated(client.create_run(experiment, run_name="another").info.run_id, "RUNNING")

    found = [difference.split(":")[0] for difference in compare(world, *names)]
    assert found[0] == "/model.safetensors/lm_head.weight"
    assert found[1].endswith("/trainer_state.json/log_history/0/loss")
    assert found[2] == "/open"
    assert found[3].startswith("/run/values/loss")
